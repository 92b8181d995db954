"""The package as others get it: a wheel, its metadata, the files around it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import fptq
import fptq_runtime
from fptq_runtime.locate import DEMO, find_artifact
from fptq_server.config import ServerConfig
from fptq_server.main import CLOSE_TIMEOUT

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the demo quantized, as a release; from a copy, so that nothing but what git would ship is there."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for name in ("fptq", "fptq_runtime", "server"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
               str(out), "--config-settings", f"cmake.define.FPTQ_DEMO={find_artifact(DEMO)}", str(source)]
    subprocess.run(command, check=True)
    [path] = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(name).decode() for name in names if name.endswith("METADATA")]
    assert f"\nVersion: {fptq_runtime.__version__}\n" in metadata
    folders = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert folders == {"fptq", "fptq_runtime", "fptq_server"}
    assert any(re.fullmatch(r"fptq_runtime/_native\..*", name) for name in names)
    assert {name.split("/")[-1] for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert {"fptq/py.typed", "fptq_runtime/py.typed", "fptq_server/py.typed"} <= set(names)
    assert {"fptq_runtime/demo/model.safetensors", "fptq_runtime/demo-w4a8/fptq.json"} <= set(names)
    for folder in ("demo", "quantizer/data"):
        shipped = {f"fptq_runtime/{folder}/{file.name}" for file in (ROOT / "fptq_runtime" / folder).iterdir()
                   if file.is_file()}
        assert shipped <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".pyc"))]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel and its dependencies, but not this checkout."""
    environment = tmp_path_factory.mktemp("installed")
    venv.create(environment, with_pip=False)
    packages = sysconfig.get_path("purelib", vars={"base": str(environment)})
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, str(wheel)]
    subprocess.run(command, check=True)
    # Only the directories are added: the .pth file of an editable install in one is not run.
    dependencies = [path for path in sys.path if Path(path).name == "site-packages"]
    (Path(packages) / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return environment / "bin" / "python"


def run_outside(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_wheel_runs_outside_the_clone_without_torch(installed: Path, tmp_path: Path) -> None:
    def fptq(*arguments: str) -> str:
        program = ("import sys; sys.argv[0] = 'fptq'; sys.modules.update(torch=None, transformers=None)\n"
                   "from fptq_runtime.cli import main; main()")
        done = run_outside([str(installed), "-c", program, *arguments], tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert fptq("--version") == f"fptq {fptq_runtime.__version__}\n"
    answer = json.loads(fptq("generate", "demo", "Once upon a time", "--max-tokens", "8", "--backend", "native",
                             "--json"))
    assert len(answer["token_ids"]) == 8
    assert "golden values agree" in fptq("verify", "demo")
    program = "import fptq; fptq.load('demo').generate(['Once upon a time'], fptq.SamplingParams(max_tokens=8))"
    assert run_outside([str(installed), "-c", program], tmp_path).stderr == ""


@pytest.mark.slow
def test_serves_beside_files_that_have_our_words_for_names(installed: Path, tmp_path: Path) -> None:
    """`python -m` looks in the working directory first; nothing of ours has a name that one would give a file there."""
    for name in ("server", "app", "config", "engine", "errors", "main"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')\n")
    serve = [str(installed), "-m", "fptq_runtime.cli", "serve"]
    shown = run_outside([*serve, "--help"], tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    # The address is refused by fptq_server, before the model is looked for.
    refused = run_outside([*serve, "demo", "--host", "192.0.2.1"], tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "fptq: 192.0.2.1 is not an address of this machine; use --host 127.0.0.1 or 0.0.0.0\n"


def test_fptq_is_fptq_runtime_by_another_name() -> None:
    assert fptq.__all__ == fptq_runtime.__all__
    for name in fptq.__all__:
        assert getattr(fptq, name) is getattr(fptq_runtime, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fptq.nothing  # noqa: B018


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_where_it_does_not_run_pip_says_so_before_it_resolves_or_compiles(system: str) -> None:
    pytest.importorskip("scikit_build_core")
    program = (f"import sys, scikit_build_core.build as backend; sys.platform = {system!r}\n"
               "backend.prepare_metadata_for_build_wheel('nowhere')")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 7
    [sentence] = (done.stdout + done.stderr).strip().splitlines()
    assert sentence.startswith("FPTQ Serve runs on Linux. On macOS run its container image; on Windows")


def test_dashboard_shows_metrics_that_exist() -> None:
    dashboard = (ROOT / "docker/grafana/dashboards/fptq.json").read_text()
    defined = set(re.findall(r'"(fptq_\w+)"', (ROOT / "server/fptq_server/metrics.py").read_text()))
    shown = set(re.findall(r"\bfptq_\w+", dashboard))
    assert shown
    for name in shown:
        bare = re.sub(r"_(bucket|sum|count)$", "", name)
        assert {name, bare, bare.removesuffix("_total"), bare.removesuffix("_info")} & defined, name


def test_compose_mounts_files_that_exist() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    mounts = [volume.split(":")[0] for service in compose["services"].values() for volume in service.get("volumes", ())]
    assert mounts
    for mount in mounts:
        assert mount in compose["volumes"] or (ROOT / "docker" / mount).exists(), mount
    scrape = yaml.safe_load((ROOT / "docker/prometheus.yml").read_text())["scrape_configs"][0]
    host, _, port = scrape["static_configs"][0]["targets"][0].partition(":")
    assert host in compose["services"]
    assert f":{port}" in compose["services"][host]["ports"][0]


def test_compose_starts_one_server_and_scrapes_it() -> None:
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    assert (services["fptq"]["profiles"], services["fptq-gpu"]["profiles"]) == (["cpu"], ["gpu"])
    assert services["fptq-gpu"]["networks"]["default"]["aliases"] == ["fptq"]
    assert "COMPOSE_PROFILES=cpu\n" in (ROOT / "docker/.env").read_text()


def test_systemd_takes_the_unit_and_leaves_time_to_drain(tmp_path: Path) -> None:
    unit = (ROOT / "docker/fptq.service").read_text()
    [timeout] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(timeout) > ServerConfig().drain_timeout + CLOSE_TIMEOUT
    assert "pip install dist/fptq_serve-*x86_64.whl" in unit  # no index has it
    assert {"RestartSec=5", "StateDirectory=fptq", "CacheDirectory=fptq"} <= set(unit.splitlines())
    assert set(re.findall(r"/var/\w+/fptq\b", (ROOT / "docs/operate.md").read_text())) == {
        "/var/cache/fptq", "/var/lib/fptq"}
    if (systemd := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd is not installed")
    there = tmp_path / "fptq.service"
    there.write_text(unit.replace("/opt/fptq/bin/fptq", sys.executable))
    verified = subprocess.run([systemd, "verify", "--man=no", there], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")


def test_one_dockerfile_makes_both_images() -> None:
    """A plain build is the CPU's; both run as a user by number, which Kubernetes can tell from root."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    stages = re.split(r"^FROM .* AS ", dockerfile, flags=re.MULTILINE)[1:]
    named = {stage.split("\n", 1)[0]: stage for stage in stages}
    assert stages[-1] == named["cpu"]
    for name in ("cpu", "gpu"):
        assert re.findall(r"^USER (.*)$", named[name], re.MULTILINE) == ["1000"]
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    assert services["fptq"]["build"] == ".."
    assert services["fptq-gpu"]["build"] == {"context": "..", "target": "gpu"}


def test_constraints_pin_every_direct_dependency() -> None:
    """Read as text: tomllib is not in Python 3.10."""
    project = (ROOT / "pyproject.toml").read_text().partition("[tool.scikit-build]")[0]
    listed = re.findall(r'"([\w-]+)(?:\[\w+\])?(?:>=[^"]*)?"[,\]]', project.partition("dependencies = [")[2])
    wanted = {name.lower().replace("_", "-") for name in listed} - {"fptq-serve"}  # an extra that has another
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {"torch", "fastapi", "nanobind", "lm-eval", "types-tqdm"} <= wanted
    assert wanted <= pinned


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/gpu.md"])
def test_a_page_names_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(r"[\w./-]*\w\.(?:py|md|cpp|h|yaml|toml)\b|\b[\w/]+/(?=`)", text)) - {"llama.cpp"}  # a peer
    folders = ("fptq_runtime", "server", "docs", "docker", "benchmarks", "tests")
    files = [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path.name for path in ROOT.iterdir()]
    assert named
    for name in named:
        assert any(f"/{path}".endswith("/" + name.rstrip("/")) for path in files), name
