import pydantic
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from trial import KEY, MODEL, URL, check, trial

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY))
settings = {"max_tokens": 300, "temperature": 0}


class Person(pydantic.BaseModel, extra="forbid"):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=99)


@trial("text")
def _():
    check(Agent(model).run_sync("Tell me of a king.", model_settings={"max_tokens": 8}).output)


for kind in (ToolOutput, NativeOutput):
    @trial(kind.__name__)
    def _(kind=kind):
        answer = Agent(model, output_type=kind(Person), retries=0).run_sync("Who is king?", model_settings=settings)
        check(isinstance(answer.output, Person))
