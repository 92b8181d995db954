import dspy
from trial import KEY, MESSAGES, MODEL, URL, check, trial

lm = dspy.LM(f"openai/{MODEL}", api_base=f"{URL}/v1", api_key=KEY, max_tokens=300, temperature=0.1, cache=False,
             num_retries=0)


@trial("LM")
def _():
    check(lm("Tell me of a king."))


@trial("LM, messages")
def _():
    check(lm(messages=[*MESSAGES, {"role": "assistant", "content": "He was old."}, *MESSAGES], n=2))
