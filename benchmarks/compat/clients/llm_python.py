import llm
from llm.default_plugins.openai_models import Chat, Completion
from trial import KEY, MODEL, URL, check, trial

where = {"model_name": MODEL, "api_base": f"{URL}/v1"}


@trial("prompt")
def _():
    model = Chat("ours", **where)
    check(model.prompt("Tell me of a king.", max_tokens=8, stream=False, key=KEY).text())


@trial("prompt, streamed")
def _():
    check("".join(Chat("ours", **where).prompt("Tell me of a king.", max_tokens=8, key=KEY)))


@trial("conversation")
def _():
    talk = Chat("ours", **where).conversation()
    check(talk.prompt("Tell me of a king.", max_tokens=8, key=KEY).text())
    check(talk.prompt("Go on.", max_tokens=8, key=KEY).text())


@trial("completion")
def _():
    check(Completion("ours", **where).prompt("Once upon a time", max_tokens=8, key=KEY).text())


@trial("schema")
def _():
    model = Chat("ours", **where, supports_schema=True)
    check(model.prompt("Who is king?", schema=llm.schema_dsl("name, age int"), max_tokens=300, stream=False,
                       key=KEY).text().startswith("{"))
