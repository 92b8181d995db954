from huggingface_hub import InferenceClient
from trial import MESSAGES, PROMPT, SCHEMA, URL, check, trial

client = InferenceClient(model=URL, provider="hf-inference", timeout=120)


@trial("text_generation")
def _():
    check(client.text_generation(PROMPT, max_new_tokens=8))


@trial("text_generation, details")
def _():
    check(client.text_generation(PROMPT, max_new_tokens=8, details=True, best_of=2, do_sample=True).details.tokens)


@trial("text_generation, streamed")
def _():
    check("".join(client.text_generation(PROMPT, max_new_tokens=8, stream=True)))


@trial("text_generation, grammar")
def _():
    check(client.text_generation(PROMPT, max_new_tokens=20, grammar={"type": "regex", "value": "[0-9]{4}"}).isdecimal())


@trial("chat_completion")
def _():
    check(client.chat_completion(MESSAGES, max_tokens=8).choices[0].message.content)


@trial("chat_completion, streamed")
def _():
    check("".join(chunk.choices[0].delta.content or "" for chunk in client.chat_completion(MESSAGES, max_tokens=8,
                                                                                             stream=True)))


@trial("chat_completion, JSON schema")
def _():
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    check(client.chat_completion(MESSAGES, max_tokens=300, response_format=form).choices[0].message.content[0] == "{")


@trial("get_endpoint_info, health_check")
def _():
    check(client.get_endpoint_info()["model_id"] and client.health_check())
