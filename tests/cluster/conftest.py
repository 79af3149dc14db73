"""Fixtures: the manifests rendered by kubectl, and the CRD schemas of the operators."""

from __future__ import annotations

import copy
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

with warnings.catch_warnings():
    # Ray emits deprecation warnings on import: import it before warnings become errors.
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
CRDS = ROOT.parent / "shared" / "crds"
OVERLAYS = (
    "overlays/dev-cpu",
    "overlays/dev-finetuning",
    "overlays/gpu",
    "overlays/production",
    "overlays/finetuning",
)
PARTS = ("jobs/finetuning", "jobs/screening", "jobs/teacher", "jobs/canaries", "interactive", "vllm")

Document = dict[str, Any]


class Manifests:
    """Documents by kustomization, each built once."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._built: dict[str, list[Document]] = {}

    def build(self, name: str) -> list[Document]:
        """The output of `kubectl kustomize cluster/NAME`."""
        if name not in self._built:
            self._built[name] = self.kustomize(ROOT / "cluster" / name)
        return copy.deepcopy(self._built[name])

    def one(self, name: str, kind: str) -> Document:
        """The only document of a kind."""
        (found,) = (document for document in self.build(name) if document["kind"] == kind)
        return found

    def with_component(self, part: str, component: str) -> list[Document]:
        """A kustomization with a component, as a user would write it."""
        folder = self._scratch / f"{part}-{component}".replace("/", "-")
        # kustomize accepts only relative paths inside the tree, hence the copy.
        shutil.copytree(ROOT / "cluster", folder, ignore=shutil.ignore_patterns("*.md"))
        user = folder / "user"
        user.mkdir()
        text = {"resources": [f"../{part}"], "components": [f"../components/{component}"]}
        (user / "kustomization.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
        return self.kustomize(user)

    @staticmethod
    def kustomize(folder: Path) -> list[Document]:
        """Render a folder."""
        done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr
        return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


@pytest.fixture(scope="session")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed; `kubectl kustomize` renders the overlays")
    return Manifests(tmp_path_factory.mktemp("kustomize"))


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    """Every overlay, one after the other."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def all_documents(manifests: Manifests) -> list[tuple[str, Document]]:
    """Every document of every kustomization, with its location."""
    built = [(part, document) for part in (*OVERLAYS, *PARTS) for document in manifests.build(part)]
    for part in ("jobs/finetuning", "jobs/screening"):
        built += [(f"{part}+kueue", document) for document in manifests.with_component(part, "kueue")]
    return built


@pytest.fixture(scope="session")
def crd_schemas() -> dict[tuple[str, str], Document]:
    """(apiVersion, kind) -> schema of a CustomResourceDefinition."""
    if not CRDS.is_dir():
        pytest.skip(f"the operators' schemas are missing: {CRDS} does not exist")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = {}
    for path in sorted(CRDS.glob("*.yaml")):
        definition = yaml.load(path.read_text(encoding="utf-8"), loader)["spec"]
        for version in definition["versions"]:
            key = (f"{definition['group']}/{version['name']}", definition["names"]["kind"])
            found[key] = version["schema"]["openAPIV3Schema"]
    return found


def pod_templates(document: Document) -> Iterator[tuple[str, Document]]:
    """Every pod template of a document of any kind, with its name."""
    spec = document.get("spec", {})
    spec = spec.get("jobTemplate", spec)
    cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or (spec if "headGroupSpec" in spec else None)
    if cluster is not None:
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]
    elif "template" in spec:
        yield document["metadata"]["name"], spec["template"]


@pytest.fixture(scope="session")
def all_pods(all_documents: list[tuple[str, Document]]) -> list[tuple[str, Document]]:
    """Every pod template of every kustomization, with its location."""
    return [
        (f"{part} {document['kind']} {name}", template)
        for part, document in all_documents
        for name, template in pod_templates(document)
    ]
