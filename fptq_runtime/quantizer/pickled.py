"""pytorch_model.bin as safetensors. A pickle can run code where it is read, so torch's weights-only reader does it in a
process of its own, which writes tensors and ends:

    python -m fptq_runtime.quantizer.pickled DIRECTORY OUT
"""

from __future__ import annotations

import atexit
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from fptq_runtime.models.tensors import CheckpointError


def pickles(path: Path) -> list[Path]:
    """A model directory's pickled weights, where it has no other; none where it has safetensors."""
    if any(path.glob("*.safetensors")):
        return []
    return sorted(path.glob("pytorch_model-*-of-*.bin")) or sorted(path.glob("pytorch_model.bin"))


def as_safetensors(path: Path) -> Path:
    """A directory with the model's config.json and its weights as safetensors, which lives as long as this process; the
    path itself where nothing is pickled. Raises CheckpointError."""
    if not pickles(path):
        return path
    out = Path(tempfile.mkdtemp(prefix="fptq-"))
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    done = subprocess.run([sys.executable, "-m", __spec__.name, str(path), str(out)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise CheckpointError(f"{path} has only pickled weights, and torch's weights-only reader does not take them "
                              f"({reason}); save the model as safetensors, as save_pretrained does")
    return out


def convert(path: Path, out: Path) -> None:
    files = pickles(path)
    for index, file in enumerate(files, 1):
        try:
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # a file of torch before 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        seen: set[int] = set()
        for name, tensor in tensors.items():  # safetensors does not store what shares memory
            storage = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.clone().contiguous() if storage in seen else tensor.contiguous()
            seen.add(storage)
        save_file(tensors, out / f"model-{index:05}-of-{len(files):05}.safetensors", metadata={"format": "pt"})
    shutil.copy(path / "config.json", out)


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # whatever a damaged or hostile file leads to; torch's own words take a page
        sys.exit(str(error) if isinstance(error, OSError) else type(error).__name__)
