"""docker/kubernetes: the chart as Helm renders it, the manifests against the schemas of those who read them and against
the server that they run. The schemas of KServe and of the inference extension are in no package: of their manifests
names, ports, metrics and what is a pod's are compared."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import fptq_runtime
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
CHART = ROOT / "docker/kubernetes/chart"
needs_helm = pytest.mark.skipif(importlib.util.find_spec("helm_python") is None, reason="helm-python-sdk is not here")

EVERYTHING: dict[str, Any] = {
    "image": "registry.example/fptq@sha256:" + 64 * "0", "model": {"claim": "models", "subPath": "llama"},
    "args": ["--max-model-len", "8192", "--served-model-name", "a: b"], "apiKeysSecret": "keys", "replicas": 3,
    "resources": {"limits": {"nvidia.com/gpu": 1}}, "preStopSeconds": 7, "drainTimeout": 90, "startupSeconds": 1800,
    "autoscaling": {"by": "keda", "maxReplicas": 100, "waiting": 4, "prometheus": "https://prometheus.example"},
    "env": [{"name": "FPTQ_THREADS", "value": "4"}], "volumes": [{"name": "loras", "emptyDir": {}}],
    "volumeMounts": [{"name": "loras", "mountPath": "/loras"}], "podAnnotations": {"example.com/a": "1"},
    "pod": {"nodeSelector": {"disk": "fast"}, "tolerations": [{"operator": "Exists"}],
            "imagePullSecrets": [{"name": "pull"}]},
    "service": {"type": "LoadBalancer", "port": 8080},
    "networkPolicy": {"from": [{"podSelector": {}}], "egress": [{"ports": [{"port": 4318}]}]},
    "prometheusOperator": {"enabled": True, "labels": {"release": "stack"},
                           "authorization": {"credentials": {"name": "keys", "key": "metrics"}}},
    "inferencePool": {"enabled": True, "picker": {"name": "epp", "port": 9003},
                      "objectives": {"interactive": None, "a": 1, "b": -1}},
}
OPERATORS = ["ServiceMonitor", "PrometheusRule", "InferencePool", "InferenceObjective", "InferenceObjective"]
VALUES: dict[str, tuple[dict[str, Any], list[str]]] = {  # and the kinds that they make, beside the first three
    "default": ({}, ["HorizontalPodAutoscaler", "NetworkPolicy"]),
    "everything": (EVERYTHING, ["ScaledObject", "NetworkPolicy", *OPERATORS]),
    "hpa": (EVERYTHING | {"autoscaling": {"by": "hpa"}}, ["HorizontalPodAutoscaler", "NetworkPolicy", *OPERATORS]),
    "fixed": ({"autoscaling": {"by": "none"}, "networkPolicy": {"enabled": False}}, []),
    "kserve": (EVERYTHING | {"kserve": True}, ["ServingRuntime", "InferenceService"])}


def helm(call: str, *arguments: object) -> Any:
    """The value of an expression in a process of its own: Go's runtime would take this one's signals."""
    run = subprocess.run(
        [sys.executable, "-c", "import sys, json, helm_python as helm; chart, *args = map(json.loads, sys.argv[1:]); "
         f"print(json.dumps({call}))", json.dumps(str(CHART)), *map(json.dumps, arguments)],
        capture_output=True, text=True, timeout=60)
    if run.returncode:
        raise ValueError(run.stderr)
    return json.loads(run.stdout)


def rendered(values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    files: dict[str, str] = helm("helm.Chart.load(chart).render(args[0], name=args[1])", values, name)
    return [document for path, text in files.items() if path.endswith(".yaml")
            for document in yaml.safe_load_all(text) if document]


def check_schema(manifest: dict[str, Any]) -> None:
    """As its kind's own schema has it, with no field that this does not know."""
    group = manifest["apiVersion"].split("/")[0]
    if group in ("keda.sh", "monitoring.coreos.com"):
        module = pytest.importorskip("cloudcoil.models.keda.v1alpha1" if group == "keda.sh" else
                                     "cloudcoil.models.prometheus_operator.v1")
        model = getattr(module, manifest["kind"]).model_validate(manifest)
        assert model.model_dump(mode="json", by_alias=True, exclude_unset=True) == manifest
        return
    if manifest["kind"] == "ServingRuntime":
        spec = {name: manifest["spec"][name] for name in ("containers", "volumes")}
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": manifest["metadata"], "spec": spec}
    elif manifest["kind"] in ("InferencePool", "InferenceObjective", "InferenceService"):
        return
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("manifest", [*MANIFESTS, *ADDED.values()], ids=lambda manifest: manifest["kind"])
def test_schemas(manifest: dict[str, Any]) -> None:
    check_schema(manifest)


