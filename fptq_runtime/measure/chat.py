"""How a model answers everyday prompts: whether its answers go round in circles, and how long they are the float
model's."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fptq_runtime.engine.llm import LLM, Completion, Prompt
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.models.chat_template import ChatTemplateError

PROMPTS = (
    "What should I cook tonight? I have rice, two eggs and some spinach.",
    "Write a short thank-you note to a neighbour who watered my plants.",
    "How do I get a coffee stain out of a white shirt?",
    "Explain to a ten-year-old why the sky is blue.",
    "Give me three ideas for a rainy Sunday with children.",
    "What is the difference between a virus and a bacterium?",
    "Translate into French: Where is the nearest train station?",
    "Write a Python function that says whether a number is prime.",
    "I cannot sleep. What can I do?",
    "Summarize the story of Romeo and Juliet in five sentences.",
    "What are the pros and cons of working from home?",
    "Plan a day in Rome for someone who likes art and food.",
    "How many minutes are there in a week?",
    "Write a limerick about a cat that is afraid of mice.",
    "My bicycle chain keeps falling off. Why, and how do I fix it?",
    "Draft an email that asks my landlord to repair the heating.",
    "Name five capital cities in South America.",
    "What should I look out for when I buy a used car?",
    "Tell me a short story about a lighthouse keeper.",
    "How do I make bread without yeast?",
)
MAX_TOKENS = 200
RUN = 8  # tokens, or words
TIMES = 4


@dataclass(frozen=True)
class Answers:
    """Of PROMPTS, greedy, MAX_TOKENS each. common_prefix: how many tokens an answer has in common with the float
    model's before it goes another way, on average; None for the float model."""

    answers: int
    looping: int
    empty: int
    common_prefix: float | None = None


def loops(items: Sequence[object]) -> bool:
    """Whether some run of RUN of the items occurs TIMES times."""
    runs = Counter(tuple(items[start : start + RUN]) for start in range(len(items) - RUN + 1))
    return max(runs.values(), default=0) >= TIMES


def answer(llm: LLM, prompts: Sequence[str]) -> list[Completion]:
    """In the model's chat template, where it has one."""
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    return [completion for [completion] in llm.generate([_prompt(llm, text) for text in prompts], params)]


def describe(given: Sequence[Completion], exact: Sequence[Completion] | None = None) -> Answers:
    """exact: the float model's answers to the same prompts."""
    return Answers(
        answers=len(given),
        looping=sum(loops(each.token_ids) or loops(each.text.split()) for each in given),
        empty=sum(not each.text.strip() for each in given),
        common_prefix=None if exact is None else sum(
            _common(a.token_ids, b.token_ids) for a, b in zip(given, exact, strict=True)) / len(given),
    )


def _prompt(llm: LLM, text: str) -> Prompt:
    try:
        return llm.engine.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    except ChatTemplateError:
        return text


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
