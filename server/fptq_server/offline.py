"""Answers a file of requests without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fptq_runtime.artifact.files import open_file
from fptq_runtime.engine.request import ANYONE
from fptq_runtime.errors import FptqError
from fptq_runtime.progress import progress_bar
from fptq_server.batch import Answers, BatchRequest, BatchRunner, Problem, check_batch, read_batch
from fptq_server.config import ServerConfig
from fptq_server.main import load_app


@dataclass(frozen=True)
class BatchResult:
    """Of the lines of a batch. resumed: those that had an answer before; failed: whose answer's status is not 200."""

    lines: int
    resumed: int
    failed: int


def answer_file(path: Path, requests: Path, out: Path, config: ServerConfig, *, model_names: Sequence[str] = (),
                progress: bool = False, **options: Any) -> BatchResult:
    """Write the answer to each line of `requests` into `out`, in the order in which they end; what has one there gets
    none again. options: those of main.load_app. Raises FptqError, for the first line that is no request too."""
    with open_file(requests) as source:
        lines, problems = check_batch(source)
        if problems:
            where = str(requests) if problems[0].line is None else f"{requests}, line {problems[0].line}"
            raise FptqError(f"{where}: {problems[0].message}")
        answers = Answers(out)
        try:
            resumed = len(answers)
            todo = [request.custom_id for request in _requests(source) if request.custom_id not in answers]
            if len(todo) + resumed != lines:
                raise FptqError(f"{out} holds answers to other requests than those of {requests}; choose another name")
            if todo:
                with progress_bar(unit="line", total=lines, initial=resumed, shown=progress) as bar:
                    loaded = load_app(path, config, model_names or [path.resolve().name], **options)

                    def write(answer: dict[str, Any]) -> None:
                        answers.write(answer)
                        bar.update()

                    async def run() -> None:
                        runner: BatchRunner = loaded.app.state.batches
                        left = (request for request in _requests(source) if request.custom_id not in answers)
                        async with loaded.app.router.lifespan_context(loaded.app):
                            await runner.run(left, ANYONE, write, asyncio.Event())

                    asyncio.run(run())
        finally:
            answers.close()
    return BatchResult(lines, resumed, len(answers.failed))


def _requests(source: Any) -> Iterator[BatchRequest]:
    """Of a file that was checked."""
    for number, request in read_batch(source):
        if isinstance(request, Problem):
            raise FptqError(f"line {number} has changed: {request.message}")
        yield request
