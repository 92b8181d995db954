from smolagents import OpenAIServerModel, tool
from trial import KEY, MODEL, URL, check, trial

model = OpenAIServerModel(MODEL, api_base=f"{URL}/v1", api_key=KEY, max_tokens=300, temperature=0)
messages = [{"role": "user", "content": [{"type": "text", "text": "How is the weather in Paris?"}]}]


@tool
def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Its name.
    """
    return f"sunny in {city}"


@trial("generate")
def _():
    check(model.generate(messages, stop_sequences=["king"]).content is not None)


@trial("generate with tools")
def _():
    check(model.generate(messages, tools_to_call_from=[weather]).tool_calls)


@trial("generate_stream")
def _():
    check(list(model.generate_stream(messages)))
