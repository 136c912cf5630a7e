"""The Helm chart, rendered by Helm and checked against Kubernetes' own schemas."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from shared.config import CloudConfig
from shared.settings import load
from tests.deploy.tools import output, run

KUBERNETES = ("1.27", "1.31", "1.34", "1.37")

EVERYTHING = {
    "security.tlsSecret": "tls",
    "security.clientCaSecret": "ca",
    "security.tokensSecret": "tokens",
    "huggingFaceSecret": "hub",
    "autoscaling.enabled": "true",
    "gateway.enabled": "true",
    "gateway.hostnames[0]": "duet.example.org",
    "metrics.serviceMonitor": "true",
    "modelCache.storageClassName": "fast",
    "engine.tensor_parallel_size": "2",
    "networkPolicy.from[0].podSelector.matchLabels.app": "balancer",
}
PLAIN = {"security.insecure": "true", "target": "llama-cpp", "model": "qwen2.5-coder-1.5b", "gpus": "0"}
CUSTOM = {"GRPCRoute", "BackendTrafficPolicy", "ServiceMonitor"}


def rendered(deploy: Path, values: dict[str, str]) -> dict[str, dict]:
    """Kind (and name, for a second of one kind) -> object."""
    flags = [flag for name, value in values.items() for flag in ("--set", f"{name}={value}")]
    text = output("helm", "template", "site", deploy / "kubernetes/duet-cloud", *flags)
    objects: dict[str, dict] = {}
    for item in filter(None, yaml.safe_load_all(text)):
        key = item["kind"]
        objects[f"{key}/{item['metadata']['name']}" if key in objects else key] = item
    return objects


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", [PLAIN, EVERYTHING], ids=["without a GPU", "with everything"])
def test_each_object_is_valid_kubernetes(deploy, values, version):
    for kind, item in rendered(deploy, values).items():
        if item["kind"] not in CUSTOM:
            kubernetes_validate.validate(item, version, strict=True)
            assert item["metadata"]["labels"]["app.kubernetes.io/instance"] == "site", kind


def test_helm_lint_finds_nothing(deploy):
    output("helm", "lint", "--strict", deploy / "kubernetes/duet-cloud", "--set", "security.insecure=true")


def test_without_encryption_it_says_what_to_set(deploy):
    done = run("helm", "template", "site", deploy / "kubernetes/duet-cloud")
    assert done.returncode != 0
    assert "security.tlsSecret" in done.stderr


@pytest.mark.parametrize("wrong", ["replicas=0", "gpus=-1", "target=tensorrt", "replcas=2"])
def test_a_value_that_cannot_be_is_refused_by_name(deploy, wrong):
    chart = deploy / "kubernetes/duet-cloud"
    done = run("helm", "template", "site", chart, "--set", "security.insecure=true", "--set", wrong)
    assert done.returncode != 0
    assert wrong.partition("=")[0] in done.stderr


@pytest.mark.parametrize("values", [PLAIN, EVERYTHING], ids=["without a GPU", "with everything"])
def test_the_service_takes_the_settings_that_are_rendered(deploy, values, tmp_path):
    config = rendered(deploy, values)["ConfigMap"]["data"]["duet-cloud.yaml"]
    file = tmp_path / "duet-cloud.yaml"
    file.write_text(config)
    settings, _ = load(
        CloudConfig, flags={}, file=file, file_name="duet-cloud.yaml", env_prefix="DUET_CLOUD_"
    )
    assert settings.listen == "0.0.0.0:50151"
    assert settings.drain_s == 30


def test_streams_may_finish_before_kubernetes_kills(deploy):
    pod = rendered(deploy, PLAIN | {"drainSeconds": "100"})["StatefulSet"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 100 + 5  # what preStop sleeps


def test_a_gpu_is_asked_for_and_limited_alike(deploy):
    [container] = rendered(deploy, EVERYTHING | {"gpus": "2"})["StatefulSet"]["spec"]["template"]["spec"][
        "containers"
    ]
    asked, limited = (container["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits"))
    assert asked == limited == 2


def test_the_pod_runs_without_root_or_privileges(deploy):
    pod = rendered(deploy, EVERYTHING)["StatefulSet"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    [container] = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False


def test_what_is_scaled_by_the_autoscaler_has_no_fixed_number_of_replicas(deploy):
    objects = rendered(deploy, EVERYTHING)
    assert "replicas" not in objects["StatefulSet"]["spec"]
    assert (
        objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        == (objects["StatefulSet"]["metadata"]["name"])
    )


def test_the_autoscaler_asks_for_what_the_adapter_offers(deploy):
    [asked] = rendered(deploy, EVERYTHING)["HorizontalPodAutoscaler"]["spec"]["metrics"]
    [rule] = yaml.safe_load((deploy / "kubernetes/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == asked["pods"]["metric"]["name"]


def test_a_changed_setting_restarts_the_pods(deploy):
    one, other = (
        rendered(deploy, PLAIN | {"drainSeconds": seconds})["StatefulSet"]["spec"]["template"]["metadata"]
        for seconds in ("10", "20")
    )
    assert one["annotations"] != other["annotations"]


def test_the_route_hashes_the_session_that_edges_send(deploy):
    from protos.wire import SESSION

    policy = rendered(deploy, EVERYTHING)["BackendTrafficPolicy"]
    assert policy["spec"]["loadBalancer"]["consistentHash"]["header"]["name"] == SESSION


def test_the_ray_manifest_is_valid_beside_its_custom_resource(deploy):
    for item in yaml.safe_load_all((deploy / "kubernetes/raycluster.yaml").read_text()):
        if item["kind"] == "RayCluster":
            for group in (item["spec"]["headGroupSpec"], *item["spec"]["workerGroupSpecs"]):
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}}
                kubernetes_validate.validate(pod | {"spec": group["template"]["spec"]}, "1.34", strict=True)
        else:
            kubernetes_validate.validate(item, "1.34", strict=True)
