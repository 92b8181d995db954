"""Task accuracy through the engine that serves: multiple choice, last words, and any task of lm-eval."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fptq_runtime.engine.llm import LLM
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.errors import FptqError
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.progress import progress_bar

PER_CALL = 64  # sequences given to the engine at a time, which bounds what is held of their logprobs
MAX_NEW_TOKENS = 256  # of a generated answer, unless the task says otherwise

Pair = tuple[list[int], list[int]]  # what is given, and what is scored after it


class TaskError(FptqError):
    """A task that cannot be run. One line, for the user."""


@dataclass(frozen=True)
class Choices:
    """accuracy: the right choice has the largest log-likelihood; normalized: divided by its characters, as lm-eval's
    acc_norm."""

    file: str
    questions: int
    accuracy: float
    accuracy_normalized: float


@dataclass(frozen=True)
class LastWords:
    """accuracy: every token of the last word is the most likely one; perplexity: exp of minus the mean log-likelihood
    of a last word, as in lm-eval's lambada."""

    file: str
    texts: int
    accuracy: float
    perplexity: float


class Scorer:
    """Log-likelihoods, in nats, of what follows a context."""

    def __init__(self, llm: LLM, progress: bool = False) -> None:
        self.llm = llm
        self.progress = progress
        self.max_length = llm.engine.config.max_model_len

    @property
    def tokenizer(self) -> Tokenizer:
        return self.llm.engine.tokenizer

    @property
    def prefix(self) -> int:
        """What stands before a text without a context: BOS, else the end of a text before. Raises TaskError."""
        candidates = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id,
                      *self.llm.engine.model_config.eos_token_ids)
        prefix = next((token_id for token_id in candidates if token_id is not None), None)
        if prefix is None:
            raise TaskError("this model has neither a BOS nor an EOS token to begin a text with; give every context")
        return prefix

    def pair(self, context: str, continuation: str) -> Pair:
        """The tokens of `continuation` are those that the whole text has beyond its context's; spaces that end the
        context belong to the continuation, as in lm-eval."""
        if not context:
            return [self.prefix], self.tokenizer.encode(continuation, add_special_tokens=False)
        kept = context.rstrip()
        if not kept:
            return [self.prefix], self.tokenizer.encode(context + continuation, add_special_tokens=False)
        given = self.tokenizer.encode(kept)
        return given, self.tokenizer.encode(context + continuation)[len(given) :]

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Of each pair: the sum over the second part's tokens, and whether each of them was the most likely one. What
        exceeds the model's context is cut from the left."""
        scored: list[tuple[float, bool]] = []
        params = SamplingParams(max_tokens=0, prompt_logprobs=1)
        for part in self._parts(pairs, "scoring"):
            prompts = [[*given, *rest][-self.max_length :] for given, rest in part]
            for (_, rest), [completion] in zip(part, self.llm.generate(prompts, params), strict=True):
                entries = [entry for entry in completion.prompt_logprobs[-len(rest) :] if entry] if rest else []
                scored.append((math.fsum(entry.logprob for entry in entries),
                               all(entry.top[0][0] == entry.token_id for entry in entries)))
        return scored

    def generate(self, prompts: Sequence[tuple[str, SamplingParams]]) -> list[str]:
        """Each prompt's answer; prompts are cut from the left where the answer would not fit."""
        answers: list[str] = []
        for part in self._parts(prompts, "generating"):
            params = [each for _, each in part]
            ids = [self.tokenizer.encode(text)[-max(1, self.max_length - each.max_tokens) :] for text, each in part]
            answers += [completion.text for [completion] in self.llm.generate(ids, params)]
        return answers

    def _parts(self, items: Sequence[Any], label: str) -> Iterator[Sequence[Any]]:
        with progress_bar(total=len(items), desc=label, unit="text", shown=self.progress) as bar:
            for start in range(0, len(items), PER_CALL):
                part = items[start : start + PER_CALL]
                yield part
                bar.update(len(part))


def choices(scorer: Scorer, file: Path) -> Choices:
    """Multiple choice: lines of {"context" or "question": text, "choices": [texts], "answer": index}. Raises TaskError
    that names the line."""
    questions = [_question(line, where) for line, where in _json_lines(file)]
    pairs = [scorer.pair(context, _spaced(context, choice)) for context, offered, _ in questions for choice in offered]
    scores = iter(scorer.loglikelihoods(pairs))
    right = normalized = 0
    for _, offered, answer in questions:
        values = [next(scores)[0] for _ in offered]
        right += _argmax(values) == answer
        normalized += _argmax([value / len(text) for value, text in zip(values, offered, strict=True)]) == answer
    return Choices(file.name, len(questions), right / len(questions), normalized / len(questions))


