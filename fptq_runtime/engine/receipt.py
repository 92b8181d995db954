"""What an answer was made of and with, so that it can be computed again: token by token, as bits depend on nothing
else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fptq_runtime.artifact.files import read_file
from fptq_runtime.config import Activations, KVCacheDtype
from fptq_runtime.engine.grammar import Grammar
from fptq_runtime.engine.llm import LLM
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.errors import FptqError

MOST = 64 << 20  # bytes of a receipt
OPTIONS = ("activations", "kv_cache_dtype", "block_size", "max_model_len", "close_structured")  # of `Engine.identity`


@dataclass(frozen=True)
class Replay:
    choices: int
    tokens: int


def receipt(made_by: Mapping[str, Any], prompts: Sequence[Sequence[int]], params: SamplingParams,
            choices: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Of the tokens of each choice, params.n of each prompt. made_by: the engine's identity. params: with a seed."""
    return {"made_by": dict(made_by), "prompt_token_ids": [list(prompt) for prompt in prompts],
            "params": _written(replace(params, prediction=())),
            "choices": [_choice(choice) for choice in choices]}


def replay(path: Path, file: Path, **options: Any) -> Replay:
    """Compute the answers of a receipt, or of a response that has one, again. path: the artifact. options: the engine's
    backend, device and threads. Raises FptqError where the receipt is of something else, or an answer differs."""
    given = read_receipt(file)
    made_by, expected = given["made_by"], given["choices"]
    llm = LLM(path, **{name: made_by[name] for name in OPTIONS}, **options)
    ours = llm.engine.identity or {}
    for name in made_by:
        if made_by[name] != ours.get(name):
            raise FptqError(f"{file}: its {name} is {made_by[name]}, here it is {ours.get(name)}: answers are the "
                            "same for the same artifact, kernels and options alone")
    answers = llm.generate(given["prompt_token_ids"], given["params"])
    got = [_choice(one.token_ids) for answer in answers for one in answer]
    if len(got) != len(expected):
        raise FptqError(f"{file} has {len(expected)} choices, its prompts and n ask for {len(got)}")
    for i, (mine, wanted) in enumerate(zip(got, expected, strict=True)):
        if mine != wanted:
            raise FptqError(f"{file}: choice {i} has other tokens: {mine['tokens']} of sha256 {mine['sha256']}, not "
                            f"{wanted['tokens']} of {wanted['sha256']}")
    return Replay(len(got), sum(one["tokens"] for one in got))


def _choice(token_ids: Sequence[int]) -> dict[str, Any]:
    return {"tokens": len(token_ids), "sha256": hashlib.sha256(np.asarray(token_ids, "<u4").tobytes()).hexdigest()}


def read_receipt(file: Path) -> dict[str, Any]:
    """As `receipt` made it, but params are SamplingParams. Raises FptqError, in one line that names what is wrong."""
    try:
        data = json.loads(read_file(file, MOST), parse_constant=_no_number)
        if isinstance(data, dict) and "receipt" in data:
            data = data["receipt"]
        checked: dict[str, Any] = _RECEIPT(data, "the receipt")
        said = checked["params"]
        if "seed" not in said:
            raise ValueError("params.seed is missing")
        if "logit_bias" in said:
            said["logit_bias"] = {int(token): bias for token, bias in said["logit_bias"].items()}
        if "structured" in said:
            said["structured"] = Grammar(**said["structured"])
        if "shown_special_tokens" in said:
            said["shown_special_tokens"] = frozenset(said["shown_special_tokens"])
        try:
            return {**checked, "params": SamplingParams(**said)}
        except FptqError as error:
            raise ValueError(f"params.{error}") from None
    except (ValueError, RecursionError) as error:
        raise FptqError(f"{file} is no receipt: {error}") from None


_Check = Callable[[Any, str], Any]


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _that(kind: str, holds: Callable[[Any], bool]) -> _Check:
    def check(value: Any, where: str) -> Any:
        if not holds(value):
            shown = json.dumps(value)
            raise ValueError(f"{where} must be {kind}, not {shown if len(shown) <= 60 else shown[:60] + '…'}")
        return value

    return check


def _integer(low: int, high: int) -> _Check:
    return _that(f"an integer within {low}..{high}", lambda value: type(value) is int and low <= value <= high)


def _one_of(*values: str) -> _Check:
    return _that(" or ".join(values), lambda value: value in values)


def _list(each: _Check) -> _Check:
    def check(value: Any, where: str) -> Any:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list")
        return tuple(each(item, f"{where}[{i}]") for i, item in enumerate(value))

    return check


def _object(known: Mapping[str, _Check], needed: bool = True) -> _Check:
    """With no other names, and where `needed` all of these."""
    def check(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object")
        inside = "" if where == "the receipt" else f"{where}."
        for name in value:
            if name not in known:
                raise ValueError(f"{where} has {json.dumps(name[:60])}, which no receipt has")
        for name in known:
            if needed and name not in value:
                raise ValueError(f"{inside}{name} is missing")
        return {name: known[name](item, inside + name) for name, item in value.items()}

    return check


def _biases(value: Any, where: str) -> Any:
    if not isinstance(value, dict) or not all(re.fullmatch(r"[0-9]{1,9}", token) for token in value):
        raise ValueError(f"{where} must be an object of token ids")
    return {token: _NUMBER(bias, f"{where}.{token}") for token, bias in value.items()}


_TEXT = _that("a string", lambda value: isinstance(value, str))
_NAME = _that("a name", lambda value: isinstance(value, str) and re.fullmatch("[ -~]{1,200}", value) is not None)
_FLAG = _that("true or false", lambda value: isinstance(value, bool))
_NUMBER = _that("a number", lambda value: type(value) in (int, float) and abs(value) < 1e9)
_COUNT, _TOKEN = _integer(0, 1 << 30), _integer(0, (1 << 31) - 1)
_HASH = _that("a SHA-256", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None)
_RECEIPT = _object({
    "made_by": _object({
        "artifact": _NAME, "version": _NAME, "kernels": _NAME, "activations": _one_of(*get_args(Activations)),
        "kv_cache_dtype": _one_of(*get_args(KVCacheDtype)), "block_size": _COUNT, "max_model_len": _COUNT,
        "close_structured": _FLAG}),
    "prompt_token_ids": _list(_list(_TOKEN)),
    "params": _object({
        **dict.fromkeys(("n", "max_tokens", "min_tokens", "top_k", "logprobs", "prompt_logprobs"), _COUNT),
        **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                         "frequency_penalty"), _NUMBER),
        **dict.fromkeys(("ignore_eos", "skip_special_tokens"), _FLAG),
        **dict.fromkeys(("stop_token_ids", "shown_special_tokens"), _list(_TOKEN)),
        "seed": _integer(-(1 << 63), (1 << 64) - 1), "stop": _list(_TEXT), "logit_bias": _biases,
        "structured": _object({"kind": _one_of("json_schema", "regex", "lark"), "text": _TEXT}),
    }, needed=False),
    "choices": _list(_object({"tokens": _COUNT, "sha256": _HASH})),
})


def _written(params: SamplingParams) -> dict[str, Any]:
    """What is not at its default, as JSON has it."""
    default, said = SamplingParams(), {}
    for field in fields(params):
        value = getattr(params, field.name)
        if value != getattr(default, field.name):
            said[field.name] = vars(value) if isinstance(value, Grammar) else \
                sorted(value) if isinstance(value, frozenset) else value
    return json.loads(json.dumps(said))  # type: ignore[no-any-return]
