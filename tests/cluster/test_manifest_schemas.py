"""Validate every document against the schema of its kind, with unknown fields refused, without an API server."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from reft_ray.serving.strict import check_serve_config

Document = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = "1.32.0"
CUSTOM = ("ray.io/", "monitoring.coreos.com/")
Validator = Callable[[Document], list[str]]


def strict(schema: Any) -> Any:
    """A structural schema with the strict field validation of an API server."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        made["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    return made


@pytest.fixture(scope="session")
def custom(crd_schemas: dict[tuple[str, str], Document]) -> Validator:
    validators: dict[tuple[str, str], Draft202012Validator] = {}

    def validate(document: Document) -> list[str]:
        key = (document["apiVersion"], document["kind"])
        if key not in validators:
            schema = strict(crd_schemas[key])
            # The API server validates metadata separately; the lookup checks the kind.
            schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
            validators[key] = Draft202012Validator(schema)
        return [f"{'/'.join(map(str, e.absolute_path))}: {e.message}" for e in validators[key].iter_errors(document)]

    return validate


def test_custom_kinds_match_the_crd_schemas(all_documents: list[tuple[str, Document]], custom: Validator) -> None:
    checked = [(part, d) for part, d in all_documents if d["apiVersion"].startswith(CUSTOM)]
    kinds = {"RayService", "RayJob", "RayCronJob", "RayCluster", "PodMonitor", "PrometheusRule"}
    assert {d["kind"] for _, d in checked} == kinds
    # Errors may quote a whole pod.
    assert [f"{part}: {line[:2000]}" for part, d in checked for line in custom(d)] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "redinessProbe"), {}),
        (("rayClusterConfig", "workerGroupSpecs", 0, "maxReplicas"), "many"),
        (("rayClusterConfig", "autoscalerOptions", "version"), "v3"),
        (("serveConfig",), ""),
    ],
)
def test_errors_in_custom_kinds_are_found(manifests: Any, custom: Validator, path: tuple, value: Any) -> None:
    document = manifests.one("overlays/production", "RayService")
    assert custom(document) == []
    *parents, last = path
    target = document["spec"]
    for step in parents:
        target = target[step]
    target[last] = value
    assert custom(document)


def test_native_kinds_match_the_core_schemas(all_documents: list[tuple[str, Document]]) -> None:
    native = [(part, d) for part, d in all_documents if not d["apiVersion"].startswith(CUSTOM)]
    assert len({d["kind"] for _, d in native}) >= 7
    for part, document in native:
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{part} {document['kind']} {document['metadata']['name']}: {error.message}")


def test_pods_match_the_core_schema(all_pods: list[tuple[str, Document]]) -> None:
    """The CRD schemas contain fewer rules for pods than the core schema."""
    for place, template in all_pods:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}}
        try:
            kubernetes_validate.validate({**pod, "spec": template["spec"]}, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{place}: {error.message}")


def test_errors_in_native_kinds_are_found(manifests: Any) -> None:
    document = copy.deepcopy(manifests.one("overlays/dev-cpu", "Job"))
    document["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_serve_configs_have_no_unknown_keys(manifests: Any, overlay: str) -> None:
    text = manifests.one(overlay, "RayService")["spec"]["serveConfigV2"]
    assert check_serve_config(yaml.safe_load(text)) == []


def test_the_template_of_the_services_jobs_matches_its_schema(custom: Validator) -> None:
    document = yaml.safe_load((ROOT / "cluster/components/jobs/rayjob.yaml").read_text(encoding="utf-8"))
    assert custom(document) == []


def test_gateways_alone_may_create_jobs(manifests: Any) -> None:
    documents = manifests.with_component("overlays/finetuning", "jobs")
    (service,) = (d for d in documents if d["kind"] == "RayService")
    cpu, gpu = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert cpu["template"]["spec"]["serviceAccountName"] == "reft-ray-gateway"
    assert "api-token" in str(cpu["template"])
    assert gpu["template"]["spec"]["serviceAccountName"] == "reft-ray-worker"
    assert "api-token" not in str(gpu["template"])
    (role,) = (d for d in documents if d["kind"] == "Role")
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "delete"]}]
    (template,) = (d for d in documents if d["metadata"]["name"] == "reft-ray-job-template")
    assert yaml.safe_load(template["data"]["rayjob.yaml"])["kind"] == "RayJob"
    for document in (d for d in documents if not d["apiVersion"].startswith(CUSTOM)):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
