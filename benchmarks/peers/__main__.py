"""python -m benchmarks.peers: see the package."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import benchmarks.peers as package
from benchmarks.peers import report, serving
from benchmarks.peers.base import DENSE, Peer, Row, Unavailable
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.ours import Ours
from benchmarks.peers.vllm import Vllm
from fptq_runtime.measure.bench import machine

RESULTS = Path(__file__).parent.parent / "results"
ROWS = {
    "prefill": [Row("prefill", 1, 512)],
    "decode": [Row("decode", batch, 512) for batch in (1, 8)],
    "large": [Row("decode", batch, 512) for batch in (16, 32)],
    "long": [Row("decode", batch, 2048) for batch in (1, 8)],
    "avx2": [Row("prefill", 1, 512, "avx2"), Row("decode", 8, 512, "avx2")],
}
ROWS_7B = {"prefill": ROWS["prefill"], "decode": ROWS["decode"], "long": ROWS["long"][:1]}
CLIENTS = (8, 32)
PEERS = ("ours", "llama.cpp", "llama.cpp-q8", "openvino", "vllm")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=package.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=DENSE, required=True)
    parser.add_argument("--peer", choices=PEERS, action="append", help="only these (all)")
    parser.add_argument("--rows", choices=[*ROWS, "http"], action="append", help="only these (all)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work-dir", type=Path, default=Path("build/peers"), help="for packages, builds and models")
    parser.add_argument("--out", type=Path, help="the results, without suffix (benchmarks/results/peers-SHAPE)")
    parser.add_argument("--keep", action="store_true", help="keep what OUT has of other rows and peers")
    parser.add_argument("--lock", type=Path, help="a file to hold a lock on while measuring, one turn at a time")
    parser.add_argument("--prepare", action="store_true", help="only install, build and convert")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no worker is left behind
    out = str(options.out or RESULTS / f"peers-{options.shape}")
    work_dir: Path = options.work_dir.resolve()

    peers: list[Peer] = []
    kept = Path(out + ".json")
    old = json.loads(kept.read_text()) if options.keep and kept.exists() else {}
    results: dict[str, Any] = {
        "shape": options.shape, "machine": machine(), "threads": options.threads, "rounds": options.rounds,
        "date": date.today().isoformat(),
        "runs": [*old.get("runs", []), shlex.join(["python", "-m", "benchmarks.peers", *_shown()])],
        "versions": old.get("versions", {}), "unavailable": old.get("unavailable", {}), "rows": old.get("rows", []),
        "commands": old.get("commands", {}),
    }
    for name in options.peer or PEERS:
        peer = _peer(name, work_dir, options.threads)
        try:
            results["versions"][peer.name] = peer.prepare(options.shape)
            peers.append(peer)
        except (Unavailable, RuntimeError) as error:
            print(f"{peer.name}: {error}", file=sys.stderr)
            results["unavailable"][peer.name] = str(error).splitlines()[0]
    if options.prepare:
        return

    def write() -> None:
        for peer in peers:
            commands = [*results["commands"].get(peer.name, []), *peer.commands]
            results["commands"][peer.name] = list(dict.fromkeys(commands))
        order = [row.label for group in ROWS.values() for row in group]
        results["rows"].sort(key=lambda row: order.index(row["label"]) if row["label"] in order else len(order))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(results, indent=1) + "\n")
        Path(out + ".md").write_text(report.markdown(results))
        report.plot(results, Path(out + ".svg"))

    groups = ROWS_7B if options.shape == "llama-2-7b" else ROWS
    chosen = options.rows or [*groups, *(["http"] if groups is ROWS else [])]
    memory: dict[str, list[float]] = {}
    try:
        for row in [row for group in chosen for row in groups.get(group, [])]:
            entry = _row(results, row.label, peers)
            for _ in range(options.rounds):
                for peer in list(peers):
                    if peer.name.endswith("KV") and row.context < 1024:
                        continue  # the cache's type matters where the cache is large
                    try:
                        with _locked(options.lock):
                            value = peer.measure(row)
                    except RuntimeError as error:
                        print(f"{peer.name}, {row.label}: {error}", file=sys.stderr)
                        results["unavailable"][f"{peer.name}, {row.label}"] = str(error).splitlines()[0]
                        peer.close()
                        peers.remove(peer)
                        continue
                    if value is not None:
                        entry["runs"].setdefault(peer.name, []).append(value)
                        print(f"{row.label}: {peer.name} {value:.1f}", flush=True)
            if row == ROWS["prefill"][0]:
                memory = {peer.name: [size] for peer in peers if (size := peer.resident_mib()) is not None}
            write()
        if memory:
            _row(results, "memory of the engine after prefill, MiB", [], lower=True)["runs"] |= memory
        if "http" in chosen:
            _http(options, results, peers, write)
    finally:
        for peer in peers:
            peer.close()
    results["rows"] = [row for row in results["rows"] if row["runs"]]
    write()
    print(report.markdown(results))


def _http(options: argparse.Namespace, results: dict[str, Any], peers: list[Peer], write: Any) -> None:
    ours = next((peer for peer in peers if isinstance(peer, Ours)), None)
    servers: list[tuple[Ours | LlamaCpp, str, str]] = [
        (peer, "/readyz" if isinstance(peer, Ours) else "/health", options.shape)
        for peer in peers if isinstance(peer, Ours) or (isinstance(peer, LlamaCpp) and peer.name == "llama.cpp")
    ]
    for clients in CLIENTS:
        label = f"HTTP, {clients} clients: "
        rate = _row(results, label + "output tokens/s", peers)
        first = _row(results, label + "median ms to first token", peers, lower=True)
        start = _row(results, label + "exec to ready, s", peers, lower=True)
        resident = _row(results, label + "memory after serving, MiB", peers, lower=True)
        alone = _row(results, f"{clients} requests without HTTP: output tokens/s", peers)
        for _ in range(options.rounds):
            for peer, probe, model in servers:
                port = serving.free_port()
                command = peer.server(port, clients, serving.CONTEXT)
                with _locked(options.lock):
                    served = serving.serve_and_load(command, port, probe, model, clients)
                print(f"{label}{peer.name} {served}", flush=True)
                for entry, value in ((rate, served.output_tokens_per_s), (first, served.ttft_ms_p50),
                                     (start, served.start_s), (resident, served.resident_mib)):
                    entry["runs"].setdefault(peer.name, []).append(value)
            if ours is not None:
                with _locked(options.lock):
                    value = ours.without_http(clients, serving.PROMPT_TOKENS, serving.OUTPUT_TOKENS)
                alone["runs"].setdefault(ours.name, []).append(value)
        write()


def _peer(name: str, work_dir: Path, threads: int) -> Peer:
    if name == "ours":
        return Ours(work_dir, threads)
    if name == "openvino":
        return OpenVino(work_dir, threads)
    if name == "vllm":
        return Vllm(work_dir, threads)
    return LlamaCpp(work_dir, threads, "q8_0" if name == "llama.cpp-q8" else "f16")


def _row(results: dict[str, Any], label: str, peers: Sequence[Peer], lower: bool = False) -> dict[str, Any]:
    """The entry of that label, without what it has of `peers`."""
    rows: list[dict[str, Any]] = results["rows"]
    entry = next((row for row in rows if row["label"] == label), None)
    if entry is None:
        entry = {"label": label, "lower_is_better": lower, "runs": {}}
        rows.append(entry)
    for peer in peers:
        entry["runs"].pop(peer.name, None)
    return entry


def _shown() -> list[str]:
    """The arguments, without this machine's directories."""
    shown, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and not argument.startswith(("--work-dir", "--out", "--lock")):
            shown.append(argument)
        skip = argument in ("--work-dir", "--out", "--lock")
    return shown


@contextlib.contextmanager
def _locked(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
