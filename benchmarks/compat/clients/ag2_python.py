from autogen import ConversableAgent
from trial import KEY, MODEL, URL, check, trial


@trial("ConversableAgent.generate_reply")
def _():
    where = {"model": MODEL, "base_url": f"{URL}/v1", "api_key": KEY, "api_type": "openai", "max_tokens": 8,
             "max_retries": 0, "price": [0, 0]}
    agent = ConversableAgent("teller", llm_config={"config_list": [where], "cache_seed": None},
                             human_input_mode="NEVER")
    check(agent.generate_reply([{"role": "user", "content": "Tell me of a king."}]))
