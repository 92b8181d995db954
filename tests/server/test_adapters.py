"""Adapters as clients see them: models by name, loaded and dropped by vLLM's routes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from fptq_runtime.locate import DEMO_MODEL
from fptq_server.config import ServerConfig
from tests.models.peft_files import save_lora
from tests.server.conftest import Served

MESSAGES: Any = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    save_lora(AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32), path)
    return path


@pytest.fixture(scope="module")
def served(run_server: Callable[..., Any]) -> Iterator[Served]:
    with run_server(ServerConfig(allow_runtime_lora_updating=True), max_loras=2) as served:
        yield served


def post(served: Served, what: str, **body: Any) -> tuple[int, str]:
    answer = served.http.post(f"/v1/{what}_lora_adapter", json=body)
    return answer.status_code, answer.text


def test_an_adapter_comes_and_goes(served: Served, saved: Path) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        def ask(model: str) -> Any:
            return client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, temperature=0)

        plain = ask("demo")
        assert post(served, "load", lora_name="tales", lora_path=str(saved)) == (
            200, "Success: LoRA adapter 'tales' added successfully.")
        assert [(model.id, getattr(model, "parent", None)) for model in client.models.list()] == [
            ("demo", None), ("tales", "demo")]
        assert client.models.retrieve("tales").id == "tales"
        adapted = ask("tales")
        assert adapted.model == "tales"
        assert adapted.choices[0].message.content != plain.choices[0].message.content
        assert ask("demo").choices == plain.choices
        text = adapted.choices[0].message.content
        prompt = served.http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
        completion = client.completions.create(model="tales", prompt=prompt, max_tokens=12, temperature=0)
        assert (completion.model, completion.choices[0].text) == ("tales", text)
        response = client.responses.create(model="tales", input="Once upon a time", max_output_tokens=12, temperature=0)
        assert (response.model, response.output_text) == ("tales", text)
        message = served.http.post("/v1/messages", json={
            "model": "tales", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}).json()
        assert (message["model"], message["content"][0]["text"]) == ("tales", text)
        generated = served.http.post("/generate", json={
            "inputs": "Once", "parameters": {"max_new_tokens": 8, "adapter_id": "tales"}}).json()
        assert generated != served.http.post("/generate", json={
            "inputs": "Once", "parameters": {"max_new_tokens": 8}}).json()
        vectors = [client.embeddings.create(model=name, input="Once").data[0].embedding for name in ("demo", "tales")]
        assert vectors[0] != vectors[1]
        status, text = post(served, "load", lora_name="tales", lora_path=str(saved))
        assert (status, "is loaded already" in text) == (400, True)
        assert post(served, "unload", lora_name="tales")[0] == 200
        with pytest.raises(openai.NotFoundError, match="the model tales does not exist; this server has demo"):
            ask("tales")
        assert post(served, "unload", lora_name="tales")[0] == 404


def test_what_cannot_be_loaded(served: Served, saved: Path, tmp_path: Path) -> None:
    for body, message in [
        ({"lora_name": "demo", "lora_path": str(saved)}, "demo is the model's own name"),
        ({"lora_name": "x", "lora_path": str(tmp_path)}, "is no directory with an adapter_config.json"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "x", "lora_path": str(saved), "load_inplace": True}, "load_inplace"),
    ]:
        status, text = post(served, "load", **body)
        assert (status, message in text) == (400, True), text
    answer = served.http.post("/generate", json={"inputs": "a", "parameters": {"adapter_id": "nobody"}})
    assert (answer.status_code, "there is no adapter nobody" in answer.text) == (404, True)


def test_the_routes_need_their_flag(run_server: Callable[..., Any], saved: Path) -> None:
    with run_server(max_loras=1) as served:
        assert post(served, "load", lora_name="x", lora_path=str(saved))[0] == 404
