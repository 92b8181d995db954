"""For every test."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line has it
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these are the CPU's; `make gpu-check` is for GPUs

# Read where a kernel is defined, Triton's own when it is imported, which other libraries do, too.
os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("fptq", deadline=None)  # a busy machine is no failure
settings.load_profile("fptq")
