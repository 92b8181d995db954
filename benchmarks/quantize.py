"""What `fptq quantize` takes for a large model: seconds, CPU seconds and peak memory, on random weights.

    python -m benchmarks.quantize --shape llama-2-7b --work DIR [--recipe fptq] [--layers 32]

writes the float checkpoint (bfloat16, the demo's tokenizer) into DIR unless it is there, quantizes it in a process of
its own, and prints one JSON object. --layers takes fewer, to time one: the difference between two runs is what a layer
costs.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from fptq_runtime.locate import DEMO_MODEL
from fptq_runtime.measure.shapes import CONFIGS
from fptq_runtime.models.families import parse_config

CONTEXT = 4096


def write_checkpoint(config: dict[str, Any], path: Path) -> None:
    """One file a part, so that no more than that is in memory. config: what config.json says."""
    path.mkdir(parents=True)
    generator = np.random.default_rng(0)
    model = parse_config(config)
    weight_map: dict[str, str] = {}

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        save_file({f"{name}.weight": _random(generator, shape) for name, shape in shapes.items()}, path / file,
                  metadata={"format": "pt"})
        weight_map.update(dict.fromkeys((f"{name}.weight" for name in shapes), file))

    save("stem.safetensors", {model.stem.embedding: (model.config.vocab_size, model.config.hidden_size)})
    for index, part in enumerate(model.parts):
        shapes: dict[str, tuple[int, ...]] = {part.prefix + norm.modules[0]: norm.shape for norm in part.norms}
        for linear in part.linears:
            shapes |= {part.prefix + module: (n, linear.k)
                       for module, n in zip(linear.modules, linear.sizes, strict=True)}
        save(f"part-{index}.safetensors", shapes)
    (path / "config.json").write_text(json.dumps({
        **config, "dtype": "bfloat16", "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 1,
    }))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_MODEL / file, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _random(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Norm gains around 1; weights with a deviation of 1 / sqrt(K)."""
    values = generator.standard_normal(shape, np.float32)
    values *= 0.1 if len(shape) == 1 else shape[1] ** -0.5
    values += len(shape) == 1
    return values.astype(bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=list(CONFIGS), required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipe", default="fptq")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--sample-length", type=int, default=256)
    parser.add_argument("--text-tokens", type=int, default=2048)
    options = parser.parse_args()
    config = CONFIGS[options.shape]
    layers = options.layers or config["num_hidden_layers"]
    source = options.work / f"{options.shape}-{layers}"
    if not source.exists():
        write_checkpoint({**config, "num_hidden_layers": layers}, source)
    settings = [f"--{name}={getattr(options, name.replace('-', '_'))}"
                for name in ("recipe", "num-samples", "sample-length", "text-tokens")]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fptq_runtime.cli", "quantize", str(source), str(options.work / "artifact"),
                    "--overwrite", *settings], check=True)
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({
        "shape": options.shape, "layers": layers, "settings": settings, "machine": platform.machine(),
        "seconds": round(seconds, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 2),
    }))


if __name__ == "__main__":
    main()
