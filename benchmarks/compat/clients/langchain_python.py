from typing import Literal

import pydantic
from langchain_openai import ChatOpenAI, OpenAI
from trial import KEY, MODEL, URL, check, trial

where = {"base_url": f"{URL}/v1", "api_key": KEY, "model": MODEL, "max_retries": 0, "timeout": 120}
chat = ChatOpenAI(**where, max_tokens=8, temperature=0)
long = ChatOpenAI(**where, max_tokens=300, temperature=0)


class Person(pydantic.BaseModel, extra="forbid"):
    """Somebody."""

    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=99)


class Weather(pydantic.BaseModel, extra="forbid"):
    """The weather of a city."""

    city: Literal["Paris", "Oslo"]


@trial("ChatOpenAI.invoke")
def _():
    check(chat.invoke("Tell me of a king.").content)


@trial("ChatOpenAI.stream")
def _():
    check("".join(chunk.content for chunk in chat.stream("Tell me of a king.")))


@trial("OpenAI.invoke")
def _():
    check(OpenAI(**where, max_tokens=8).invoke("Once upon a time"))


for method in ("json_schema", "function_calling"):
    @trial(f"with_structured_output, {method}")
    def _(method=method):
        check(isinstance(long.with_structured_output(Person, method=method).invoke("Tell me of a king."), Person))


@trial("bind_tools, auto")
def _():
    chat.bind_tools([Weather]).invoke("How is the weather in Paris?")


@trial("bind_tools, any")
def _():
    calling = long.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False)
    check(calling.invoke("How is the weather in Paris?").tool_calls)


@trial("responses")
def _():
    check(ChatOpenAI(**where, max_tokens=16, use_responses_api=True).invoke("Tell me of a king.").content)
