"""python -m benchmarks.compat: tries every client, each in its own process, and writes docs/compatibility.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import click

import fptq_runtime
from fptq_runtime import __version__

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "compatibility.md"
DEMO = Path(fptq_runtime.__file__).parent / "demo"
LONG = 65536  # tokens
MARKS = {"pass": "yes", "refused": "refused", "fail": "**fails**"}


@dataclass(frozen=True)
class Client:
    """packages: the first is the client itself, whose version is told. venv: clients of one share it. long: what it
    asks with does not fit the demo's context."""

    script: str
    packages: tuple[str, ...]
    venv: str = "python"
    long: bool = False

    @property
    def name(self) -> str:
        return f"{self.packages[0]} ({'Node' if self.script.endswith('.mjs') else 'Python'})"


CLIENTS = (
    Client("openai_python.py", ("openai",), "openai"),  # others hold it back
    Client("openai_node.mjs", ("openai",)),
    Client("anthropic_python.py", ("anthropic",)),
    Client("anthropic_node.mjs", ("@anthropic-ai/sdk",)),
    Client("litellm_python.py", ("litellm",)),
    Client("langchain_python.py", ("langchain-openai", "langchain")),
    Client("llama_index_python.py", ("llama-index-llms-openai-like",)),
    Client("instructor_python.py", ("instructor",)),
    Client("pydantic_ai_python.py", ("pydantic-ai-slim[openai]",)),
    Client("smolagents_python.py", ("smolagents[openai]",)),
    Client("dspy_python.py", ("dspy",)),
    Client("haystack_python.py", ("haystack-ai",)),
    Client("openai_agents_python.py", ("openai-agents",)),
    Client("ag2_python.py", ("ag2[openai]",), "ag2"),
    Client("ai_sdk_node.mjs", ("ai", "@ai-sdk/openai-compatible")),
    Client("huggingface_hub_python.py", ("huggingface_hub",)),
    Client("text_generation_python.py", ("text-generation",), "tgi"),  # wants an old huggingface_hub
    Client("llm_python.py", ("llm",)),
    Client("lm_eval_python.py", ("lm_eval[api]",), "lm_eval"),
    Client("litellm_proxy_python.py", ("litellm[proxy]",), "litellm_proxy"),
    Client("guidellm_python.py", ("guidellm",), "guidellm"),
    Client("aiperf_python.py", ("aiperf",), "aiperf"),
    Client("aider_python.py", ("aider-chat",), "aider", long=True),
    Client("qwen_code_node.mjs", ("@qwen-code/qwen-code",), long=True),
    Client("opencode_node.mjs", ("opencode-ai",), long=True),
)


@dataclass(frozen=True)
class Report:
    client: Client
    version: str
    trials: tuple[dict[str, str], ...]


def run(command: Sequence[str | Path], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=seconds, **options)


def install(client: Client, work: Path) -> tuple[list[Path | str], str]:
    """The command that runs the client's script, and the version. Raises RuntimeError, or what `run` does."""
    if client.script.endswith(".mjs"):
        node, npm = shutil.which("node"), shutil.which("npm")
        if node is None or npm is None:
            raise RuntimeError("Node is not installed")
        work.mkdir(parents=True, exist_ok=True)
        for script in (client.script, "trial.mjs", "command.mjs"):  # a module is looked for beside what asks for it
            shutil.copy(HERE / "clients" / script, work)
        done = run([npm, "install", "--no-audit", "--no-fund", *client.packages], 900, cwd=work)
        manifest = work / "node_modules" / client.packages[0] / "package.json"
        if done.returncode:
            raise RuntimeError(f"npm: {done.stderr.strip().splitlines()[-1:]}")
        return [node, work / client.script], str(json.loads(manifest.read_text())["version"])
    python = work / client.venv / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", work / client.venv], 300, check=True)
    done = run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *client.packages], 1800)
    if done.returncode:
        raise RuntimeError(f"pip: {done.stderr.strip().splitlines()[-1:]}")
    package = client.packages[0].partition("[")[0]
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return [python, HERE / "clients" / client.script], run([python, "-c", code], 60, check=True).stdout.strip()


