"""Answers a question from text files and cites them: python rag.py QUESTION FILE… [--model NAME]

Paragraphs are ranked by BM25, the best go into the prompt with numbers, and the answer comes as sentences that each
cite at least one of these numbers: its schema admits no others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

from openai import APIConnectionError, OpenAI


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def best(question: str, passages: list[str], count: int, k1: float = 1.2, b: float = 0.75) -> list[str]:
    """The passages that Okapi BM25 ranks highest."""
    counts = [Counter(words(passage)) for passage in passages]
    lengths = [sum(count.values()) for count in counts]
    mean = sum(lengths) / len(lengths)

    def score(index: int) -> float:
        found, total = counts[index], 0.0
        for word in set(words(question)):
            having = sum(word in other for other in counts)
            rarity = math.log(1 + (len(counts) - having + 0.5) / (having + 0.5))
            total += rarity * found[word] * (k1 + 1) / (found[word] + k1 * (1 - b + b * lengths[index] / mean))
        return total

    return [passages[index] for index in sorted(range(len(passages)), key=score, reverse=True)[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model")
    args = parser.parse_args()

    paragraphs = [paragraph.strip() for file in args.files for paragraph in file.read_text().split("\n\n")]
    cited = best(args.question, [paragraph for paragraph in paragraphs if paragraph], count=3)
    sources = "\n".join(f"[{number}] {passage[:600]}" for number, passage in enumerate(cited, 1))
    sentence = {
        "type": "object",
        "properties": {
            "text": {"type": "string", "minLength": 1, "maxLength": 200},
            "sources": {"type": "array", "items": {"enum": list(range(1, len(cited) + 1))}, "minItems": 1,
                        "maxItems": len(cited)},
        },
        "required": ["text", "sources"],
        "additionalProperties": False,
    }
    schema = {"type": "object", "properties": {"sentences": {"type": "array", "items": sentence, "minItems": 1,
                                                             "maxItems": 3}},
              "required": ["sentences"], "additionalProperties": False}

    client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
    answer = client.chat.completions.create(
        model=args.model or client.models.list().data[0].id,
        messages=[{"role": "user", "content": f"{sources}\n\nAnswer from these sources alone, and cite them.\n"
                                              f"Question: {args.question}"}],
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        max_tokens=400,
        temperature=0,
    )
    for said in json.loads(answer.choices[0].message.content or "")["sentences"]:
        print(said["text"].strip(), *(f"[{number}]" for number in sorted(set(said["sources"]))))
    print(f"\n{sources}")


if __name__ == "__main__":
    try:
        main()
    except APIConnectionError as error:
        sys.exit(f"no server at {error.request.url}; `fptq serve ARTIFACT` starts one")
