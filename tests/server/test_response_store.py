"""The store against a dict, and its bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fptq_runtime.errors import FptqError
from fptq_server import response_store
from fptq_server.response_store import ResponseStore, StoredResponse


def stored(name: str, text: str = "x") -> StoredResponse:
    response: dict[str, Any] = {"id": name, "output": [{"id": f"out_{name}", "text": text}]}
    return StoredResponse(response, [{"id": "old"}], [{"id": f"in_{name}"}])


@pytest.mark.parametrize("file", [False, True])
def test_put_get_delete(tmp_path: Path, file: bool) -> None:
    store = ResponseStore(tmp_path / "db" if file else None)
    assert store.get("a") is None
    for text in ("x", "é" * 10):
        store.put(stored("a", text))
        assert store.get("a") == stored("a", text)
    assert [item["id"] for item in stored("a").items] == ["old", "in_a", "out_a"]
    assert store.find_item("out_a") == {"id": "out_a", "text": "é" * 10}
    assert store.find_item("in_b") is None
    assert store.delete("a")
    assert not store.delete("a")
    store.put(stored("b"))
    store.close()
    assert (ResponseStore(tmp_path / "db").get("b") is not None) is file


def test_the_oldest_make_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_store, "MAX_BYTES", 1000)
    store = ResponseStore()
    for i in range(50):
        store.put(stored(str(i), "y" * 100))
    kept = [i for i in range(50) if store.get(str(i)) is not None]
    assert kept == list(range(50 - len(kept), 50))
    assert 2 <= len(kept) <= 10
    store.put(stored("huge", "y" * 5000))
    assert store.get("huge") is None
    assert store.get("49") is None


def test_an_unusable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "db").write_text("not a database, and long enough to be none at all")
    for path in (tmp_path / "db", tmp_path / "nowhere" / "db"):
        with pytest.raises(FptqError, match="db cannot keep responses"):
            ResponseStore(path)
