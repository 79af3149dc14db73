"""How the failure of a task reads, without a cluster."""

import pytest
import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from reft_ray.core.errors import ReftError
from reft_ray.finetuning.config import Resources
from reft_ray.finetuning.ray_runtime import as_task
from reft_ray.finetuning.targets import soft_targets_on_worker


class NoCluster:
    """What `ray.remote` gives, as far as a task needs it."""

    def __init__(self, **options: object) -> None:
        self.given = options

    def __call__(self, work: object) -> "NoCluster":
        return self

    def options(self, **options: object) -> "NoCluster":
        return self

    def remote(self, *args: object) -> str:
        return "future"


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (RayTaskError("work", "Traceback\n  line\nReftError: no rows", ReftError("no rows")), "no rows"),
        (WorkerCrashedError(), ".+"),
    ],
)
def test_a_failed_task_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: str) -> None:
    def get(_: object) -> None:
        raise failure

    monkeypatch.setattr(ray, "remote", NoCluster)
    monkeypatch.setattr(ray, "wait", lambda futures, timeout: (futures, []))
    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(ReftError, match=f"^making soft labels failed: {reason}$"):
        as_task("making soft labels", soft_targets_on_worker, resources=Resources())
