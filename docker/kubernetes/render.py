"""Renders the manifests in this directory from the chart: python docker/kubernetes/render.py [--check]

Helm's own engine does it, which helm-python-sdk carries. --check writes nothing and fails where a file differs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import helm_python

HERE = Path(__file__).parent
MANIFESTS: dict[str, tuple[list[str], dict[str, Any]]] = {  # templates, and values that differ from the defaults
    "fptq": (["deployment", "service", "poddisruptionbudget", "horizontalpodautoscaler", "networkpolicy"], {}),
    "scaledobject": (["scaledobject"], {"autoscaling": {"by": "keda"}}),
    "servicemonitor": (["servicemonitor"], {"prometheusOperator": {"enabled": True}}),
    "prometheusrule": (["prometheusrule"], {"prometheusOperator": {"enabled": True}}),
    "inferencepool": (["inferencepool"], {"inferencePool": {"enabled": True}}),
    "inferenceobjective": (["inferenceobjective"], {"inferencePool": {"enabled": True}}),
    "servingruntime": (["servingruntime"], {"kserve": True}),
}


def main() -> None:
    differ = []
    with helm_python.Chart.load(HERE / "chart") as chart:
        for name, (templates, values) in MANIFESTS.items():
            rendered = chart.render(values, name="fptq")
            parts = [rendered[f"fptq/templates/{template}.yaml"].strip() for template in templates]
            text = "\n---\n".join(parts) + "\n"
            path = HERE / f"{name}.yaml"
            if "--check" not in sys.argv:
                path.write_text(text)
            elif path.read_text() != text:
                differ.append(path.name)
    if differ:
        raise SystemExit(f"{', '.join(differ)}: not what the chart renders; run docker/kubernetes/render.py")


if __name__ == "__main__":
    main()
