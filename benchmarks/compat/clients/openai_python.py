import json

import openai
import pydantic
from trial import KEY, MESSAGES, MODEL, PROMPT, SCHEMA, TOOL, URL, check, trial

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120)
chat = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}


@trial("models")
def _():
    check(MODEL in [model.id for model in client.models.list()])


@trial("completions")
def _():
    check(client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8).choices[0].text)


@trial("completions, streamed")
def _():
    check("".join(c.choices[0].text for c in client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8,
                                                                       stream=True)))


@trial("chat")
def _():
    check(client.chat.completions.create(**chat).choices[0].message.content)


@trial("chat, streamed with usage")
def _():
    chunks = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    check(chunks[-1].usage.completion_tokens, chunks[-1])


@trial("chat, its own answer sent back")
def _():
    message = client.chat.completions.create(**chat).choices[0].message.model_dump()
    client.chat.completions.create(**chat | {"messages": [*MESSAGES, message, *MESSAGES]})


@trial("logprobs")
def _():
    answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=3)
    check(len(answer.choices[0].logprobs.content[0].top_logprobs) == 3)


@trial("chat, parsed into a class")
def _():
    class Person(pydantic.BaseModel, extra="forbid"):
        name: str = pydantic.Field(max_length=12)
        age: int = pydantic.Field(ge=0, le=99)

    answer = client.chat.completions.parse(**chat | {"max_tokens": 300}, response_format=Person)
    check(isinstance(answer.choices[0].message.parsed, Person))


@trial("chat, JSON schema")
def _():
    answer = client.chat.completions.create(**chat | {"max_tokens": 300}, response_format={
        "type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}})
    check(set(json.loads(answer.choices[0].message.content)) == {"name", "age"})


@trial("tools, auto")
def _():
    check(client.chat.completions.create(**chat, tools=[TOOL]).choices[0].message)


@trial("tools, required, and the result sent back")
def _():
    message = client.chat.completions.create(**chat | {"max_tokens": 300}, tools=[TOOL],
                                             tool_choice="required").choices[0].message
    [call] = message.tool_calls[:1]
    check(json.loads(call.function.arguments)["city"] in ("Paris", "Oslo"))
    history = [*MESSAGES, message.model_dump(exclude_none=True),
               *({"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls)]
    check(client.chat.completions.create(**chat | {"messages": history}, tools=[TOOL]).choices)


@trial("tools, streamed by the SDK's helper")
def _():
    with client.chat.completions.stream(**chat | {"max_tokens": 300}, tools=[TOOL], tool_choice="required",
                                        parallel_tool_calls=False) as stream:
        message = stream.get_final_completion().choices[0].message
    check(json.loads(message.tool_calls[0].function.arguments))


@trial("responses")
def _():
    check(client.responses.create(model=MODEL, input="Tell me of a king.", max_output_tokens=8).output)


@trial("responses, streamed")
def _():
    kinds = [event.type for event in client.responses.create(model=MODEL, input="Tell me of a king.",
                                                             max_output_tokens=8, stream=True)]
    check(kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete"), kinds)


@trial("embeddings")
def _():
    check(client.embeddings.create(model=MODEL, input="a king").data[0].embedding)
