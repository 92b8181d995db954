"""Whether the gate lets right kernels pass and finds planted faults.

    python -m benchmarks.gate fptq_runtime/demo /tmp/smollm2-artifact

Each argument is an artifact, or a model, of which one is made first (--recipe). Prints Markdown: the greatest deviation
of each kind of probe, as a share of what it tolerates, on every ISA path of this CPU and on the reference backend; and
each fault by the probe that deviates most. Faults of tensors and of config.json are written into a copy of the
artifact with every hash put right, those of the runtime into the ops or the step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from fptq_runtime import quantize
from fptq_runtime._native import available_isas
from fptq_runtime.artifact.files import MANIFEST
from fptq_runtime.artifact.io import GOLDEN, FileRecord, hash_file, is_artifact, read_manifest, verify
from fptq_runtime.kernels.base import Array, AttentionSpec, Backend, StepInput
from fptq_runtime.kernels.cpu import CaptureOps, CpuBackend, CpuExecutor
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.gate import Golden, Kind, Outcome, probe
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.tensors import DTYPES
from fptq_runtime.quantizer.samples import Calibration

KINDS: tuple[Kind, ...] = ("stem", "norm", "linear", "rope", "attention", "order", "block")


class Planter:
    """A copy of an artifact in which tensors and config.json may be changed, and are changed back."""

    def __init__(self, artifact: Path, copy: Path) -> None:
        shutil.copytree(artifact, copy)
        self.path = copy
        self._before: list[tuple[Array, Array]] = []
        with (copy / "model.safetensors").open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(size))
        self._header.pop("__metadata__", None)
        self._data = 8 + size
        self.names = sorted(self._header)

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        return config

    def find(self, suffix: str) -> list[str]:
        """Names that end so, those of the middle layer first."""
        layer = f".{self.config.get('num_hidden_layers', self.config.get('n_layer', 0)) // 2}."
        return sorted((name for name in self.names if name.endswith(suffix)), key=lambda name: layer not in name)

    def tensor(self, name: str) -> Array:
        """Writable: what is written to it is in the file."""
        entry = self._header[name]
        array = np.memmap(self.path / "model.safetensors", DTYPES[entry["dtype"]], "r+",
                          self._data + entry["data_offsets"][0], tuple(entry["shape"]))
        self._before.append((array, np.array(array)))
        return array

    @contextmanager
    def planted(self, fault: Callable[[Planter], None]) -> Iterator[None]:
        """With the fault in, and every hash put right."""
        config = (self.path / "config.json").read_text()
        try:
            fault(self)
            self._sign()
            yield
        finally:
            for array, before in self._before:
                array[...] = before
            self._before.clear()
            (self.path / "config.json").write_text(config)
            self._sign()

    def change_config(self, **changes: Any) -> None:
        (self.path / "config.json").write_text(json.dumps({**self.config, **changes}))

    def _sign(self) -> None:
        for array, _ in self._before:
            assert isinstance(array, np.memmap)
            array.flush()
        manifest = read_manifest(self.path)
        files = {name: FileRecord(size=(self.path / name).stat().st_size, sha256=hash_file(self.path / name))
                 for name in manifest.files}
        (self.path / MANIFEST).write_text(manifest.model_copy(update={"files": files}).to_json())


def _weights(planter: Planter) -> str:
    return next(name for name in planter.find("proj.weight_packed") if "mlp" in name).removesuffix("_packed")


def _head(planter: Planter) -> list[Array]:
    """What makes the head's rows: its codes and scales, or the matrix itself."""
    names = [name for name in planter.names if name.startswith(("lm_head.weight_packed", "lm_head.weight_scale"))]
    return [planter.tensor(name) for name in names or planter.find("lm_head.weight") or planter.find("tokens.weight")]


def one_row_scale(planter: Planter) -> None:
    planter.tensor(f"{_weights(planter)}_scale")[7] *= 1.5


def one_group_scale(planter: Planter) -> None:
    planter.tensor(f"{_weights(planter)}_scale")[7, -1] *= 1.5


def lost_group(planter: Planter) -> None:
    planter.tensor(f"{_weights(planter)}_scale")[7, 0] = 0


def flipped_bit(planter: Planter) -> None:
    planter.tensor(f"{_weights(planter)}_packed")[11, 3] ^= 1 << 8


def rows_swapped(planter: Planter) -> None:
    for part in ("packed", "scale"):
        array = planter.tensor(f"{_weights(planter)}_{part}")
        array[[3, 9]] = array[[9, 3]]


