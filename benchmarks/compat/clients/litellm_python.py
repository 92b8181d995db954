import json

import litellm
from trial import KEY, MESSAGES, MODEL, PROMPT, SCHEMA, TOOL, URL, check, trial

where = {"api_base": f"{URL}/v1", "api_key": KEY, "num_retries": 0, "timeout": 120}
chat = {"model": f"openai/{MODEL}", "messages": MESSAGES, "max_tokens": 8, **where}


@trial("completion")
def _():
    check(litellm.completion(**chat).choices[0].message.content)


@trial("completion, streamed")
def _():
    check("".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**chat, stream=True)))


@trial("text_completion")
def _():
    check(litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt=PROMPT, max_tokens=8,
                                  **where).choices[0].text)


@trial("its own answer sent back")
def _():
    message = litellm.completion(**chat).choices[0].message
    litellm.completion(**chat | {"messages": [*MESSAGES, message.model_dump(), *MESSAGES]})


@trial("context overflow is one to it")
def _():
    try:
        litellm.completion(**chat | {"messages": [{"role": "user", "content": "king " * 200_000}]})
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("no ContextWindowExceededError")


@trial("JSON schema")
def _():
    answer = litellm.completion(**chat | {"max_tokens": 300}, response_format={
        "type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}})
    check(set(json.loads(answer.choices[0].message.content)) == {"name", "age"})


@trial("tools, required")
def _():
    answer = litellm.completion(**chat | {"max_tokens": 300}, tools=[TOOL], tool_choice="required")
    check(json.loads(answer.choices[0].message.tool_calls[0].function.arguments)["city"])
