"""From sequences to a sampler's arrays and back: what a request's parameters mean for each draw."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable

import numpy as np

from fptq_runtime.engine.output import TokenLogprobs
from fptq_runtime.engine.sequence import Sequence
from fptq_runtime.kernels.base import PARAMETERS, SampleInput, SampleOutput, UInt32Array

NOT_FINITE = "the model returned logits that are not finite"


class Sampling:
    """What all draws of one sequence share."""

    def __init__(self, sequence: Sequence, eos_token_ids: Iterable[int]) -> None:
        params = sequence.params
        self.parameters = np.array(
            (sequence.seed & (1 << 64) - 1, params.temperature, params.top_p, params.min_p, params.repetition_penalty,
             params.presence_penalty, params.frequency_penalty, min(params.top_k, 1 << 62)), PARAMETERS).tobytes()
        self.penalized = (params.repetition_penalty != 1 or params.presence_penalty != 0
                          or params.frequency_penalty != 0)
        self.bias = dict(params.logit_bias)
        early = params.min_tokens and params.structured is None  # else the masks say where an end may come
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)} if early else ()
        self.early_bias = {**self.bias, **dict.fromkeys(ends, -np.inf)}  # before min_tokens are out


NO_MASKS = np.zeros((0, 0), np.uint32)
_SCORED = np.array((0, 1, 1, 0, 1, 0, 0, 0), PARAMETERS).tobytes()


class SampleBatch:
    """Collects the draws of one step, by ascending row of its logits. masks: SampleInput's."""

    def __init__(self, masks: UInt32Array = NO_MASKS) -> None:
        self._masks = masks
        self._parameters: list[bytes] = []
        self._rows = array("i")
        self._token_ids = array("i")
        self._positions = array("q")
        self._num_logprobs = array("i")
        self._mask_rows = array("i")
        self._bias_start = array("i", [0])
        self._bias_ids = array("i")
        self._bias_values = array("f")
        self._history_start = array("i", [0])
        self._output_start = array("i")
        self._history = array("i")

    def __len__(self) -> int:
        return len(self._rows)

    def score(self, row: int, token_id: int, num_top: int) -> None:
        """Log-probabilities of a given token."""
        self._add(row, token_id, 0, num_top, _SCORED)

    def draw(self, row: int, sequence: Sequence, sampling: Sampling, mask_row: int = -1,
             draft: tuple[int, ...] = ()) -> None:
        """The next token of a sequence, were it already followed by a draft; mask_row as SampleInput has it."""
        early = sequence.num_output_tokens + len(draft) < sequence.params.min_tokens
        if bias := sampling.early_bias if early else sampling.bias:
            self._bias_ids.extend(bias)
            self._bias_values.extend(bias.values())
        output_start = len(self._history)
        if sampling.penalized:
            self._history += sequence.token_ids
            self._history.extend(draft)
            output_start += sequence.num_prompt_tokens
        logprobs = sequence.params.logprobs
        position = sequence.num_tokens + len(draft)
        self._add(row, -1, position, -1 if logprobs is None else logprobs, sampling.parameters, output_start,
                  mask_row)

    def build(self) -> SampleInput:
        return SampleInput(
            parameters=np.frombuffer(b"".join(self._parameters), PARAMETERS),
            rows=np.frombuffer(self._rows, np.int32),
            token_ids=np.frombuffer(self._token_ids, np.int32),
            positions=np.frombuffer(self._positions, np.int64),
            num_logprobs=np.frombuffer(self._num_logprobs, np.int32),
            mask_rows=np.frombuffer(self._mask_rows, np.int32),
            masks=self._masks,
            bias_start=np.frombuffer(self._bias_start, np.int32),
            bias_ids=np.frombuffer(self._bias_ids, np.int32),
            bias_values=np.frombuffer(self._bias_values, np.float32),
            history_start=np.frombuffer(self._history_start, np.int32),
            output_start=np.frombuffer(self._output_start, np.int32),
            history=np.frombuffer(self._history, np.int32),
        )

    def _add(self, row: int, token_id: int, position: int, num_logprobs: int, parameters: bytes,
             output_start: int | None = None, mask_row: int = -1) -> None:
        self._rows.append(row)
        self._token_ids.append(token_id)
        self._positions.append(position)
        self._num_logprobs.append(num_logprobs)
        self._mask_rows.append(mask_row)
        self._parameters.append(parameters)
        self._bias_start.append(len(self._bias_ids))
        self._output_start.append(len(self._history) if output_start is None else output_start)
        self._history_start.append(len(self._history))


class SampleResult:
    """What was drawn or scored, by draw. Raises ValueError where the logits were not finite."""

    def __init__(self, output: SampleOutput, vocab_size: int) -> None:
        self._output = output
        self._vocab_size = vocab_size
        self._token_ids: list[int] = output.token_ids.tolist()

    def valid(self, draw: int) -> bool:
        return self._token_ids[draw] >= 0

    def token_id(self, draw: int) -> int:
        token_id = self._token_ids[draw]
        if token_id < 0:
            raise ValueError(NOT_FINITE)
        return token_id

    def logprobs(self, draw: int, num_top: int, masked: bool = False) -> TokenLogprobs:
        """masked: without the tokens that the mask forbids."""
        num_top = min(num_top, self._vocab_size)
        output = self._output
        top = zip(output.top_ids[draw, :num_top].tolist(), output.top_logprobs[draw, :num_top].tolist(), strict=True)
        return TokenLogprobs(self.token_id(draw), float(output.logprobs[draw]),
                             tuple(entry for entry in top if not masked or entry[1] > -math.inf))
