"""The model card that lies beside an artifact, for the hub: where the model comes from, what was done, what it cost,
how to serve it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from fptq_runtime.artifact.io import Manifest, format_size
from fptq_runtime.quantizer.report import (
    calibration_text,
    perplexity_loss,
    policy,
    step_text,
    text_name,
    weights_text,
)

INHERITED = ("license", "license_name", "license_link", "language")  # of the base model's own card


def model_card(manifest: Manifest, source: Path, size: int) -> str:
    """Markdown with the hub's YAML before it. source: the float model's directory. size: bytes of the weights."""
    made, quality = manifest.provenance, manifest.quality
    known = _front_matter(source)
    facts: dict[str, Any] = {
        **{key: known[key] for key in INHERITED if key in known},
        **({"base_model": made.source, "base_model_relation": "quantized"} if made.revision else {}),
        "pipeline_tag": "text-generation", "tags": ["fptq", "compressed-tensors"],
    }
    base = f"[{made.source}](https://huggingface.co/{made.source}) at {made.revision}" if made.revision else made.source
    licence = known.get("license_name", known.get("license", "the base model's, which its files here do not state"))
    weights = ", ".join(dict.fromkeys(weights_text(layer) for layer in manifest.layers))
    inputs = ", ".join(dict.fromkeys(policy(layer) for layer in manifest.layers))
    name = f"{made.source.rpartition('/')[2]}-{manifest.recipe['name']}"
    return "\n".join((
        "---", yaml.safe_dump(facts, sort_keys=False).strip(), "---", "",
        f"# {name}", "",
        f"{made.source} quantized by FPTQ Serve {made.fptq_version}, as compressed-tensors.", "",
        "| | |", "|---|---|",
        f"| base model | {base} ({made.architecture}) |",
        f"| license | {licence} |",
        f"| recipe | {manifest.recipe['name']}: {'; '.join(map(step_text, manifest.recipe['steps']))} |",
        f"| weights | {weights}; {format_size(size)} |",
        f"| inputs | int8, {inputs} |" if inputs != "float" else "| inputs | float |",
        f"| calibration | {calibration_text(made)} |",
        f"| perplexity | {quality.perplexity_before:.3f} in float, {quality.perplexity_after:.3f} quantized "
        f"({perplexity_loss(manifest):+.2%}), on {text_name(quality.text)}, windows of {quality.window} |", "",
        "## Serve", "",
        "```", "fptq serve .  # in this directory: OpenAI's API on port 8000", "```", "",
        "`fptq verify .` checks every file and the machine's kernels, `fptq inspect .` shows what was done to each "
        "layer, `fptq export . OUT --target vllm` writes it for vLLM.", "",
    ))


def _front_matter(source: Path) -> dict[str, Any]:
    """The YAML before the base model's card, as far as it can be read."""
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        before, marker, rest = (source / "README.md").read_text("utf-8").partition("---\n")
        head, closed, _ = rest.partition("\n---")
        if marker and closed and not before.strip() and isinstance(found := yaml.safe_load(head), dict):
            return found
    return {}
