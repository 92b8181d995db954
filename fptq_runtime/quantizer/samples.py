"""The calibration set: where its tokens come from, and how long its windows are."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fptq_runtime.artifact.io import LengthsRecord, TextRecord
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.memory import available_memory
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.tokenizer import Tokenizer, eos_token_ids
from fptq_runtime.progress import progress_bar, tell
from fptq_runtime.quantizer.calibrate import (
    CalibrationError,
    packaged_text,
    random_windows,
    read_text,
    sample_windows,
)
from fptq_runtime.quantizer.generate import NotFiniteError, Turns, find_turns, generate_windows, writing_bytes

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 512
TRACE_COLUMNS = ("ContextTokens", "GeneratedTokens")
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class CalibrationSet:
    """What `settings` drew. tokens: where they come from. lengths: what the windows' lengths were drawn from, where not
    all are sample_length."""

    settings: Calibration
    tokens: TextRecord
    windows: list[list[int]]
    sample_length: int
    lengths: LengthsRecord | None = None


@dataclass(frozen=True)
class Calibration:
    """What calibration's windows are drawn from, how many, and how long.

    source: a text file, "random" for vocabulary tokens, "self" for what the model writes, "chat" for that and, in every
    other window, a conversation in its chat template, "tales" for the packaged text. None is "self" where that can
    matter and the float model fits the memory, else "tales".
    num_samples: windows, at least one. sample_length: tokens of each, at least two; None is 512, or the model's context
    where that is less. lengths: a request trace or a histogram, as `read_lengths` takes it; as many windows of its
    lengths as have num_samples · sample_length tokens. seed: of every draw, `qat`'s included.
    """

    source: str | Path | None = None
    num_samples: int = 32
    sample_length: int | None = None
    lengths: str | Path | None = None
    seed: int = 0

    def length(self, context: int) -> int:
        """sample_length in a model of this context."""
        return min(DEFAULT_LENGTH, context) if self.sample_length is None else self.sample_length

    def draw(self, checkpoint: Checkpoint, tokenizer: Tokenizer, matters: bool = True, progress: bool = False
             ) -> CalibrationSet:
        """For this model. matters: whether a recipe makes anything of the windows. A smaller num_samples gives the
        first windows of a larger one (with `lengths`, all but the last whole). Raises CalibrationError."""
        config = checkpoint.model_config
        context = config.max_position_embeddings
        length = self.length(context)
        if self.num_samples < 1 or length < 2:
            raise CalibrationError("calibration needs at least one sample of two tokens")
        if length > context:
            raise CalibrationError(f"samples of {length} tokens exceed the model's context of {context}")
        drawn, recorded = [length] * self.num_samples, None
        if self.lengths is not None:
            histogram = read_lengths(self.lengths)
            drawn = histogram.draw(self.num_samples * length, context, self.seed)
            recorded = histogram.record(drawn, context)
        source = self.source or ("self" if matters and _fits(checkpoint, sum(drawn)) else "tales")
        windows: list[list[int]] | None = None
        if source == "random":
            windows = random_windows(tokenizer, config.vocab_size, drawn, self.seed)
        elif source in ("self", "chat"):
            turns = find_turns(tokenizer) if source == "chat" else None
            if source == "chat" and turns is None:
                raise CalibrationError("calibration chat needs a chat template that writes what is said as it is, and "
                                       "this model has none; use self")
            try:
                windows = _written(checkpoint, tokenizer, drawn, self.seed, turns, progress)
            except NotFiniteError:
                if self.source is not None:
                    raise
                source = "tales"  # then whoever quantizes names what is damaged
        if windows is not None:
            digest = hashlib.sha256(np.concatenate(windows).astype(np.int32).tobytes()).hexdigest()
            tokens = TextRecord(name=str(source), sha256=digest, tokens=sum(drawn))
        else:
            text = packaged_text("calibration") if source == "tales" else read_text(source)
            windows, tokens = sample_windows(text, tokenizer, drawn, self.seed), text.record(sum(drawn))
        return CalibrationSet(self, tokens, windows, length, recorded)


def _fits(checkpoint: Checkpoint, tokens: int) -> bool:
    """Whether the whole float model can be run here; says so where it cannot."""
    needed, available = writing_bytes(checkpoint, tokens), available_memory()
    if available is None or needed <= available:
        return True
    logger.warning("calibrating on packaged tales: for the model to write its own samples, which suit it better, takes "
                   "%d MB of memory, and %d MB are available", needed >> 20, available >> 20)
    return False


def _written(checkpoint: Checkpoint, tokenizer: Tokenizer, lengths: Sequence[int], seed: int,
             turns: Turns | None, progress: bool) -> list[list[int]]:
    with progress_bar(total=sum(lengths), desc="writing", unit="token", shown=progress) as bar:
        if progress:
            tell(f"the model writes {len(lengths)} samples to calibrate on, {sum(lengths)} tokens; fptq quantize "
                 "--calibration tales does without")
        backend = select_backend()
        config = checkpoint.model_config
        ends = eos_token_ids(checkpoint.path, config.eos_token_ids, tokenizer, config.vocab_size) if turns else ()
        return generate_windows(load_model(checkpoint, backend), backend, tokenizer, lengths, seed, bar.update,
                                turns, ends)


@dataclass(frozen=True)
class Lengths:
    """How long the sequences of a workload are: each length once, ascending, and how many sequences have it."""

    name: str
    sha256: str
    lengths: np.ndarray
    counts: np.ndarray

    def draw(self, tokens: int, longest: int, seed: int) -> list[int]:
        """Lengths of `tokens` in all, none above `longest`; the last is cut to fit.

        Quantiles that a golden-ratio sequence picks: a few windows cover the whole distribution, and a smaller budget
        draws the same first ones.
        """
        shares = np.cumsum(self.counts) / self.counts.sum()
        place = float(np.random.default_rng(seed).random())
        drawn: list[int] = []
        while tokens >= 2:
            picked = int(self.lengths[min(int(np.searchsorted(shares, place, "right")), len(shares) - 1)])
            drawn.append(max(2, min(picked, longest, tokens)))
            tokens -= drawn[-1]
            place = (place + GOLDEN_RATIO) % 1
        return drawn

    def record(self, drawn: Sequence[int], longest: int) -> LengthsRecord:
        quantiles = np.quantile(drawn, QUANTILES, method="inverted_cdf")
        return LengthsRecord(
            name=self.name, sha256=self.sha256, windows=len(drawn), quantiles=tuple(int(q) for q in quantiles),
            clipped=float(self.counts[self.lengths > longest].sum() / self.counts.sum()),
        )


def read_lengths(path: Path | str) -> Lengths:
    """A request trace (CSV with the columns ContextTokens and GeneratedTokens, whose sum is what a static scale must
    hold for), or a histogram: CSV lines `length,count`, or a JSON object of length to count. Raises
    CalibrationError."""
    text = read_text(path)
    try:
        pairs = _json_pairs(text.content) if text.content.lstrip().startswith("{") else _csv_pairs(text.content)
        counted: dict[int, int] = {}
        for length, count in pairs:
            if length < 1 or count < 0:
                raise ValueError(f"length {length} with count {count}")
            counted[length] = counted.get(length, 0) + count
    except (ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise CalibrationError(f"{text.name} is neither a request trace ({','.join(TRACE_COLUMNS)}) nor a histogram of "
                               f"lengths (length,count lines, or JSON): {error}") from None
    kept = sorted(length for length, count in counted.items() if count)
    if not kept:
        raise CalibrationError(f"{text.name} has no sequence lengths in it")
    return Lengths(text.name, text.sha256, np.array(kept), np.array([counted[length] for length in kept]))


def _json_pairs(content: str) -> list[tuple[int, int]]:
    return [(int(length), _whole(count)) for length, count in json.loads(content).items()]


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a count")
    return value


def _csv_pairs(content: str) -> list[tuple[int, int]]:
    rows = [row for row in csv.reader(io.StringIO(content)) if row]
    header = [name.strip() for name in rows[0]] if rows else []
    if set(TRACE_COLUMNS) <= set(header):
        columns = [header.index(name) for name in TRACE_COLUMNS]
        return [(sum(int(row[column]) for column in columns), 1) for row in rows[1:] if len(row) == len(header)]
    if header and not header[0].isdecimal():
        rows = rows[1:]
    if any(len(row) != 2 for row in rows) or (header and len(header) != 2):
        raise ValueError("a line has other than two values")
    return [(int(length), int(count)) for length, count in rows]
