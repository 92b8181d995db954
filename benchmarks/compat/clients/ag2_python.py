import asyncio

from ag2 import Agent
from ag2.config import OpenAIConfig
from trial import KEY, MODEL, URL, check, trial


@trial("Agent.ask")
def _():
    config = OpenAIConfig(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, max_tokens=8)
    check(asyncio.run(Agent("teller", prompt="Tell tales.", config=config).ask("Of a king.")).body)
