"""docker/kubernetes against Kubernetes' own schemas and against the server that it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fptq_runtime.cli import cli
from fptq_server.auth import PUBLIC_PATHS
from fptq_server.main import CLOSE_TIMEOUT

ROOT = Path(__file__).parent.parent
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "docker/kubernetes/fptq.yaml").read_text()))
KINDS = {manifest["kind"]: manifest for manifest in MANIFESTS}
POD: dict[str, Any] = KINDS["Deployment"]["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_schemas(manifest: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_everything_is_of_the_same_pods() -> None:
    labels = KINDS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [KINDS["Deployment"]["spec"]["selector"]["matchLabels"], KINDS["Service"]["spec"]["selector"],
                 KINDS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
                 KINDS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]]
    assert all(selector == labels for selector in selectors)
    scaled = KINDS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", KINDS["Deployment"]["metadata"]["name"])


def test_the_command_is_the_servers() -> None:
    command, artifact, *options = CONTAINER["args"]
    serve = cli.commands[command]
    given = serve.make_context("fptq serve", [artifact, *options]).params
    assert given["host"] == "0.0.0.0"
    [port] = CONTAINER["ports"]
    assert given["port"] == port["containerPort"]
    assert {mount["mountPath"] for mount in CONTAINER["volumeMounts"]} == {artifact, "/var/cache", "/tmp"}
    prepares = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] > prepares + given["drain_timeout"] + CLOSE_TIMEOUT


def test_probes() -> None:
    paths = {name: CONTAINER[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    assert set(paths.values()) <= PUBLIC_PATHS
    [port] = CONTAINER["ports"]
    ports = [CONTAINER[f"{name}Probe"]["httpGet"]["port"] for name in paths]
    ports += [KINDS["Service"]["spec"]["ports"][0]["targetPort"]]
    ports += [KINDS["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"]]
    assert set(ports) == {port["name"]}
    readiness = CONTAINER["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= CONTAINER["lifecycle"]["preStop"]["sleep"][
        "seconds"]


def test_it_scales_by_metrics_that_exist() -> None:
    defined = set(re.findall(r'"(fptq_\w+)"', (ROOT / "server/fptq_server/metrics.py").read_text()))
    scaled_by = {metric["pods"]["metric"]["name"] for metric in KINDS["HorizontalPodAutoscaler"]["spec"]["metrics"]}
    assert scaled_by
    assert scaled_by <= defined


def test_it_runs_as_nobody_who_may_write() -> None:
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert re.findall(r"^USER (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1] == str(
        POD["securityContext"]["runAsUser"])
    assert CONTAINER["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                            "capabilities": {"drop": ["ALL"]}}