def last_words(scorer: Scorer, file: Path) -> LastWords:
    """LAMBADA's task: lines of {"text": …} whose last word is to be predicted. Raises TaskError that names the line."""
    pairs = []
    for line, where in _json_lines(file):
        text = line.get("text")
        if not isinstance(text, str) or len(text.split()) < 2:
            raise TaskError(f'{where}: "text" must be a text of two words or more')
        context, word = text.rstrip().rsplit(maxsplit=1)
        pairs.append(scorer.pair(context, f" {word}"))
    scores = scorer.loglikelihoods(pairs)
    mean = math.fsum(value for value, _ in scores) / len(scores)
    return LastWords(file.name, len(scores), sum(greedy for _, greedy in scores) / len(scores), math.exp(-mean))


def lm_eval_tasks(scorer: Scorer, tasks: Sequence[str], limit: int | None = None) -> dict[str, dict[str, float]]:
    """The metrics of lm-eval tasks by task: each a YAML file, or the name of one that comes with lm-eval (which may
    want to download its data). A file may include and call what lies in its directory. Raises TaskError."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise TaskError("--task needs lm-eval: pip install 'fptq-serve[eval]'") from None
    results: dict[str, dict[str, float]] = {}
    for task in tasks:
        path = Path(task)
        name = _task_name(path) if path.is_file() else task
        try:
            manager = TaskManager(include_path=str(path.parent), include_defaults=False) if path.is_file() \
                else TaskManager()
            answer = simple_evaluate(_language_model(scorer), tasks=[name], task_manager=manager, limit=limit,
                                     bootstrap_iters=0, log_samples=False)
        except TaskError:
            raise
        except Exception as error:  # whatever a task's own code and its data raise
            raise TaskError(f"lm-eval cannot run {task}: {type(error).__name__}: {error}") from error
        for each, metrics in answer["results"].items():
            results[each] = {key.removesuffix(",none"): value for key, value in metrics.items()
                             if isinstance(value, float) and "stderr" not in key}
    return results


def accuracies(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The metric that says most of each task: the first of acc, exact_match, …, or else its first."""
    preferred = ("acc", "exact_match", "acc_norm")
    return {task: next((values[key] for key in preferred if key in values), next(iter(values.values())))
            for task, values in metrics.items() if values}


def _language_model(scorer: Scorer) -> Any:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class ServedModel(TemplateLM):  # type: ignore[misc]
        """lm-eval's own splitting of texts over our scores."""

        @property
        def eot_token_id(self) -> int:
            return scorer.prefix

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return scorer.tokenizer.encode(string, add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return scorer.loglikelihoods([(given, rest) for _, given, rest in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(self.tok_encode(text, False), self.prefix_token_id,
                                                    scorer.max_length - 1, 1)
                totals.append(math.fsum(value for value, _ in scorer.loglikelihoods(
                    [make_disjoint_window(window) for window in windows])))
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return scorer.generate([(text, _generation(settings)) for text, settings in (r.args for r in requests)])

        @property
        def tokenizer_name(self) -> str:
            return "fptq"

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            raise TaskError("tasks in a chat template are not supported; run them through the server")

    return ServedModel()


def _generation(settings: Mapping[str, Any]) -> SamplingParams:
    until = settings.get("until") or []
    temperature = float(settings.get("temperature") or 0) if settings.get("do_sample") else 0.0
    return SamplingParams(
        max_tokens=int(settings.get("max_gen_toks") or MAX_NEW_TOKENS), temperature=temperature,
        top_p=float(settings.get("top_p") or 1), seed=0,
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )


def _task_name(path: Path) -> str:
    """Without constructing values: `!function` names code."""
    try:
        node = yaml.compose(path.read_text("utf-8"), yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    fields = {key.value: value.value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}
    name = fields.get("group", fields.get("task"))
    if not isinstance(name, str):
        raise TaskError(f"{path} is no lm-eval task: it must hold a mapping with 'task'")
    return name


def _json_lines(file: Path) -> Iterable[tuple[dict[str, Any], str]]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise TaskError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not any(line.strip() for line in lines):
        raise TaskError(f"{file} is empty; it must hold one JSON object a line")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise TaskError(f"{file}:{number} is not JSON: {error}") from None
            if not isinstance(value, dict):
                raise TaskError(f"{file}:{number} must be a JSON object")
            yield value, f"{file}:{number}"


def _question(line: Mapping[str, Any], where: str) -> tuple[str, list[str], int]:
    context = line.get("context", line.get("question"))
    offered, answer = line.get("choices"), line.get("answer")
    if not isinstance(context, str):
        raise TaskError(f'{where}: "context" (or "question") must be a text')
    if not isinstance(offered, list) or len(offered) < 2 or not all(isinstance(c, str) and c.strip() for c in offered):
        raise TaskError(f'{where}: "choices" must be two texts or more')
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(offered):
        raise TaskError(f'{where}: "answer" must be the index of a choice, 0 to {len(offered) - 1}')
    return context, offered, answer


def _spaced(context: str, choice: str) -> str:
    return choice if not context or context[-1].isspace() or choice[0].isspace() else f" {choice}"


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
