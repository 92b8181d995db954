"""Responses that a later request can name: in memory, or in a file that outlives the server."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fptq_runtime.errors import FptqError

MAX_BYTES = 64 << 20  # of all responses in memory, and ten times that in a file; the oldest go first


@dataclass(frozen=True)
class StoredResponse:
    """response: as clients get it. history: the items of the turns before it; input: those of its own turn."""

    response: dict[str, Any]
    history: list[dict[str, Any]]
    input: list[dict[str, Any]]

    @property
    def items(self) -> list[dict[str, Any]]:
        """What a request that goes on from here begins with."""
        return [*self.history, *self.input, *self.response["output"]]


class ResponseStore:
    """path: of the file; in memory where it is None. Raises FptqError where the file cannot be used."""

    def __init__(self, path: Path | None = None) -> None:
        self._max_bytes = MAX_BYTES if path is None else 10 * MAX_BYTES
        try:
            self._database = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS responses "
                                   "(number INTEGER PRIMARY KEY, id TEXT UNIQUE, bytes INTEGER, json TEXT)")
            [[self._bytes]] = self._database.execute("SELECT TOTAL(bytes) FROM responses")
        except sqlite3.Error as error:
            raise FptqError(f"{path} cannot keep responses: {error}", "responses_db") from None

    def put(self, stored: StoredResponse) -> None:
        """A response again takes its own place."""
        text = json.dumps({"response": stored.response, "history": stored.history, "input": stored.input})
        self.delete(stored.response["id"])
        self._database.execute("INSERT INTO responses (id, bytes, json) VALUES (?, ?, ?)",
                               (stored.response["id"], len(text), text))
        self._bytes += len(text)
        while self._bytes > self._max_bytes:
            [[oldest]] = self._database.execute("SELECT id FROM responses ORDER BY number LIMIT 1")
            self.delete(oldest)

    def get(self, response_id: str) -> StoredResponse | None:
        rows = self._database.execute("SELECT json FROM responses WHERE id = ?", (response_id,)).fetchall()
        return StoredResponse(**json.loads(rows[0][0])) if rows else None

    def find_item(self, item_id: str) -> dict[str, Any] | None:
        """An item of any response's input or output, the latest first."""
        for (text,) in self._database.execute("SELECT json FROM responses WHERE instr(json, ?) ORDER BY number DESC",
                                              (json.dumps(item_id),)):
            for item in StoredResponse(**json.loads(text)).items:
                if item.get("id") == item_id:
                    return item
        return None

    def delete(self, response_id: str) -> bool:
        """Whether it was there."""
        rows = self._database.execute("DELETE FROM responses WHERE id = ? RETURNING bytes", (response_id,)).fetchall()
        self._bytes -= sum(size for (size,) in rows)
        return bool(rows)

    def close(self) -> None:
        self._database.close()
