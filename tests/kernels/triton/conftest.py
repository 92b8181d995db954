"""The kernels' arithmetic, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined, so before any is imported
pytest.importorskip("triton", reason="triton is not installed")
