"""Whether the Triton backend computes what the reference does on this GPU, and how fast. See docs/gpu.md."""
