from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from trial import MESSAGES, MODEL, URL, check, trial


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def completions():
    return LocalCompletionsAPI(base_url=f"{URL}/v1/completions", model=MODEL, tokenizer_backend="remote",
                               max_length=1024, tokenized_requests=True)


@trial("local-completions, loglikelihood")
def _():
    [(logprob, _)] = completions().loglikelihood([request("loglikelihood", "Once upon a", " time")], disable_tqdm=True)
    check(logprob < 0)


@trial("local-completions, generate_until")
def _():
    asked = request("generate_until", "Once upon a time", {"until": ["."], "max_gen_toks": 24})
    check(completions().generate_until([asked], disable_tqdm=True)[0])


@trial("local-chat-completions, generate_until")
def _():
    lm = LocalChatCompletion(base_url=f"{URL}/v1/chat/completions", model=MODEL, tokenizer_backend=None)
    asked = request("generate_until", lm.apply_chat_template(MESSAGES), {"until": ["."], "max_gen_toks": 24})
    check(lm.generate_until([asked], disable_tqdm=True)[0])
