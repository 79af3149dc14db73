"""The Helm chart: rendered with Helm's own library, equal to the overlays, changed by values, strict about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from reft_ray.serving import chart
from reft_ray.serving.strict import check_serve_config

Document = dict[str, Any]
Render = Callable[..., list[Document]]
ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "reft-ray"
helm = pytest.importorskip("helm_python", reason="helm-python-sdk, which renders charts, is missing")


@pytest.fixture(scope="module")
def render() -> Render:
    loaded = helm.Chart.load(ROOT / "charts" / "reft-ray")

    def render(profile: str = "filter", namespace: str = NAMESPACE, **values: Any) -> list[Document]:
        values["profile"] = profile
        loaded.validate_schema(values)
        made = loaded.render(values, name="reft", namespace=namespace)
        documents = yaml.load_all(made["reft-ray/templates/documents.yaml"], yaml.CSafeLoader)
        return [item for item in documents if item]

    return render


def one(documents: list[Document], kind: str, name: str | None = None) -> Document:
    (found,) = (d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"]))
    return found


def cluster_of(documents: list[Document]) -> Document:
    found: Document = one(documents, "RayService")["spec"]["rayClusterConfig"]
    return found


def pods(documents: list[Document]) -> list[Document]:
    cluster = cluster_of(documents)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_charts_files_are_those_of_the_overlays(manifests: Any) -> None:
    for name, content in chart.rendered(ROOT).items():
        assert (ROOT / name).read_text(encoding="utf-8") == content, f"{name}: run `reft-ray manifests chart`"


@pytest.mark.parametrize("profile", chart.PROFILES)
def test_without_values_the_chart_is_the_overlay(render: Render, manifests: Any, profile: str) -> None:
    """But for the namespace, which Helm creates."""
    expected = [d for d in manifests.build(f"overlays/{chart.PROFILES[profile]}") if d["kind"] != "Namespace"]

    def key(document: Document) -> tuple[str, str]:
        return document["kind"], document["metadata"]["name"]

    assert sorted(render(profile), key=key) == sorted(expected, key=key)


def test_the_chart_is_well_formed() -> None:
    found = helm.lint(ROOT / "charts" / "reft-ray")
    assert "ERROR" not in str(found)
    version = yaml.safe_load((ROOT / "charts/reft-ray/Chart.yaml").read_text())["appVersion"]
    assert f":{version}" in yaml.safe_load((ROOT / "cluster/templates/pods.yaml").read_text())["container"]["image"]


def test_every_document_moves_to_the_releases_namespace(render: Render) -> None:
    documents = render(namespace="safety")
    assert {d["metadata"].get("namespace") for d in documents if d["kind"] != "PriorityClass"} == {"safety"}


def test_images_by_version(render: Render) -> None:
    made = pods(render("service", image={"repository": "registry.example/reft", "tag": "0.3.1"}))
    images = {container["image"] for pod in made for container in pod["containers"]}
    assert images == {"registry.example/reft:0.3.1", "registry.example/reft:0.3.1-cuda"}


def test_groups_of_workers(render: Render) -> None:
    limits = {"requests": {"cpu": "16"}, "limits": {"cpu": "16"}}
    documents = render(
        groups={"gpu": {"minReplicas": 0, "maxReplicas": 4, "nodeSelector": {"pool": "a100"}, "resources": limits}}
    )
    cpu, gpu = cluster_of(documents)["workerGroupSpecs"]
    assert (gpu["minReplicas"], gpu["maxReplicas"], gpu["replicas"]) == (0, 4, 2)
    assert gpu["template"]["spec"]["nodeSelector"] == {"pool": "a100"}
    assert gpu["template"]["spec"]["containers"][0]["resources"] == limits
    assert cpu == cluster_of(render())["workerGroupSpecs"][0]


def test_weights_are_fetched_before_a_worker_starts(render: Render) -> None:
    digest = "a" * 64
    documents = render(
        models=[
            {"from": "s3://models/base", "to": "/mnt/reft/models/base", "sha256": digest},
            {"image": "registry.example/teacher:1", "to": "/mnt/teacher"},
        ]
    )
    head, *workers = pods(documents)
    assert "initContainers" not in head
    for pod in workers:
        (fetch,) = pod["initContainers"]
        (ray,) = pod["containers"]
        assert fetch["command"][:3] == ["reft-ray", "models", "download"]
        assert fetch["command"][3:] == ["s3://models/base", "/mnt/reft/models/base", "--sha256", digest]
        assert (fetch["securityContext"], fetch["image"]) == (ray["securityContext"], ray["image"])
        mounts = {mount["name"]: mount for mount in ray["volumeMounts"]}
        assert mounts["model-1"] == {"name": "model-1", "mountPath": "/mnt/teacher", "readOnly": True}
        assert {"name": "model-1", "image": {"reference": "registry.example/teacher:1"}} in pod["volumes"]


@pytest.mark.parametrize(("cloud", "address"), [("eks", "169.254.170.23/32"), ("gke", "169.254.169.254/32")])
def test_an_identity_is_annotated_and_may_reach_its_endpoint(render: Render, cloud: str, address: str) -> None:
    documents = render(identity={"annotations": {"role": "reader"}, "labels": {"x": "y"}, "metadata": cloud})
    account = one(documents, "ServiceAccount", "reft-ray-worker")["metadata"]
    assert account["annotations"] == {"role": "reader"}
    assert account["labels"].items() >= {"x": "y", "app.kubernetes.io/part-of": "reft-ray"}.items()
    assert {pod["serviceAccountName"] for pod in pods(documents)[1:]} == {"reft-ray-worker"}
    peers = [str(rule) for rule in one(documents, "NetworkPolicy", "to-https")["spec"]["egress"]]
    assert any(f"'cidr': '{address}'" in peer for peer in peers)
    assert not any(address in str(rule) for rule in render())


def test_one_clusters_name_is_on_every_target(render: Render) -> None:
    label = {"action": "replace", "targetLabel": "cluster", "replacement": "eu-1"}
    endpoints = one(render(clusterName="eu-1"), "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert all(endpoint["relabelings"][-1] == label for endpoint in endpoints)


def test_runbooks_and_the_namespace_of_prometheus(render: Render) -> None:
    documents = render(monitoring={"runbooks": "https://wiki.example/runbooks", "namespace": "observability"})
    text = yaml.safe_dump(documents)
    assert "github.com/reft-ray" not in text
    (group,) = (g for g in one(documents, "PrometheusRule")["spec"]["groups"] if g["name"] == "reft-alerts")
    for rule in group["rules"]:
        assert rule["annotations"]["runbook_url"] == f"https://wiki.example/runbooks/{rule['alert']}.md"
    assert "observability" in str(one(documents, "NetworkPolicy", "from-prometheus"))


def test_what_is_switched_off_is_absent(render: Render) -> None:
    documents = render(
        monitoring={"podMonitor": False, "rules": False, "dashboards": False},
        network={"enabled": False},
        priorities=False,
        storage={"existingClaim": "models"},
    )
    kinds = {d["kind"] for d in documents}
    assert kinds == {"RayService", "ServiceAccount", "PodDisruptionBudget"}
    claims = {
        v["persistentVolumeClaim"]["claimName"]
        for pod in pods(documents)
        for v in pod["volumes"]
        if "artefacts" in v["name"]
    }
    assert claims == {"models"}


def test_the_serve_config_is_merged_and_stays_valid(render: Render) -> None:
    vllm = {"name": "vllm", "route_prefix": "/vllm", "import_path": "ray.serve.llm:build_openai_app", "args": {}}
    documents = render(
        serve={
            "args": {"screenings_uri": "gs://mine/screenings"},
            "deployments": {"Teacher": {"user_config": {"teacher": "/mnt/teacher", "base": "/mnt/base"}}},
            "applications": [vllm],
        }
    )
    config = yaml.safe_load(one(documents, "RayService")["spec"]["serveConfigV2"])
    before = yaml.safe_load(one(render(), "RayService")["spec"]["serveConfigV2"])
    ours, other = config["applications"]
    assert other == vllm
    assert ours["args"]["screenings_uri"] == "gs://mine/screenings"
    (teacher,) = (d for d in ours["deployments"] if d["name"] == "Teacher")
    (earlier,) = (d for d in before["applications"][0]["deployments"] if d["name"] == "Teacher")
    assert teacher["user_config"] == {**earlier["user_config"], "teacher": "/mnt/teacher", "base": "/mnt/base"}
    assert teacher["autoscaling_config"] == earlier["autoscaling_config"]
    assert check_serve_config({**config, "applications": [ours]}) == []


def test_redis_upgrade_and_environment(render: Render) -> None:
    documents = render(
        redis={"address": "redis://cache:6379"},
        upgrade={"type": "NewClusterWithIncrementalUpgrade"},
        env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"},
        network={"egress": [{"to": [{"podSelector": {}}], "ports": [{"port": 4318}]}]},
    )
    service = one(documents, "RayService")["spec"]
    assert service["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    assert service["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"] == "redis://cache:6379"
    variable = {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}
    assert all(variable in pod["containers"][0]["env"] for pod in pods(documents))
    assert "4318" in str(one(documents, "NetworkPolicy", "to-https"))


@pytest.mark.parametrize(
    "values",
    [
        {"image": {"tag": "latest"}},
        {"models": [{"from": "http://models/base", "to": "/mnt/x"}]},
        {"models": [{"from": "s3://b/m", "to": "/etc"}]},
        {"models": [{"from": "s3://b/m", "to": "/mnt/m", "sha256": "abc"}]},
        {"groups": {"tpu": {}}},
        {"groups": {"gpu": {"maxReplica": 2}}},
        {"serve": {"deployments": {"Teachers": {}}}},
        {"monitoring": {"runbooks": "docs/runbooks"}},
        {"storage": {"size": "100"}},
        {"replicas": 3},
    ],
    ids=str,
)
def test_wrong_values_are_refused(render: Render, values: Document) -> None:
    with pytest.raises(helm.HelmValuesError):
        render(**values)


def test_a_wrong_profile_is_refused(render: Render) -> None:
    with pytest.raises(helm.HelmValuesError, match="profile"):
        render("prod")
