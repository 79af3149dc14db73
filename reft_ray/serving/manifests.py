"""Render the Kubernetes documents that embed other files: pods, Serve configs, dashboards, alert rules.

A pure function of files in the repository; `cluster/` holds the result, and a test compares them. All other documents
in `cluster/` are written by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from reft_ray.core.errors import ReftError, UsageError

RAY_VERSION = "2.60.0"
ROLE_LABEL = "reft-ray.io/role"
AUTH_SECRET = "reft-ray-auth"  # noqa: S105
JOB_SECRET = "reft-ray-jobs"  # noqa: S105
HEADER = "# Made by `reft-ray manifests {command}` from {sources}: change it there.\n"

RAY_DOCUMENTS = {
    "service": "base/rendered/service.yaml",
    "finetuning": "jobs/finetuning/rendered.yaml",
    "screening": "jobs/screening/rendered.yaml",
    "teacher": "jobs/teacher/rendered.yaml",
    "canaries": "jobs/canaries/rendered.yaml",
    "interactive": "interactive/rendered.yaml",
    "vllm": "vllm/rendered.yaml",
}
"""Template under `cluster/templates` -> rendered document under `cluster`."""

SERVE_CONFIGS = {
    "dev-cpu": ("local.yaml", "/mnt/reft/quickstart/teacher"),
    "gpu": ("single_gpu.yaml", "/mnt/reft/teachers/current"),
    "production": ("autoscaling.yaml", "/mnt/reft/teachers/current"),
    "finetuning": ("service.yaml", "/mnt/reft/teachers/llama-3.1-8b"),
    "dev-finetuning": ("dev_service.yaml", "/mnt/reft/quickstart/teacher"),
}
"""Overlay -> its file in `serve_configs` and its teacher's path on the shared volume."""

JOB_SERVER = "http://reft-ray-head-svc:8265"
"""KubeRay's Service for the head of the RayService `reft-ray`."""

_CLUSTER_KEYS = ("rayClusterConfig", "rayClusterSpec")


def rendered(root: Path) -> dict[str, str]:
    """Path under `cluster/` -> content, for a checkout. Raises ReftError for a missing or invalid source."""
    templates = root / "cluster" / "templates"
    pods = _load(templates / "pods.yaml")
    files = {}
    for name, target in RAY_DOCUMENTS.items():
        document = ray_document(_load(templates / f"{name}.yaml"), pods)
        files[target] = dump([document], f"cluster/templates/{name}.yaml and cluster/templates/pods.yaml")
    job = ray_document(_load(templates / "service-job.yaml"), pods)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        # Training processes have credentials of their own.
        group["template"]["spec"]["containers"][0]["envFrom"].append({"secretRef": {"name": JOB_SECRET}})
    files["components/jobs/rayjob.yaml"] = dump([job], "cluster/templates/service-job.yaml and pods.yaml")
    for overlay, (source, teacher) in SERVE_CONFIGS.items():
        config = _load(root / "serve_configs" / source)
        patch = service_patch(serve_config(config, teacher))
        files[f"overlays/{overlay}/serve-config.yaml"] = dump([patch], f"serve_configs/{source}")
    patch = service_patch(reachable(_load(root / "serve_configs" / "vllm.yaml")), "reft-ray-vllm")
    files["vllm/serve-config.yaml"] = dump([patch], "serve_configs/vllm.yaml")
    monitoring = "components/monitoring/rendered"
    rules = _load(root / "dashboards" / "rules" / "reft.yaml")
    files[f"{monitoring}/rules.yaml"] = dump([prometheus_rule(rules)], "dashboards/rules/reft.yaml")
    boards = sorted((root / "dashboards").glob("*.json"))
    maps = [dashboard_map(path.stem, path.read_text(encoding="utf-8")) for path in boards]
    files[f"{monitoring}/dashboards.yaml"] = dump(maps, "dashboards/*.json")
    return files


def write(root: Path) -> list[Path]:
    """Write all rendered files into `root/cluster`; returns their paths."""
    return write_files(root / "cluster", rendered(root))


