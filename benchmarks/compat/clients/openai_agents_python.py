from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI
from trial import KEY, MODEL, URL, check, trial

set_tracing_disabled(True)
for model in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
    @trial(f"Runner.run_sync, {model.__name__}")
    def _(model=model):
        client = AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120)
        agent = Agent(name="Teller", instructions="Tell tales.", model_settings=ModelSettings(max_tokens=16),
                      model=model(model=MODEL, openai_client=client))
        check(Runner.run_sync(agent, "Of a king.").final_output)
