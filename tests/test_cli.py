"""The command line by itself: exit codes, one-line errors, sizes, and what it does not import."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import huggingface_hub.constants
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import fptq_runtime
from fptq_runtime import cli, locate
from fptq_runtime.config import EngineConfig
from fptq_runtime.errors import FptqError
from fptq_runtime.models.loader import CheckpointError


@pytest.mark.parametrize(("option", "value", "said"), [
    ("--port", "70000", "70000 is not between 0 and 65535"), ("--max-wait", "0", "0.0 is not above 0"),
    ("--max-num-seqs", "0", "0 is not at least 1"), ("--max-num-seqs", "x", "'x' is not a valid integer"),
])
def test_numbers_out_of_bounds(option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "demo", option, value) == 2
    assert f"Invalid value for '{option}': {said} (see" in capsys.readouterr().err


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException]:
    """`fptq fail` raises what is put under "error"."""
    raised: dict[str, BaseException] = {}

    @click.command()
    def fail() -> None:
        raise raised["error"]

    monkeypatch.setitem(cli.cli.commands, "fail", fail)
    monkeypatch.delenv("FPTQ_DEBUG", raising=False)
    return raised


@pytest.mark.parametrize(("error", "line"), [
    (FptqError("the model\n  is odd"), "fptq: the model is odd\n"),
    (FileNotFoundError(2, "No such file or directory", "x.json"), "fptq: x.json: No such file or directory\n"),
    (MemoryError(), "fptq: out of memory\n"),
    (ModuleNotFoundError("No module named 'torch'", name="torch"),
     "fptq: this needs torch, which is not installed: pip install 'fptq-serve[quantize]'\n"),
    (ValueError("operands could not be broadcast"),
     "fptq: internal error: ValueError: operands could not be broadcast (FPTQ_DEBUG=1 shows where)\n"),
    (KeyError("k"), "fptq: internal error: KeyError: 'k' (FPTQ_DEBUG=1 shows where)\n"),
])
def test_an_error_is_one_line(failing: dict[str, BaseException], capsys: pytest.CaptureFixture[str],
                              monkeypatch: pytest.MonkeyPatch, error: BaseException, line: str) -> None:
    failing["error"] = error
    assert run("fail") == 1
    assert capsys.readouterr() == ("", line)
    monkeypatch.setenv("FPTQ_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["fail"])


def test_interrupt_is_quiet(failing: dict[str, BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    failing["error"] = KeyboardInterrupt()
    assert run("fail") == 130
    assert capsys.readouterr().err.strip() == ""


@pytest.mark.parametrize(("written", "line"), [
    ((), "interrupted; nothing was written"), (("out",), "interrupted; out was written"),
    ((".out.state",), "interrupted; .out.state was written"),
])
def test_an_interrupted_quantize_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str], written: tuple[str, ...],
                                                   line: str) -> None:
    from fptq_runtime.quantizer import pipeline

    def quantize(*arguments: object, **options: object) -> None:
        (tmp_path / ".out.partial-1-x").rmdir()
        for name in written:
            (tmp_path / name).mkdir()
        raise KeyboardInterrupt

    (tmp_path / ".out.partial-1-x").mkdir()
    monkeypatch.setattr(pipeline, "quantize", quantize)
    assert run("quantize", "demo", str(tmp_path / "out")) == 130
    assert capsys.readouterr().err == f"fptq: {line}\n"


def test_wrong_usage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "demo", "--port", "99999") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fptq: ")
    assert err.count("\n") == 1
    assert "fptq serve --help" in err


def test_no_arguments_are_answered_with_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "\nCommands:\n" in capsys.readouterr().err


def test_a_pipe_is_a_file_to_read() -> None:
    assert cli.ExistingFile().convert(os.devnull, None, None) == Path(os.devnull)


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.cli.commands:
        assert run(name, "--help") == 0
        assert f"Usage: fptq {name}" in capsys.readouterr().out


def test_help_and_a_typo_import_no_torch() -> None:
    program = ("import sys\nfrom fptq_runtime import cli\ntry: cli.main(sys.argv[1:])\n"
               "except SystemExit: print('torch' in sys.modules)")
    for arguments in (["--help"], ["serve", "--help"], ["--version"], ["serve", "no/such/model"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True,
                              cwd=Path(fptq_runtime.__file__).parent.parent)
        assert done.stdout.endswith("False\n"), arguments


@given(st.integers(1, 1 << 20), st.sampled_from([("", 1), ("KB", 1000), ("MiB", 1 << 20), ("GiB", 1 << 30)]))
def test_size(number: int, unit: tuple[str, int]) -> None:
    for text in (f"{number}{unit[0]}", f" {number} {unit[0].lower()}"):
        assert cli.Size().convert(text, None, None) == number * unit[1]


@pytest.mark.parametrize("text", ["", "many", "-1GiB", "1TiBs", "1e9", "0x10", "GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="512MiB"):
        cli.Size().convert(text, None, None)


def test_json_is_all_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    @cli.answers
    def command() -> cli.Answer:
        print("a library talks")
        return {"answer": 42}, "forty-two"

    command(["--json"], standalone_mode=False)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"answer": 42}
    assert err == "a library talks\n"
    command([], standalone_mode=False)
    assert capsys.readouterr() == ("forty-two\n", "a library talks\n")


def test_public_names() -> None:
    for name in fptq_runtime.__all__:
        assert getattr(fptq_runtime, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        fptq_runtime.no_such_name  # noqa: B018


def test_find_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tales").mkdir(parents=True)
    (tmp_path / "models" / "readme").touch()
    (tmp_path / "demo").mkdir()
    assert locate.find_model("demo") == str(locate.DEMO_MODEL)
    assert locate.find_model("./demo") == "demo"
    assert locate.find_model("models/tales") == "models/tales"
    assert locate.find_model("owner/name") == "owner/name"
    assert locate.find_model("owner/name", "v1") == "owner/name@v1"
    for name, message in {
        "models/tale": r"did you mean models/tales\?",
        "model/tales/deep/er": r"did you mean models\?",
        "dmo": r"did you mean demo\?",
        "models/readme2": r"no model at models/readme2$",  # readme is a file
        "~nobody-of-that-name/x": "no model at",
        "nothing like it": r"no model at nothing like it$",
        "": "empty",
    }.items():
        with pytest.raises(locate.NotFoundError, match=message):
            locate.find_model(name)
    with pytest.raises(locate.NotFoundError, match="no revision"):
        locate.find_model("demo", "main")


def test_serve_says_how_a_model_that_is_not_there_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("serve", "./nowhere") == 1
    assert capsys.readouterr().err == "fptq: no model at ./nowhere; `fptq quantize MODEL ./nowhere` makes one\n"
    assert run("serve", "./nowhere.gguf") == 1
    assert capsys.readouterr().err == "fptq: no model at ./nowhere.gguf\n"
    (tmp_path / "nowhere2").mkdir()
    assert run("serve", "./nowhere") == 1
    assert capsys.readouterr().err == "fptq: no model at ./nowhere; did you mean nowhere2?\n"


def test_a_hub_id_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"^owner/none .* offline .*; download it elsewhere and name"):
        locate.find_artifact("owner/none")


def test_a_models_identity_reads_no_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "HASHED_WHOLE", 1000)
    small, large = tmp_path / "config.json", tmp_path / "model.safetensors"
    small.write_bytes(b"a" * 1000)
    large.write_bytes(b"a" * (3 << 20))
    before = locate._identity(small), locate._identity(large)
    for file in (small, large):
        status = file.stat()
        with file.open("r+b") as opened:
            opened.seek(-1, 2)
            opened.write(b"b")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert locate._identity(small) != before[0]
    assert locate._identity(large) == before[1], "as said in the docs"
    large.touch()
    assert locate._identity(large) != before[1]


Served = list[tuple[Any, dict[str, Any]]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """What `fptq serve demo --port 0` would serve, by its ServerConfig and options; nothing is loaded."""
    calls: Served = []
    monkeypatch.setattr("fptq_server.main.serve", lambda path, config, **options: calls.append((config, options)))
    monkeypatch.setattr(locate, "find_artifact", lambda name: Path(name))
    monkeypatch.setattr("fptq_runtime.artifact.io.is_artifact", lambda path: True)
    monkeypatch.delenv("FPTQ_API_KEY", raising=False)
    return calls


@pytest.mark.parametrize("key", ["", " ", "\n", " \t\n"])
def test_an_empty_key_is_no_key(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                key: str) -> None:
    monkeypatch.setenv("FPTQ_API_KEY", key)
    assert run("serve", "demo", "--port", "0") == 2
    assert "FPTQ_API_KEY is set but empty" in capsys.readouterr().err
    monkeypatch.delenv("FPTQ_API_KEY")
    assert run("serve", "demo", "--port", "0", "--api-key", key) == 1
    assert "api key" in capsys.readouterr().err
    assert not served


def test_the_environments_key_is_one(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("serve", "demo", "--port", "0") == 0
    for value in ("my secret", " my secret\n"):
        monkeypatch.setenv("FPTQ_API_KEY", value)
        assert run("serve", "demo", "--port", "0") == 0
    assert run("serve", "demo", "--port", "0", "--api-key", "a", "--api-key", "b c") == 0
    assert [config.api_keys for config, _ in served] == [(), ("my secret",), ("my secret",), ("a", "b c")]


def test_what_kubernetes_sets_for_a_service_of_our_name_is_none_of_ours(served: Served, monkeypatch: pytest.MonkeyPatch
                                                                       ) -> None:
    for name, value in (("FPTQ_PORT", "tcp://10.0.0.7:8000"), ("FPTQ_SERVICE_HOST", "10.0.0.7"),
                        ("FPTQ_SERVICE_PORT", "8000"), ("FPTQ_PORT_8000_TCP", "tcp://10.0.0.7:8000"),
                        ("FPTQ_PORT_8000_TCP_PORT", "8000"), ("FPTQ_V2_PORT", "tcp://10.0.0.8:8000")):
        monkeypatch.setenv(name, value)
    assert run("serve", "demo", "--port", "0") == 0
    assert len(served) == 1


def test_what_serve_cannot_do_is_said_before_a_model_is_fetched(monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    def fetch(name: str) -> Path:
        raise AssertionError(f"{name} was fetched")

    monkeypatch.setattr(locate, "find_artifact", fetch)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, message in {
            ("--port", str(taken.getsockname()[1])): "already in use",
            ("--host", "203.0.113.1"): "not an address of this machine",
            ("--api-key", "é"): "api key",
            ("--drain-timeout", "inf"): "must be 0 or more seconds",
            ("--served-model-name=",): "--served-model-name is empty",
        }.items():
            assert run("serve", "demo", *arguments) != 0
            assert message in capsys.readouterr().err


def test_errors_name_options_as_they_are_typed(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(path: Path, config: object, **options: object) -> None:
        raise FptqError("/max_num_seqs/x: max_model_len 9 exceeds 8: lower it, max_tokens, port or kv_cache_dtype",
                        "max_model_len", "max_num_seqs", "max_tokens", "kv_cache_dtype")

    monkeypatch.setattr("fptq_server.main.serve", refuse)
    for arguments, message in {
        (): "/max_num_seqs/x: --max-model-len 9 exceeds 8: lower it, max_tokens, port or "
            "--kv-cache-dtype\n",
        ("--drain-timeout", "nan"): "--drain-timeout must be 0 or more seconds, not nan\n",
        ("--kv-cache-memory", "0"): "'--kv-cache-memory': '0' is less than a byte (see",
        ("--kv-cache-memory", "0.1"): "'--kv-cache-memory': '0.1' is less than a byte (see",
    }.items():
        assert run("serve", "demo", "--port", "0", *arguments) != 0
        assert message in capsys.readouterr().err


def test_the_queues_limits(served: Served) -> None:
    assert run("serve", "demo", "--port", "0") == 0
    assert run("serve", "demo", "--port", "0", "--max-waiting-requests", "3", "--max-waiting-tokens", "9") == 0
    limits = [(options["max_waiting_requests"], options["max_waiting_tokens"]) for _, options in served]
    assert limits == [(EngineConfig.max_waiting_requests, EngineConfig.max_waiting_tokens), (3, 9)]


GIVEN = {  # every option of `fptq serve`: not its default, as a flag's text and as YAML has it
    "quantize": ("rtn", "rtn"), "host": ("::1", "::1"), "port": ("0", 0), "uds": ("/s", "/s"),
    "ssl-certfile": ("c", "c"), "ssl-keyfile": ("k", "k"),
    "root-path": ("/llm", "/llm"), "cors-origins": ("https://a.example",) * 2,
    "served-model-name": ("tales", "tales"), "chat-template": (os.devnull,) * 2,
    "default-chat-template-kwargs": ('{"enable_thinking": false}', {"enable_thinking": False}),
    "generation-config": ("none", "none"), "tool-call-parser": ("none", "none"), "reasoning-parser": ("none", "none"),
    "responses-db": ("r.db", "r.db"), "batch-dir": ("b", "b"), "batch-dir-size": ("2MiB", 2 << 20),
    "max-model-len": ("77", 77), "max-num-seqs": ("7", 7),
    "max-num-batched-tokens": ("70", 70), "kv-cache-dtype": ("bf16", "bf16"), "kv-cache-memory": ("3MiB", 3 << 20),
    "gpu-memory-utilization": ("0.5", 0.5), "no-prefix-cache": (None, True), "no-speculation": (None, True),
    "no-close-structured": (None, True),
    "kv-cache-disk": ("kv", "kv"), "kv-cache-disk-size": ("4GiB", 4 << 30),
    "activations": ("int8", "int8"),
    "backend": ("reference", "reference"), "device": ("cpu", "cpu"), "threads": ("1", 1),
    "max-waiting-requests": ("3", 3), "max-waiting-tokens": ("9", 9), "max-wait": ("2.5", 2.5),
    "draft": ("/", "/"), "lora": ("a=/", "a=/"), "max-loras": ("2", 2), "allow-runtime-lora-updating": (None, True),
    "itl-target": ("0.05", 0.05), "admin-port": ("0", 0), "admin-key": ("secret", "secret"),
    "models-memory": ("5GiB", 5 << 30),
    "api-key": ("12", "12"), "api-keys-file": (os.devnull,) * 2, "public-metrics": (None, True),
    "no-page": (None, True), "metrics-aliases": ("vllm", "vllm"), "log-format": ("json", "json"),
    "drain-timeout": ("1", 1), "stall-timeout": ("2", 2), "verify-weights": (None, True), "scrub-interval": ("0", 0),
}


def test_flags_variables_and_the_file_say_the_same(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    """Each option by each way, and what is left out has its default."""
    monkeypatch.setattr("fptq_server.main.listen", lambda config: contextlib.nullcontext())
    elsewhere = {"ray", "replicas"}  # which serve in another way: server/test_ray_serve.py
    assert {name.replace("_", "-") for name in cli.settings()} == {"artifact", *elsewhere, *GIVEN}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"artifact": "demo"} | {name: value for name, (_, value) in GIVEN.items()}))
    flags = [part for name, (text, _) in GIVEN.items() for part in (f"--{name}", text) if part is not None]
    variables = {f"FPTQ_{name.upper().replace('-', '_')}": text or "1" for name, (text, _) in GIVEN.items()}
    assert run("serve", "demo", *flags) == 0
    assert run("serve", "--config", str(file)) == 0
    monkeypatch.setenv("FPTQ_CONFIG", str(file))
    assert run("serve") == 0
    monkeypatch.delenv("FPTQ_CONFIG")
    with pytest.MonkeyPatch.context() as patch:
        for name, text in variables.items():
            patch.setenv(name, text)
        assert run("serve", "demo") == 0
    assert run("serve", "demo") == 0
    *same, (default_config, default_options) = served
    assert all(call == same[0] for call in same)
    config, options = same[0]
    left_alone = {"keep_alive_interval", "head_timeout", "body_timeout", "write_timeout", "max_body_bytes",
                  "max_file_bytes", "max_header_bytes", "max_prompts"}
    assert {field.name for field in fields(config)
            if getattr(config, field.name) == getattr(default_config, field.name)} == left_alone
    assert [name for name in options if options[name] == default_options[name]] == ["others", "listener"]


def test_flags_go_before_variables_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nmax-wait: 1\nmax_num_seqs: 1\nhost: null\napi-key: [a, b]\n")
    monkeypatch.setenv("FPTQ_PORT", "2")
    monkeypatch.setenv("FPTQ_MAX_WAIT", "2")
    assert run("config", "demo", "--config", str(file), "--port", "3", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert {name: shown[name] for name in ("artifact", "port", "max-wait", "max-num-seqs", "host", "api-key")} == {
        "artifact": {"value": "demo", "from": "the command line"},
        "port": {"value": 3, "from": "the command line"},
        "max-wait": {"value": 2.0, "from": "FPTQ_MAX_WAIT"},
        "max-num-seqs": {"value": 1, "from": f"max-num-seqs in {file}"},
        "host": {"value": "127.0.0.1", "from": "default"},
        "api-key": {"value": ["***", "***"], "from": f"api-key in {file}"},
    }


def test_what_config_prints_is_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [part for name, (text, _) in GIVEN.items() if name != "host" for part in (f"--{name}", text) if part]
    assert run("config", *flags) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert run("config", *flags, "--json") == run("config", "--config", str(tmp_path / "printed.yaml"), "--json") == 0
    first, again = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for name in ("api-key", "admin-key"):  # which are printed nowhere
        del first[name], again[name]
    assert {name: entry["value"] for name, entry in first.items()} == {
        name: entry["value"] for name, entry in again.items()}


@pytest.mark.parametrize(("variable", "line", "said"), [
    ("FPTQ_PORT=http://10.0.0.1", "", "Invalid value for 'FPTQ_PORT': 'http://10.0.0.1' is not a valid integer "
     "(see"),
    ("FPTQ_THREADS=two", "", "Invalid value for 'FPTQ_THREADS': 'two' is not a valid integer (see"),
    ("FPTQ_MAX_WAIT=soon", "", "Invalid value for 'FPTQ_MAX_WAIT': 'soon' is not a valid number (see"),
    ("FPTQ_ROOT_PATH=llm", "", "FPTQ_ROOT_PATH must be a path such as /llm"),
    ("FPTQ_PUBLIC_METRICS=perhaps", "", "FPTQ_PUBLIC_METRICS must be true or false"),
    ("FPTQ_CORS_ORIGINS=[1", "", "FPTQ_CORS_ORIGINS must be a text or a list of texts"),
    ("FPTQ_PROT=1", "", "the variable FPTQ_PROT is no setting; did you mean FPTQ_PORT?"),
    ("", "max-wiat: 1", "max-wiat in FILE is no setting; did you mean max-wait?"),
    ("", "xyzzy: 1", "xyzzy in FILE is no setting; `fptq config` lists what there is"),
    ("", "port: [1]", "port in FILE must be a text or a number"),
    ("", "port: true", "port in FILE must be a text or a number"),
    ("", "port: x", "Invalid value for 'port in FILE': 'x' is not a valid integer (see"),
    ("", "drain-timeout: -1", "Invalid value for 'drain-timeout in FILE': -1.0 is not at least 0"),
    ("", "root-path: llm", "root-path in FILE must be a path such as /llm"),
    ("", "api-key: 5", "api-key in FILE must be a text or a list of texts"),
    ("", "max-wait: 1\nmax_wait: 2", "FILE has a setting twice"),
    ("", "- port", "FILE must have a setting a line"), ("", "port: [", "FILE cannot be read: "),
    ("", "\x00", "FILE cannot be read: "),
])
def test_wrong_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                  variable: str, line: str, said: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(line)
    if variable:
        monkeypatch.setenv(*variable.split("=", 1))
    assert run("config", "--config", str(file)) in (1, 2)
    out, err = capsys.readouterr()
    assert err.startswith(f"fptq: {said.replace('FILE', str(file))}")
    assert (out, err.count("\n")) == ("", 1)


def test_more_threads_than_cpus(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    cpus = os.cpu_count() or 1
    assert run("serve", "demo", "--port", "0", "--threads", str(cpus + 1)) == 2
    assert f"'--threads': {cpus + 1} is more than this machine's {cpus} CPUs" in capsys.readouterr().err
    assert run("serve", "demo", "--port", "0", "--threads", str(cpus)) == 0
    assert len(served) == 1


def test_bench_of_nothing_or_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench") == run("bench", "demo", "--shape", "llama-3.2-1b") == 2
    assert "either an ARTIFACT or --shape" in capsys.readouterr().err


def test_quantize_options_are_the_functions_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    """Every option has the name and the default of an argument of `quantize` or a field of its `Calibration`, and
    reaches it."""
    from fptq_runtime.quantizer import pipeline
    from fptq_runtime.quantizer.samples import Calibration

    given: dict[str, object] = {}

    def quantize(*arguments: object, **options: object) -> None:
        given.update(options)
        raise FptqError("enough")

    signature = inspect.signature(pipeline.quantize)
    monkeypatch.setattr(pipeline, "quantize", quantize)
    assert run("quantize", "demo", "out") == 1
    assert {**given, "progress": False} == {name: signature.parameters[name].default for name in given}
    assert {*signature.parameters} == {"model", "out", "recipe", "watcher", *given}  # the last is no setting
    (tmp_path / "a").touch()
    file = str(tmp_path / "a")
    run("quantize", "demo", "out", "--calibration", "self", "--num-samples", "7", "--sample-length", "9", "--lengths",
        file, "--text", file, "--text-tokens", "11", "--seed", "3", "--overwrite")
    assert given == {"calibration": Calibration("self", num_samples=7, sample_length=9, lengths=Path(file), seed=3),
                     "text": Path(file), "text_tokens": 11, "overwrite": True, "progress": True}
    assert all(getattr(given["calibration"], field.name) != field.default for field in fields(Calibration))


@pytest.mark.parametrize(("arguments", "named"), [
    (["--num-samples", "0"], "--num-samples"), (["--sample-length", "1"], "--sample-length"),
    (["--lengths", "absent.csv"], "absent.csv"), (["--text", "absent.txt"], "absent.txt"),
    (["--calibration", "slef"], "did you mean self"), (["--calibration", "/"], "/ is a directory, not a file ("),
    (["--recipe", "fqtp"], "fqtp is neither a preset nor a file; did you mean fptq? ("),
    (["--recipe", "xyz"], "the presets are fptq-max, fptq-best, fptq,"),
    (["--recipe", "/"], "/ is a directory, not a file ("),
    (["--text-tokens", "x"], "--text-tokens"),
])
def test_wrong_calibration_options(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", "demo", "out", *arguments) == 2
    err = capsys.readouterr().err
    assert named in err
    assert err.count("\n") == 1


def test_a_recipe_is_never_taken_for_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("node", "mine.yaml", "texts"):
        (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).touch()
    for recipe, meant in {"none": "the presets are", "mine.yam": "did you mean mine.yaml?"}.items():
        assert run("quantize", "demo", "out", "--recipe", recipe) == 2
        assert meant in (said := capsys.readouterr().err)
        assert "node" not in said
    assert run("quantize", "demo", "out", "--text", "text") == 2
    assert "did you mean" not in capsys.readouterr().err


def test_an_option_means_the_same_in_every_command() -> None:
    shown = {(name, option.opts[0]): option.help for name, command in cli.cli.commands.items()
             for option in command.params if isinstance(option, click.Option) and not option.hidden}
    for option in ("--threads", "--max-tokens", "--text-tokens", "--num-samples"):
        texts = {text.partition(" (")[0] for (_, name), text in shown.items() if name == option and text}
        assert len(texts) <= 1, option
    computing = {"quantize", "serve", "batch", "config", "eval", "compare", "analyze", "generate", "export", "verify",
                 "bench"}
    assert {name for name, option in shown if option == "--threads"} == computing
    assert [name for name, option in shown if option == "--max-tokens"] == ["generate"]


def test_every_option_of_serve_is_in_the_docs() -> None:
    page = Path(__file__).parent.parent / "docs" / "serve.md"
    options = {option.opts[0] for option in cli.cli.commands["serve"].params
               if isinstance(option, click.Option) and not option.hidden} - {"--help", "--config"}
    described = set(re.findall(r"--[a-z][\w-]+", "".join(re.findall(r"^\| (`--.+?) \|", page.read_text(), re.M))))
    assert options == described


@pytest.mark.parametrize("option", ["--text-tokens", "--max-tokens"])
def test_the_older_name_of_text_tokens_is_taken(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fptq_runtime.measure import evaluate

    given: dict[str, Any] = {}
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **options: given.update(options))
    assert run("eval", str(locate.DEMO_MODEL), "--text", os.devnull, option, "12") == 1
    assert given["max_tokens"] == 12


@pytest.mark.parametrize("command", [
    ["quantize", "demo", "."], ["quantize", "demo", ".", "--max-loss", "5%"],
    ["export", "demo", ".", "--target", "vllm"],
    ["compare", "demo", "--recipes", "rtn", "--out", "mine.txt/x"], ["analyze", "demo", "--out", "mine.txt/x"],
])
def test_an_output_in_the_way_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str],
                                               capsys: pytest.CaptureFixture[str]) -> None:
    def no_work(*_: Any, **__: Any) -> None:
        raise AssertionError

    (tmp_path / "mine.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fptq_runtime.models.loader.Checkpoint.__init__", no_work)
    monkeypatch.setattr("fptq_runtime.quantizer.calibrate.packaged_text", no_work)
    monkeypatch.setattr(locate, "find_artifact", no_work)
    assert run(*command) == 1
    assert ("mine.txt is a file" if "mine.txt/x" in command else "choose another output") in capsys.readouterr().err


def test_whoever_is_told_to_stop_stops(tmp_path: Path) -> None:
    """At any time, also as a container's first process, for which the signal has no default."""
    program = ("import os, signal, sys, click\nfrom fptq_runtime import cli\n"
               "cli.cli.add_command(click.Command('wait', callback=lambda: (os.kill(os.getpid(), 15), print('no'))))\n"
               "cli.main(['wait'])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=Path(fptq_runtime.__file__).parent.parent)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")