def write_files(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Write files of a folder, by their names in it; returns their paths."""
    paths = []
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        paths.append(path)
    return paths


def stale(root: Path) -> list[str]:
    """Rendered files that are missing or outdated, as paths relative to `root`."""
    paths = {f"cluster/{name}": content for name, content in rendered(root).items()}
    return [
        path
        for path, content in paths.items()
        if not (root / path).is_file() or (root / path).read_text(encoding="utf-8") != content
    ]


def ray_document(template: Mapping[str, Any], pods: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the `{role, groups}` of a RayService, RayJob, RayCronJob or RayCluster by a cluster of full pods.

    Raises ReftError for a role or a group that `pods` does not have.
    """
    document = copy.deepcopy(dict(template))
    spec = document["spec"]
    if document["kind"] == "RayCluster":
        document["spec"] = cluster_spec(spec, pods)
        return document
    spec = spec.get("jobTemplate", spec)
    key = next((key for key in _CLUSTER_KEYS if key in spec), None)
    if key is None:
        raise ReftError(
            f"{document['kind']} {document['metadata']['name']}: no cluster, expected one of {_CLUSTER_KEYS}"
        )
    spec[key] = cluster_spec(spec[key], pods)
    return document


def cluster_spec(request: Mapping[str, Any], pods: Mapping[str, Any]) -> dict[str, Any]:
    """The `spec` of a RayCluster for `{"role": ..., "groups": [{"name": ..., "maxReplicas": ...}]}`."""
    role_name = request["role"]
    role = _named(pods["roles"], role_name, "role")
    head = pods["head"]
    return {
        "rayVersion": RAY_VERSION,
        # Explicit, because Ray's default changed between versions. One token for all clusters: during an upgrade the
        # gateways of the old and the new one use the same head Service.
        "authOptions": {"mode": "token", "secretName": AUTH_SECRET},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": copy.deepcopy(pods["autoscaler"]),
        "headGroupSpec": {
            "rayStartParams": dict(head["rayStartParams"]),
            "template": _template(head, role_name, role.get("pod", {}), {}),
        },
        "workerGroupSpecs": [
            _worker_group(size, _named(pods["groups"], size["name"], "group"), role_name, role)
            for size in request["groups"]
        ],
    }


def serve_config(config: Mapping[str, Any], teacher: str) -> dict[str, Any]:
    """A Serve config for pods: reachable from other pods, a proxy on every node, artefacts on the shared volume."""
    adapted = reachable(config)
    for application in adapted["applications"]:
        uri = application["args"].get("screenings_uri", "")
        if "://" not in uri:
            application["args"]["screenings_uri"] = "/mnt/reft/screenings"
        if "service" in application["args"]:
            application["args"]["service"]["job_server"] = JOB_SERVER
        else:
            # Other pods call the filter by the name of its Service; it has no keys, and a NetworkPolicy in front.
            application["args"].setdefault("filter", {}).update(hosts=["*"], authenticated_in_front=True)
        for deployment in application["deployments"]:
            if deployment["name"] == "Teacher":
                deployment["user_config"]["teacher"] = teacher
    return adapted


def reachable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a Serve config with a proxy on every node that other pods reach."""
    adapted = copy.deepcopy(dict(config))
    adapted["proxy_location"] = "EveryNode"
    adapted["http_options"] = {**adapted.get("http_options", {}), "host": "0.0.0.0", "port": 8000}  # noqa: S104
    return adapted


def service_patch(config: Mapping[str, Any], name: str = "reft-ray") -> dict[str, Any]:
    """A kustomize patch that sets the RayService's Serve config."""
    text = yaml.safe_dump(dict(config), sort_keys=False, width=110)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name},
        "spec": {"serveConfigV2": text},
    }


def prometheus_rule(rules: Mapping[str, Any]) -> dict[str, Any]:
    """The alert rules as a PrometheusRule of the Prometheus operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "reft-ray"},
        "spec": {"groups": rules["groups"]},
    }


def dashboard_map(name: str, text: str) -> dict[str, Any]:
    """A dashboard as a ConfigMap, which Grafana's sidecar finds by its label."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"reft-ray-dashboard-{name}", "labels": {"grafana_dashboard": "1"}},
        "data": {f"reft-{name}.json": text},
    }


def _worker_group(
    size: Mapping[str, Any], group: Mapping[str, Any], role_name: str, role: Mapping[str, Any]
) -> dict[str, Any]:
    extra = role.get("worker", {})
    spec = {
        "groupName": size["name"],
        **{key: size[key] for key in ("replicas", "minReplicas", "maxReplicas")},
        "rayStartParams": dict(group["rayStartParams"]),
        **{key: dict(group[key]) for key in ("labels", "resources") if key in group},
    }
    pod = {**role.get("pod", {}), **extra.get("pod", {})}
    return spec | {"template": _template(group, role_name, pod, extra.get("container", {}))}


def _template(
    source: Mapping[str, Any], role: str, pod: Mapping[str, Any], container: Mapping[str, Any]
) -> dict[str, Any]:
    spec = {**source["pod"], **pod, "containers": [{**source["container"], **container}]}
    return {
        "metadata": {"labels": {"app.kubernetes.io/part-of": "reft-ray", ROLE_LABEL: role}},
        "spec": copy.deepcopy(spec),
    }


def _named(table: Mapping[str, Any], name: str, kind: str) -> Mapping[str, Any]:
    if name not in table:
        raise ReftError(f"cluster/templates/pods.yaml: no {kind} {name!r}; it has {', '.join(table)}")
    found: Mapping[str, Any] = table[name]
    return found


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path} is missing: run this in a checkout of the project, or name its directory with --root")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ReftError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, dict):
        raise ReftError(f"{path} is not a mapping")
    return loaded


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, for readable diffs, and no anchors, which not every tool supports."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def dump(documents: Iterable[Any], sources: str, command: str = "render") -> str:
    """Documents as YAML under a header that names their sources and the command that makes them."""
    text = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
    return HEADER.format(sources=sources, command=command) + text
