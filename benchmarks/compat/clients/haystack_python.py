from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from trial import KEY, MODEL, SCHEMA, URL, check, trial

where = {"api_base_url": f"{URL}/v1", "api_key": Secret.from_token(KEY), "model": MODEL, "max_retries": 0}
messages = [ChatMessage.from_user("Tell me of a king.")]


@trial("chat")
def _():
    check(OpenAIChatGenerator(**where, generation_kwargs={"max_tokens": 8}).run(messages)["replies"][0].text)


@trial("chat, streamed")
def _():
    parts = []
    OpenAIChatGenerator(**where, generation_kwargs={"max_tokens": 8}, streaming_callback=parts.append).run(messages)
    check(len(parts) > 1)


@trial("JSON schema")
def _():
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    replies = OpenAIChatGenerator(**where, generation_kwargs={"max_tokens": 300, "response_format": form}
                                  ).run(messages)["replies"]
    check(replies[0].text.startswith("{"))