@pytest.mark.parametrize("kind", ["Deployment", "NetworkPolicy", "ScaledObject", "ServiceMonitor", "ServingRuntime"])
def test_schemas_know_every_field(kind: str) -> None:
    """What the other tests say would be nothing if a schema took all."""
    manifest = copy.deepcopy((KINDS | ADDED)[kind])
    (manifest["spec"]["containers"][0] if kind == "ServingRuntime" else manifest["spec"])["unheard_of"] = 1
    with pytest.raises(Exception, match=r"unheard_of|assert"):
        check_schema(manifest)


@needs_helm
def test_the_manifests_are_what_the_chart_renders() -> None:
    script = ROOT / "docker/kubernetes/render.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@needs_helm
@pytest.mark.parametrize(("values", "expected"), VALUES.values(), ids=VALUES)
def test_helm_renders_values_to_manifests(values: dict[str, Any], expected: list[str]) -> None:
    manifests = rendered(values, "llm")
    for manifest in manifests:
        check_schema(manifest)
        assert manifest["metadata"]["name"].split("-")[0] == "llm"
    text = json.dumps(manifests, sort_keys=True)
    assert not re.findall(r'(instance": |job=.)"?fptq', text)  # nothing is of another release's pods
    for given in (values.get(name) for name in ("image", "env", "volumes", "volumeMounts")):
        assert json.dumps(given or "", sort_keys=True)[1:-1] in text
    kinds = {manifest["kind"]: manifest for manifest in manifests}
    if "kserve" in values:
        assert sorted(manifest["kind"] for manifest in manifests) == sorted(expected)
        pod, [container] = kinds["InferenceService"]["spec"]["predictor"], kinds["ServingRuntime"]["spec"]["containers"]
        assert pod["model"]["storageUri"] == "pvc://models/llama"
    else:
        assert sorted(manifest["kind"] for manifest in manifests) == sorted(
            ["Deployment", "Service", "PodDisruptionBudget", *expected])
        pod = kinds["Deployment"]["spec"]["template"]["spec"]
        [container] = pod["containers"]
        fixed = values.get("autoscaling") == {"by": "none"}
        assert kinds["Deployment"]["spec"].get("replicas") == (2 if fixed else None)  # whose they are elsewhere
    assert pod.get("nodeSelector") == values.get("pod", {}).get("nodeSelector")
    keys = "/etc/fptq/keys"
    command, artifact, *options = [__file__ if argument == keys else argument for argument in container["args"]]
    given = cli.commands[command].make_context("fptq serve", [artifact, *options]).params
    assert given["drain_timeout"] == values.get("drainTimeout", 30)
    assert pod["terminationGracePeriodSeconds"] > (
        container["lifecycle"]["preStop"]["sleep"]["seconds"] + given["drain_timeout"] + CLOSE_TIMEOUT)
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == values.get("startupSeconds", 600)
    assert given["metrics_aliases"] == ("vllm" if "inferencePool" in values else "none")
    assert ("a: b" in container["args"]) == ("args" in values)
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert (keys in container["args"]) == (str(Path(keys).parent) in mounts) == ("apiKeysSecret" in values)


@needs_helm
def test_helm_finds_nothing_to_mend() -> None:
    found = helm("helm.lint(chart, strict=True)")
    assert not [each for each in found["messages"] if each["severity"] > 1], found  # 1: a suggestion


@needs_helm
@pytest.mark.parametrize(("values", "named"), [
    ({"replica": 2}, "replica"), ({"replicas": 0}, "/replicas"), ({"image": ""}, "/image"),
    ({"autoscaling": {"by": "vpa"}}, "/autoscaling/by"), ({"args": ["--port", "1"]}, "/args/0"),
    ({"args": ["--drain-timeout=5"]}, "/args/0"), ({"pod": {"containers": []}}, "'containers'"),
    ({"model": {"subPath": "/"}}, "/model/subPath"), ({"drainTimeout": 2.5}, "/drainTimeout")],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "")
def test_helm_refuses_what_the_schema_does(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        rendered(values, "llm")


def test_the_schema_has_each_value() -> None:
    """Neither has one that the other lacks; what is "" or an empty list or map in values.yaml may hold anything."""
    schema: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    jsonschema_rs.meta.validate(schema)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema_rs.validator_for(schema).validate(values)

    def names(value: Any, of: dict[str, Any], path: str) -> None:
        if isinstance(value, dict) and "properties" in of:
            assert value.keys() == of["properties"].keys() - {"global"}, path
            assert of["additionalProperties"] is False, path
            for name, each in value.items():
                names(each, of["properties"][name], f"{path}.{name}")

    names(values, schema, "values")
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    assert set(re.findall(r"\.Values\.(\w+)", templates)) == values.keys()


def test_the_chart_is_of_this_version() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == fptq_runtime.__version__


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
