"""The documents of the Helm chart: what `kubectl kustomize` makes of the overlays, so that both have one source."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from reft_ray.core.errors import ReftError, UsageError
from reft_ray.serving.manifests import dump, write_files

PROFILES = {"dev": "dev-cpu", "gpu": "gpu", "filter": "production", "service": "finetuning"}
"""Profile of the chart -> overlay under `cluster/overlays`."""

FILES = "charts/reft-ray/files"
_SHARED = ("PrometheusRule", "ConfigMap")


def rendered(root: Path) -> dict[str, str]:
    """Path under `root` -> content. Raises UsageError without kubectl and ReftError where an overlay is wrong.

    A file is one list of documents, because Helm's `fromYamlArray` reads no streams. What all overlays share, alert
    rules and dashboards, is in a file of its own.
    """
    shared: dict[str, dict[str, Any]] = {}
    files = {}
    for profile, overlay in PROFILES.items():
        documents = kustomize(root / "cluster" / "overlays" / overlay)
        shared |= {item["metadata"]["name"]: item for item in documents if item["kind"] in _SHARED}
        own = [item for item in documents if item["kind"] not in _SHARED]
        files[f"{FILES}/{profile}.yaml"] = dump([own], f"cluster/overlays/{overlay}", "chart")
    return files | {f"{FILES}/monitoring.yaml": dump([list(shared.values())], "cluster/components/monitoring", "chart")}


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """The documents of a kustomization."""
    if shutil.which("kubectl") is None:
        raise UsageError("kubectl is not installed; `kubectl kustomize` renders the overlays for the chart")
    done = subprocess.run(  # noqa: S603
        ["kubectl", "kustomize", str(folder)],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ReftError(f"{folder}: {done.stderr.strip().splitlines()[-1]}")
    return list(yaml.safe_load_all(done.stdout))


def write(root: Path) -> list[Path]:
    """Write the chart's files; returns their paths."""
    return write_files(root, rendered(root))