def panels_swapped(planter: Planter) -> None:
    for part in ("packed", "scale"):
        array = planter.tensor(f"{_weights(planter)}_{part}")
        array[:128] = np.roll(array[:128], 64, axis=0)


def _norm_gain(planter: Planter, which: str, factor: float) -> None:
    gains = planter.tensor(planter.find(which)[0])
    gains[5] = gains[5] * factor


def gain_zeroed(planter: Planter) -> None:
    _norm_gain(planter, "input_layernorm.weight", 0)


def gain_larger(planter: Planter) -> None:
    _norm_gain(planter, "post_attention_layernorm.weight", 1.5)


def final_gain_larger(planter: Planter) -> None:
    _norm_gain(planter, "model.norm.weight", 1.5)


def head_rows_swapped(planter: Planter) -> None:
    for array in _head(planter):
        array[[100, 101]] = array[[101, 100]]


def head_shifted(planter: Planter) -> None:
    for array in _head(planter):
        array[...] = np.roll(array, 1, axis=0)


def head_bit_flipped(planter: Planter) -> None:
    array = _head(planter)[0]
    array.view(f"i{array.itemsize}")[17, 2] ^= 1


def bias_entry(planter: Planter) -> None:
    bias = planter.tensor(planter.find("_proj.bias")[0])
    bias[4] = bias[4] * 1.5


def input_scale(planter: Planter) -> None:
    readers = planter.find(".input_scale")[0].rsplit(".", 2)[0]  # of one input, which must agree
    for name in planter.find(".input_scale"):
        if name.startswith(f"{readers}."):
            planter.tensor(name)[...] *= 1.01


def rope_base(planter: Planter) -> None:
    rope = planter.config["rope_parameters"]
    planter.change_config(rope_parameters={**rope, "rope_theta": rope["rope_theta"] * 1.01})


STORED: dict[str, Callable[[Planter], None]] = {
    "one row's scales × 1.5": one_row_scale,
    "one group's scale × 1.5": one_group_scale,
    "one group lost": lost_group,
    "one bit of a packed word": flipped_bit,
    "two rows swapped": rows_swapped,
    "two panels of 64 rows swapped": panels_swapped,
    "a norm's gain zeroed": gain_zeroed,
    "a norm's gain × 1.5": gain_larger,
    "the last norm's gain × 1.5": final_gain_larger,
    "two rows of the head swapped": head_rows_swapped,
    "the head's rows moved by one": head_shifted,
    "one bit of the head": head_bit_flipped,
    "a bias entry × 1.5": bias_entry,
    "a static input scale × 1.01": input_scale,
    "rope base × 1.01 in config.json": rope_base,
}


@contextmanager
def positions_off_by_one() -> Iterator[None]:
    """Every token is rotated as the next one."""
    _prepare = CpuBackend.prepare

    def prepare(self: CpuBackend, parameter: Any) -> Any:
        if isinstance(parameter, AttentionSpec) and parameter.rope is not None:
            cos, sin = (np.roll(np.asarray(table), -1, axis=0) for table in parameter.rope)
            parameter = replace(parameter, rope=(cos, sin))
        return _prepare(self, parameter)

    with mock.patch.object(CpuBackend, "prepare", prepare):
        yield


@contextmanager
def window_off_by_one() -> Iterator[None]:
    _prepare = CpuBackend.prepare

    def prepare(self: CpuBackend, parameter: Any) -> Any:
        if isinstance(parameter, AttentionSpec) and parameter.sliding_window is not None:
            parameter = replace(parameter, sliding_window=parameter.sliding_window + 1)
        return _prepare(self, parameter)

    with mock.patch.object(CpuBackend, "prepare", prepare):
        yield


@contextmanager
def _stepping(change: Callable[[StepInput], StepInput]) -> Iterator[None]:
    _step = CpuExecutor.step

    def step(self: CpuExecutor, batch: StepInput, reuse: bool = False, sampled: None = None) -> Array:
        return _step(self, change(batch), reuse)

    with mock.patch.object(CpuExecutor, "step", step):
        yield


def stale_block() -> Any:
    """A step after the first reads a block that another sequence left."""

    def change(batch: StepInput) -> StepInput:
        tables = batch.block_tables.copy()
        if batch.positions[0] >= 16 and len(batch.seq_lens) == 1:
            tables[0, 0] = (tables[0, 0] + 1) % 3
        return replace(batch, block_tables=tables)

    return _stepping(change)


def stale_slot() -> Any:
    """The token at position 17 writes what the token before it did, so that its slot holds another key and value."""

    def change(batch: StepInput) -> StepInput:
        ids = batch.token_ids.copy()
        at = np.flatnonzero(batch.positions[1:] == 17)
        ids[at + 1] = ids[at]
        return replace(batch, token_ids=ids)

    return _stepping(change)


