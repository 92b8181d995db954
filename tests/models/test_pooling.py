"""sentence-transformers' files, as its versions 3 and 6 write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fptq_runtime.errors import FptqError
from fptq_runtime.models.pooling import read_pooling

OLD = "sentence_transformers.models"


def write(path: Path, pooling: dict[str, Any], *more: str, transformer: dict[str, Any] | None = None) -> None:
    kinds = [f"{OLD}.Transformer", "sentence_transformers.sentence_transformer.modules.pooling.Pooling", *more]
    modules = [{"idx": i, "name": str(i), "path": f"{i}_{kind.rpartition('.')[2]}" if i else "", "type": kind}
               for i, kind in enumerate(kinds)]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "sentence_bert_config.json").write_text(json.dumps(transformer or {"max_seq_length": 512}))


def test_says_nothing(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == "last"


@pytest.mark.parametrize(("pooling", "expected"), [
    ({"pooling_mode": "mean", "include_prompt": True}, "mean"), ({"pooling_mode": ["lasttoken"]}, "last"),
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
    ({"pooling_mode_mean_tokens": True}, "mean"), ({"word_embedding_dimension": 8}, "mean"),
    ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
], ids=str)
def test_poolings(tmp_path: Path, pooling: dict[str, Any], expected: str) -> None:
    write(tmp_path, pooling, f"{OLD}.Normalize")
    assert read_pooling(tmp_path) == expected


@pytest.mark.parametrize(("pooling", "more", "named"), [
    ({"pooling_mode": "cls"}, [], "cls"), ({"pooling_mode": ["mean", "max"]}, [], "max"),
    ({"pooling_mode": 3}, [], "3"),
    ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, [], "max"),
    ({"pooling_mode": "mean"}, [f"{OLD}.Dense"], "Dense"),
], ids=str)
def test_refused(tmp_path: Path, pooling: dict[str, Any], more: list[str], named: str) -> None:
    write(tmp_path, pooling, *more)
    with pytest.raises(FptqError, match=named):
        read_pooling(tmp_path)


def test_a_chat_template_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, {"pooling_mode": "mean"}, transformer={"modality_config": {"text": {}, "message": {}}})
    with pytest.raises(FptqError, match="chat template"):
        read_pooling(tmp_path)


@pytest.mark.parametrize("modules", ["{", "{}", "[3]", '[{"type": "x"}]', '[{"type": "x.Pooling", "path": "../up"}]'])
def test_damaged(tmp_path: Path, modules: str) -> None:
    (tmp_path / "modules.json").write_text(modules)
    with pytest.raises(FptqError, match=r"modules\.json"):
        read_pooling(tmp_path)
