"""Our server and its peers side by side: the same shape, prompts, threads and minutes for all.

    python -m benchmarks.peers --shape llama-3.2-1b

Each peer is brought up from its published package in `--work-dir`, once. Rows are measured one after the other, and in
each row the peers take turns, so that what else the machine does meets all of them.
"""
