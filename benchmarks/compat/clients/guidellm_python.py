import json
import os

from command import run
from trial import MODEL, URL, check, trial


def benchmark(route):
    answer = run("guidellm", "run", "--backend", f"kind=openai_http,target={URL},model={MODEL},request_format={route}",
                 "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=4", "--tokenizer",
                 f"kind=hf_auto,model={os.environ['FPTQ_TOKENIZER']}", "--data",
                 "kind=synthetic_text,prompt_tokens=32,output_tokens=8", "--disable-progress", read="benchmarks.json")
    counts = json.loads(answer)["benchmarks"][0]["metrics"]["request_totals"]
    check(counts["successful"] == 4, counts)


@trial("completions")
def _():
    benchmark("/v1/completions")


@trial("chat completions")
def _():
    benchmark("/v1/chat/completions")


@trial("responses")
def _():
    benchmark("/v1/responses")
