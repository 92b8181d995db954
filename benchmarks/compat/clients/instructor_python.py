import instructor
import openai
import pydantic
from trial import KEY, MESSAGES, MODEL, URL, check, trial


class Person(pydantic.BaseModel, extra="forbid"):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=99)


for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    @trial(f"mode {mode.name}")
    def _(mode=mode):
        client = instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120),
                                        mode=mode)
        check(isinstance(client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=400, temperature=0,
                                                        max_retries=0, response_model=Person), Person))
