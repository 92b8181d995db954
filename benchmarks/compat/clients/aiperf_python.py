import os
import shutil
import tempfile
from pathlib import Path

from command import run
from trial import MODEL, URL, check, trial

# It takes no tokenizer from a folder, only from the hub's cache: this is one.
cache = Path(tempfile.mkdtemp())
model, commit = cache / "hub" / "models--fptq--demo", "0" * 40
(model / "refs").mkdir(parents=True)
(model / "refs" / "main").write_text(commit)
shutil.copytree(os.environ["FPTQ_TOKENIZER"], model / "snapshots" / commit)
os.environ["HF_HOME"] = str(cache)


def profile(kind, *more):
    answer = run("aiperf", "profile", "--model", MODEL, "--url", URL, "--endpoint-type", kind, "--tokenizer",
                 "fptq/demo", "--request-count", "4", "--concurrency", "2", "--synthetic-input-tokens-mean", "32",
                 "--output-tokens-mean", "8", "--ui", "none", *more)
    check("Request Throughput" in answer, answer[-200:])


@trial("chat, streamed")
def _():
    profile("chat", "--streaming")


@trial("completions")
def _():
    profile("completions")


@trial("embeddings")
def _():
    profile("embeddings")


shutil.rmtree(cache)
