"""docker/kubernetes against Kubernetes' own schemas and against the server that it runs. Those of what others add to
Kubernetes are not at hand: of such manifests names, ports and metrics are compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fptq_runtime.cli import cli
from fptq_server.auth import PUBLIC_PATHS
from fptq_server.config import ModelCard
from fptq_server.main import CLOSE_TIMEOUT
from fptq_server.metrics import Metrics

ROOT = Path(__file__).parent.parent
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "docker/kubernetes/fptq.yaml").read_text()))
KINDS = {manifest["kind"]: manifest for manifest in MANIFESTS}
POD: dict[str, Any] = KINDS["Deployment"]["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
ADDED: dict[str, dict[str, Any]] = {
    manifest["kind"]: manifest for path in (ROOT / "docker/kubernetes").glob("*.yaml") if path.name != "fptq.yaml"
    for manifest in yaml.safe_load_all(path.read_text())}
RUNTIME: dict[str, Any] = ADDED["ServingRuntime"]["spec"]


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


def test_prometheus_operator_scrapes_the_service_and_has_the_rules() -> None:
    monitor, service = ADDED["ServiceMonitor"]["spec"], KINDS["Service"]
    assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
    [endpoint], [port] = monitor["endpoints"], service["spec"]["ports"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")
    rules = yaml.safe_load((ROOT / "docker/alerts.yml").read_text())
    assert ADDED["PrometheusRule"]["spec"] == rules
    exprs = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    jobs = set(re.findall('job="(.*?)"', "".join(exprs)))
    assert jobs == {service["metadata"]["name"]}  # the operator calls a job as its service


def test_keda_scales_as_the_autoscaler() -> None:
    scaler, keda = KINDS["HorizontalPodAutoscaler"]["spec"], ADDED["ScaledObject"]["spec"]
    assert keda["scaleTargetRef"] == {"name": scaler["scaleTargetRef"]["name"]}
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (scaler["minReplicas"], scaler["maxReplicas"])
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == scaler["behavior"]
    [metric], [trigger] = scaler["metrics"], keda["triggers"]
    assert trigger["metadata"]["query"] == (
        f'sum({metric["pods"]["metric"]["name"]}{{job="{KINDS["Service"]["metadata"]["name"]}"}})')
    assert trigger["metadata"]["threshold"] == metric["pods"]["target"]["averageValue"]


def test_the_inference_gateway_picks_among_the_pods() -> None:
    pool, objective = ADDED["InferencePool"], ADDED["InferenceObjective"]
    assert pool["spec"]["selector"] == KINDS["Deployment"]["spec"]["selector"]
    assert [port["number"] for port in pool["spec"]["targetPorts"]] == [CONTAINER["ports"][0]["containerPort"]]
    group, _ = pool["apiVersion"].split("/")
    assert objective["spec"]["poolRef"] == {"group": group, "kind": pool["kind"], "name": pool["metadata"]["name"]}


def test_the_endpoint_picker_finds_its_metrics() -> None:
    """Names and labels are those of the inference extension's model server protocol, for vLLM."""
    engine = {"block_size": 32, "num_blocks": 100, "max_loras": 4}
    card = ModelCard("demo", 0, 1024, 4096, engine=engine, adapters={"b", "a"})
    text = Metrics("0", card, "vllm").exposition().decode()
    gauges = {family.name: family.samples for family in text_string_to_metric_families(text) if family.type == "gauge"}
    for name in ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        [sample] = gauges[name]
        assert sample.value == 0
    [sizes], [adapters] = gauges["vllm:cache_config_info"], gauges["vllm:lora_requests_info"]
    assert (sizes.labels["block_size"], sizes.labels["num_gpu_blocks"]) == ("32", "100")
    assert {name: value for name, value in adapters.labels.items() if "lora" in name} == {
        "max_lora": "4", "running_lora_adapters": "a,b", "waiting_lora_adapters": ""}


def test_kserve_runs_the_same_container() -> None:
    [container] = RUNTIME["containers"]
    command, artifact, *options = container["args"]
    given = cli.commands[command].make_context("fptq serve", [artifact, *options]).params
    [port] = container["ports"]
    assert (given["host"], given["port"]) == ("0.0.0.0", port["containerPort"])
    assert RUNTIME["annotations"]["prometheus.kserve.io/port"] == str(port["containerPort"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        ours = CONTAINER[probe]
        assert container[probe] == ours | {"httpGet": ours["httpGet"] | {"port": port["containerPort"]}}
    assert all(container[part] == CONTAINER[part] for part in ("image", "lifecycle", "resources"))
    assert container["securityContext"] == CONTAINER["securityContext"] | {
        name: POD["securityContext"][name] for name in ("runAsNonRoot", "runAsUser")}
    assert container["volumeMounts"] == [mount for mount in CONTAINER["volumeMounts"] if mount["name"] != "model"]
    assert RUNTIME["volumes"] == [volume for volume in POD["volumes"] if volume["name"] != "model"]
    predictor = ADDED["InferenceService"]["spec"]["predictor"]
    assert predictor["terminationGracePeriodSeconds"] == POD["terminationGracePeriodSeconds"]
    assert predictor["model"]["modelFormat"]["name"] in {model["name"] for model in RUNTIME["supportedModelFormats"]}