def try_client(client: Client, url: str, model: str, work: Path) -> Report:
    """Whatever happens to it, a report: it never stops the others."""
    version, output, problem = "", "", ""
    try:
        command, version = install(client, work)
        done = run(command, 1800, cwd=work, env={
            **os.environ, "FPTQ_URL": url, "FPTQ_MODEL": model, "FPTQ_TOKENIZER": str(DEMO), "OPENAI_API_KEY": "none",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True"})
        output = done.stdout
        if done.returncode:
            problem = (done.stderr.strip().splitlines() or ["it ended early"])[-1]
    except subprocess.TimeoutExpired as error:
        output, problem = (error.stdout or b"").decode(), f"it did not end within {error.timeout:g} s"
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        problem = str(error)
    trials: list[dict[str, str]] = []
    for line in output.splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "tried" in entry:
                trials.append(entry)
    if problem:
        trials.append({"tried": "its script", "result": "fail", "why": problem[:300]})
    return Report(client, version, tuple(trials))


def long_demo(work: Path) -> Path:
    """The demo's weights under a context of LONG tokens, with short answers: agents ask with much and set no limit."""
    source, artifact = work / "long-source", work / "long"
    if not artifact.exists():
        shutil.copytree(DEMO, source, dirs_exist_ok=True)
        for name, fact in (("config.json", {"max_position_embeddings": LONG}),
                           ("generation_config.json", {"max_new_tokens": 64})):
            (source / name).write_text(json.dumps({**json.loads((DEMO / name).read_text()), **fact}))
        run([sys.executable, "-m", "fptq_runtime.cli", "quantize", source, artifact, "--recipe", "rtn", "--num-samples",
             "8"], 900, check=True)
    return artifact


@contextmanager
def serving(artifact: str, work: Path) -> Iterator[str]:
    """The URL of `fptq serve ARTIFACT`, which clients call demo."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with (work / "serve.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "fptq_runtime.cli", "serve", artifact, "--port", str(port),
                                   "--served-model-name", "demo"], stderr=log)
        try:
            for _ in range(600):
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10).close()
                    break
                if server.poll() is not None:
                    raise click.ClickException(f"the server did not start; see {log.name}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def page(reports: Sequence[Report], artifact: str) -> str:
    tried = [trial for report in reports for trial in report.trials]
    long = [report.client.packages[0] for report in reports if report.client.long] or ["none"]
    counts = ", ".join(f"{sum(trial['result'] == result for trial in tried)} {word}"
                       for result, word in (("pass", "work"), ("refused", "are refused by name"), ("fail", "fail")))
    lines = ["# Compatibility", "",
             f"What `make compat` found on {date.today().isoformat()}: clients as their registries have them, "
             f"unmodified, against `fptq serve {artifact}`, version {__version__}; those that ask with more than its "
             f"context holds ({', '.join(long)}) against the demo under a context of {LONG}. Of {len(tried)} things "
             f"that were tried {counts}.", ""]
    for report in reports:
        lines += [f"## {report.client.name} {report.version}".rstrip(), "", "| tried | works | |", "|---|---|---|"]
        lines += [f"| {trial['tried']} | {MARKS[trial['result']]} | {_cell(trial['why'])} |" for trial in report.trials]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """One line without what a table or a page would read as its own, and without ports and paths, which mean nothing
    elsewhere."""
    text = re.sub(r"127\.0\.0\.1:\d+", "SERVER", re.sub(r"(/[\w.@-]+){3,}", "…", text))
    return text.replace("|", "\\|").replace("<", "&lt;")[:200]


@click.command()
@click.option("--model", "artifact", default="demo", show_default=True, help="What `fptq serve` serves.")
@click.option("--only", multiple=True, help="Clients whose script's name holds this; the page is then only printed.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=Path.home() / ".cache/fptq/compat",
              help="Where the clients are installed.")
def main(artifact: str, only: tuple[str, ...], work: Path) -> None:
    """Try clients of other people against our server."""
    work.mkdir(parents=True, exist_ok=True)
    chosen = [client for client in CLIENTS if not only or any(word in client.script for word in only)]
    reports = []
    for long in (False, True):
        clients = [client for client in chosen if client.long is long]
        if not clients:
            continue
        with serving(str(long_demo(work)) if long else artifact, work) as url:
            for client in clients:
                reports.append(try_client(client, url, "demo", work))
                for trial in reports[-1].trials:
                    click.echo(f"{client.name:45} {trial['result']:8} {trial['tried']}  {trial['why']}", err=True)
    text = page(reports, artifact)
    if only:
        click.echo(text)
    else:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