@contextmanager
def residual_lost() -> Iterator[None]:
    linear = CaptureOps.linear

    def without(self: CaptureOps, x: int, prepared: Any, residual: int | None = None) -> int:
        return linear(self, x, prepared)

    with mock.patch.object(CaptureOps, "linear", without):
        yield


RUNTIME: dict[str, Callable[[], Any]] = {
    "positions off by one (native)": positions_off_by_one,
    "window off by one (native)": window_off_by_one,
    "a stale block (native)": stale_block,
    "a stale slot (native)": stale_slot,
    "a residual lost (native)": residual_lost,
}


def outcomes(path: Path, backend: Backend) -> tuple[list[Outcome], float]:
    """Of an artifact whose files are verified, and the seconds that the probes took."""
    verify(path)
    checkpoint = Checkpoint(path)
    decoder, golden = load_model(checkpoint, backend), Golden.read(path / GOLDEN)
    started = time.perf_counter()
    found = list(probe(decoder, backend, golden, checkpoint.max_positions))
    return found, time.perf_counter() - started


@dataclass(frozen=True)
class Found:
    """A planted fault, and the probes that it fails, the worst of each kind first."""

    fault: str
    failed: list[Outcome]
    applies: bool = True

    @property
    def by_kind(self) -> str:
        worst = {kind: max((o for o in self.failed if o.kind == kind), key=lambda o: o.ratio)
                 for kind in KINDS if any(o.kind == kind for o in self.failed)}
        return "; ".join(f"{kind}: {o.name}{o.where}, {o.ratio:.3g}" for kind, o in worst.items())


def plant_all(artifact: Path, backend: Callable[[], Backend], stored: Mapping[str, Callable[[Planter], None]] = STORED,
              runtime: Mapping[str, Callable[[], Any]] = RUNTIME) -> Iterator[Found]:
    """Every fault in turn; one that this artifact has no place for does not apply."""
    with tempfile.TemporaryDirectory() as directory:
        planter = Planter(artifact, Path(directory) / "artifact")
        for name, fault in stored.items():
            try:
                with planter.planted(fault):
                    found, _ = outcomes(planter.path, backend())
            except (IndexError, KeyError):
                yield Found(name, [], applies=False)
            else:
                yield Found(name, [outcome for outcome in found if not outcome.passes])
    for name, broken in runtime.items():
        if name.startswith("window") and not any(f.window for f in Golden.read(artifact / GOLDEN).attention.values()):
            yield Found(name, [], applies=False)
            continue
        with broken():
            found, _ = outcomes(artifact, backend())
        yield Found(name, [outcome for outcome in found if not outcome.passes])


def tables(name: str, artifact: Path) -> Iterator[str]:
    size, golden = read_manifest(artifact).size, (artifact / GOLDEN).stat().st_size
    yield f"## {name}\n\n{size / 1e6:.1f} MB, of which golden values are {golden / size:.1%}.\n"
    yield "| kernels | probes | seconds | " + " | ".join(KINDS) + " |"
    yield "|---|---:|---:|" + "---:|" * len(KINDS)
    backends: list[tuple[str, Callable[[], Backend]]] = [
        *((isa, lambda isa=isa: CpuBackend(isa=isa)) for isa in available_isas()), ("reference", ReferenceBackend)]
    for isa, make in backends:
        found, seconds = outcomes(artifact, make())
        worst = (max((o.ratio for o in found if o.kind == kind), default=0) for kind in KINDS)
        yield f"| {isa} | {len(found)} | {seconds:.2f} | " + " | ".join(f"{ratio:.3f}" for ratio in worst) + " |"
    yield "\n| planted fault | found | by (worst probe of each kind, times its tolerance) |\n|---|---|---|"
    for found_ in plant_all(artifact, CpuBackend):
        verdict = "–" if not found_.applies else "yes" if found_.failed else "**no**"
        yield f"| {found_.fault} | {verdict} | {found_.by_kind if found_.applies else 'has none'} |"
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--recipe", default="fptq", help="of a model that is not an artifact yet")
    parser.add_argument("--num-samples", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for index, model in enumerate(arguments.models):
            artifact = model
            if not is_artifact(model):
                artifact = Path(directory) / str(index)
                quantize(model, artifact, arguments.recipe, calibration=Calibration(num_samples=arguments.num_samples),
                         text_tokens=1024)
            for line in tables(f"{model.name}, {read_manifest(artifact).recipe['name']}", artifact):
                print(line, flush=True)


if __name__ == "__main__":
    main()
