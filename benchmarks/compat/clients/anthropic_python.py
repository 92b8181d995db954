import anthropic
from trial import KEY, MESSAGES, MODEL, TOOL, URL, check, trial

client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0, timeout=120)
asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8}
tool = {"name": "weather", "input_schema": TOOL["function"]["parameters"]}


@trial("messages")
def _():
    check(client.messages.create(**asked).content)


@trial("messages, streamed")
def _():
    with client.messages.stream(**asked) as stream:
        check(stream.get_final_message().content)


@trial("tools")
def _():
    message = client.messages.create(**asked | {"max_tokens": 300}, tools=[tool], tool_choice={
        "type": "any", "disable_parallel_tool_use": True})
    check(message.content[-1].input["city"] in ("Paris", "Oslo"), message)


@trial("count_tokens")
def _():
    check(client.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens)
