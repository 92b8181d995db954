import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import openai
from trial import KEY, MESSAGES, MODEL, PROMPT, SCHEMA, TOOL, URL, check, trial

MASTER = "sk-compat"
with socket.create_server(("127.0.0.1", 0)) as probe:
    port = probe.getsockname()[1]
where = {"api_base": f"{URL}/v1", "api_key": KEY}
models = [{"model_name": name, "litellm_params": {"model": f"{provider}/{MODEL}", **where}}
          for name, provider in (("ours", "openai"), ("texts", "text-completion-openai"))]
directory = Path(tempfile.mkdtemp())
(directory / "config.yaml").write_text(json.dumps({"model_list": models, "general_settings": {"master_key": MASTER}}))
proxy = subprocess.Popen([Path(sys.executable).parent / "litellm", "--config", directory / "config.yaml", "--host",
                          "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=MASTER, max_retries=0, timeout=120)
while proxy.poll() is None:
    with suppress(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=10).close()
        break
    time.sleep(0.5)


def chat(**more):
    return client.chat.completions.create(**{"model": "ours", "messages": MESSAGES, "max_tokens": 8, **more})


@trial("chat")
def _():
    check(chat().choices[0].message.content)


@trial("chat, streamed")
def _():
    check("".join(chunk.choices[0].delta.content or "" for chunk in chat(stream=True) if chunk.choices))


@trial("completions")
def _():
    check(client.completions.create(model="texts", prompt=PROMPT, max_tokens=8).choices[0].text)


@trial("JSON schema")
def _():
    form = {"type": "json_schema", "json_schema": {"name": "king", "schema": SCHEMA, "strict": True}}
    check(set(json.loads(chat(response_format=form, max_tokens=100).choices[0].message.content)) == {"name", "age"})


@trial("tools, required, streamed")
def _():
    parts = [call.function.arguments or "" for chunk in chat(tools=[TOOL], tool_choice="required", max_tokens=100,
             stream=True) for choice in chunk.choices for call in choice.delta.tool_calls or [] if call.index == 0]
    check(json.loads("".join(parts))["city"])


@trial("responses")
def _():
    check(client.responses.create(model="ours", input="Tell me of a king.", max_output_tokens=8).output_text)


@trial("embeddings")
def _():
    check(client.embeddings.create(model="ours", input=["a king", "a queen"]).data[1].embedding)


@trial("its health check of ours")
def _():
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/health", headers={"Authorization": f"Bearer {MASTER}"})
    with urllib.request.urlopen(asked, timeout=120) as answer:
        check(not json.load(answer)["unhealthy_endpoints"], "unhealthy")


proxy.terminate()
proxy.wait(30)
