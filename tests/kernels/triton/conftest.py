"""The kernels' arithmetic, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from fptq_runtime.kernels.triton import interpreter

interpreter.mend()
