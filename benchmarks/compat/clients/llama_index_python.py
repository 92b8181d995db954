from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from trial import KEY, MODEL, URL, check, trial

where = {"api_base": f"{URL}/v1", "api_key": KEY, "model": MODEL, "max_retries": 0, "timeout": 120, "max_tokens": 8}
chat = OpenAILike(**where, is_chat_model=True)
messages = [ChatMessage(role="user", content="Tell me of a king.")]


@trial("complete")
def _():
    check(OpenAILike(**where).complete("Once upon a time").text)


@trial("chat")
def _():
    check(chat.chat(messages).message.content)


@trial("stream_chat")
def _():
    check("".join(chunk.delta for chunk in chat.stream_chat(messages)))


@trial("chat with tools")
def _():
    from llama_index.core.tools import FunctionTool

    def weather(city: str) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    calling = OpenAILike(**where, is_chat_model=True, is_function_calling_model=True)
    calling.chat_with_tools([FunctionTool.from_defaults(weather)], user_msg="How is the weather in Paris?")
