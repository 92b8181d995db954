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
from dataclasses import replace
from pathlib import Path

import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from fptq_runtime.config import ModelConfig
from fptq_runtime.locate import DEMO_MODEL
from fptq_runtime.shapes import SHAPES

CONTEXT = 4096


def write_checkpoint(config: ModelConfig, path: Path) -> None:
    """One file a layer, so that no more than that is in memory."""
    path.mkdir(parents=True)
    generator = np.random.default_rng(0)
    hidden, dim = config.hidden_size, config.head_dim
    weight_map: dict[str, str] = {}

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        save_file({name: _random(generator, shape) for name, shape in shapes.items()}, path / file,
                  metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, file))

    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        save(f"layer-{index}.safetensors", {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (config.num_heads * dim, hidden),
            f"{layer}.self_attn.k_proj.weight": (config.num_kv_heads * dim, hidden),
            f"{layer}.self_attn.v_proj.weight": (config.num_kv_heads * dim, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, config.num_heads * dim),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (config.intermediate_size, hidden),
            f"{layer}.mlp.up_proj.weight": (config.intermediate_size, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, config.intermediate_size),
        })
    save("rest.safetensors", {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    })
    assert config.rope is not None
    (path / "config.json").write_text(json.dumps({
        "architectures": [config.architecture], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16",
        "vocab_size": config.vocab_size, "hidden_size": hidden, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": dim, "max_position_embeddings": CONTEXT,
        "rms_norm_eps": config.norm_eps, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
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
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipe", default="fptq")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--sample-length", type=int, default=256)
    parser.add_argument("--text-tokens", type=int, default=2048)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    config = replace(shape, num_layers=options.layers or shape.num_layers)
    source = options.work / f"{options.shape}-{config.num_layers}"
    if not source.exists():
        write_checkpoint(config, source)
    settings = [f"--{name}={getattr(options, name.replace('-', '_'))}"
                for name in ("recipe", "num-samples", "sample-length", "text-tokens")]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fptq_runtime.cli", "quantize", str(source), str(options.work / "artifact"),
                    "--overwrite", *settings], check=True)
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({
        "shape": options.shape, "layers": config.num_layers, "settings": settings, "machine": platform.machine(),
        "seconds": round(seconds, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 2),
    }))


if __name__ == "__main__":
    main()
