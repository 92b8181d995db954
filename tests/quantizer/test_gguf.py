"""A GGUF file where a model is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer as Tokenizers

from fptq_runtime.artifact.io import hash_file
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.locate import find_artifact, find_model
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.pipeline import quantize
from tests.models.gguf_files import write_gguf
from tests.quantizer.models import DEMO, through_the_gate
from tests.quantizer.test_pipeline import SMALL

TEXTS = ("Once upon a time, there was a king.", "  two spaces\n\n\tand émigrés 漢字 😀", "It's 12345.678")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_it_is_a_directory_with_its_tokenizer_and_template(tmp_path: Path) -> None:
    file = tmp_path / "tales.gguf"
    write_gguf(DEMO, file, "llama", Type.Q4_0)
    path = find_artifact(str(file))
    assert find_artifact(find_model(str(file))) == path
    ours, theirs = Tokenizer(path), Tokenizers.from_file(str(DEMO / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False).ids
    messages = [{"role": "user", "content": "Once upon a time"}]
    assert ours.apply_chat_template(messages) == Tokenizer(DEMO).apply_chat_template(messages)
    assert Checkpoint(path).quantized
    write_gguf(DEMO, file, "llama", Type.F16)
    assert find_artifact(str(file)) != path, "another state of the file"
    assert not Checkpoint(find_artifact(str(file))).quantized


def test_the_quantizer_takes_it_for_a_float_model(tmp_path: Path) -> None:
    file = tmp_path / "tales.gguf"
    write_gguf(DEMO, file, "llama", Type.Q8_0)
    (tmp_path / "text.txt").write_text("Once upon a time there was a king, and the king had three sons. " * 20)
    manifest = quantize(file, tmp_path / "out", "rtn", text=tmp_path / "text.txt", **SMALL)
    assert manifest.quality.perplexity_after < 2 * manifest.quality.perplexity_before
    assert manifest.provenance.source == "tales"
    assert manifest.provenance.source_files["tales.gguf"] == hash_file(file)
    through_the_gate(tmp_path / "out", manifest, ReferenceBackend())


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(FptqError, match=r"model\.gguf") as error:
        find_artifact(str(tmp_path / "model.gguf"))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("config.json"))
