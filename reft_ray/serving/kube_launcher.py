"""Drivers as RayJobs of KubeRay: a cluster per finetuning job, with its own nodes, secrets and queue."""

from __future__ import annotations

import copy
import hashlib
import shlex
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import yaml

from reft_ray.core.errors import UsageError
from reft_ray.jobs.driver import CONFIG_VARIABLE, DriverConfig

HANDLE = "rayjob"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
API = "https://kubernetes.default.svc"
STOP_SECONDS = 60.0
"""How long to wait until a deleted RayJob and its pods are gone."""

_POLL_SECONDS = 0.5
_TIMEOUT_SECONDS = 20.0
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED", "Complete", "Failed"}
_STARTED = {"RUNNING"}


@dataclass(frozen=True)
class KubeLauncher:
    """A `jobs.launcher.Launcher` that creates one RayJob per attempt from a template, through the Kubernetes API.

    The template has everything that a cluster decides: pods, spot workers, secrets, the queue of Kueue. The driver
    reads the database's URL from a variable of its pods (`env:NAME`), because a RayJob is readable by others.
    """

    config: DriverConfig
    template: Mapping[str, Any]
    namespace: str
    api: str = API
    account: Path = ACCOUNT

    def __post_init__(self) -> None:
        if not self.config.database_url.startswith("env:"):
            raise UsageError("database_url: name a variable of the jobs' pods as env:NAME; a RayJob would show a URL")
        if self.template.get("kind") != "RayJob":
            raise UsageError(f"job_template: expected a RayJob, got kind {self.template.get('kind')!r}")

    @classmethod
    def in_pod(cls, config: DriverConfig, template: str) -> KubeLauncher:
        """With the account of this pod and a template file. Raises UsageError where either is missing or unreadable."""
        try:
            document = yaml.safe_load(Path(template).read_text(encoding="utf-8"))
            namespace = (ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        except (OSError, yaml.YAMLError) as error:
            raise UsageError(f"job_template {template}: {str(error).splitlines()[0]}") from None
        if not isinstance(document, Mapping):
            raise UsageError(f"job_template {template} is not a mapping")
        return cls(config, document, namespace)

    def start(self, job_id: str, attempt: int) -> str:
        name = _name_of(job_id, attempt)
        answer = self._ask("POST", "", self.document(job_id, attempt))
        # 409: an earlier try of the same attempt reached the API server.
        if answer.status_code not in (201, 409):
            raise ConnectionError(f"RayJob {name} was not created: HTTP {answer.status_code}")
        return f"{HANDLE}:{name}"

    def document(self, job_id: str, attempt: int) -> dict[str, Any]:
        """The RayJob of an attempt."""
        name = _name_of(job_id, attempt)
        made = copy.deepcopy(dict(self.template))
        metadata = made.setdefault("metadata", {})
        metadata["name"] = name
        metadata["annotations"] = {**metadata.get("annotations", {}), "reft-ray.io/job": job_id}
        config = replace(self.config, handle=f"{HANDLE}:{name}")
        made["spec"]["entrypoint"] = shlex.join(["python", "-m", "reft_ray.jobs.driver", job_id, str(attempt)])
        made["spec"]["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": {CONFIG_VARIABLE: config.to_json()}})
        # The reconciler starts the next attempt; a second one of KubeRay's would meet its lease.
        made["spec"]["backoffLimit"] = 0
        return made

    def stop(self, handle: str) -> None:
        name = _name(handle)
        if name is None:
            return
        until = time.monotonic() + STOP_SECONDS
        # In the foreground: the RayJob is there until its pods are gone.
        self._ask("DELETE", f"/{name}", {"propagationPolicy": "Foreground"})
        while self._ask("GET", f"/{name}").status_code != 404 and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)

    def is_alive(self, handle: str) -> bool | None:
        words = self._status(handle)
        return None if words is None else bool(words) and not words & _ENDED

    def is_waiting(self, handle: str) -> bool:
        words = self._status(handle)
        return bool(words and not words & (_ENDED | _STARTED))

    def _status(self, handle: str) -> set[str] | None:
        """The RayJob's states, empty if there is none; None where the API server does not say."""
        name = _name(handle)
        if name is None:
            return None
        try:
            answer = self._ask("GET", f"/{name}")
        except OSError:
            return None
        if answer.status_code == 404:
            return set()
        if answer.status_code != 200:
            return None
        status = answer.json().get("status", {})
        return {"created", status.get("jobStatus", ""), status.get("jobDeploymentStatus", "")}

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        """A request with the account's present token, which Kubernetes renews. Raises ConnectionError."""
        url = f"{self.api}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs{path}"
        try:
            token = (self.account / "token").read_text(encoding="utf-8").strip()
            verify = (
                ssl.create_default_context(cafile=str(self.account / "ca.crt")) if url.startswith("https") else False
            )
            headers = {"authorization": f"Bearer {token}"}
            with httpx.Client(verify=verify, timeout=_TIMEOUT_SECONDS) as client:
                return client.request(method, url, headers=headers, json=body)
        except (httpx.HTTPError, OSError) as error:
            raise ConnectionError(f"Kubernetes API: {type(error).__name__}") from error


def _name_of(job_id: str, attempt: int) -> str:
    """At most 47 characters of lower case, as KubeRay allows, whatever the id is."""
    return f"finetuning-{hashlib.sha256(job_id.encode()).hexdigest()[:20]}-{attempt}"


def _name(handle: str) -> str | None:
    kind, _, name = handle.partition(":")
    return name if kind == HANDLE else None
