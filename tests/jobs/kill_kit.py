"""A small service whose processes kill themselves, with SIGKILL, once, at a named point.

`python kill_kit.py ROOT` is the gateway; `kill_kit:make` are the steps of its drivers. ROOT/point names the point,
ROOT/database the URL of its records, ROOT/journal gets a line per started step, ROOT/gateway.pid holds the gateway's
process id.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from reft_ray.jobs.database import Database
from reft_ray.jobs.driver import DriverConfig
from reft_ray.jobs.fake_steps import FakeSteps
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.launcher import ProcessLauncher
from reft_ray.jobs.lease import Leases, Slots
from reft_ray.jobs.reconciler import Reconciler, RetryPolicy

LEASE_SECONDS = 20.0
START_SECONDS = 20.0  # a slow start on a busy machine is not a failure
WORKER = "import sys, time; time.sleep(600)"


@dataclass(frozen=True)
class Points:
    root: Path

    def reached(self, name: str) -> bool:
        """Whether to act at this point now; true once."""
        point, done = self.root / "point", self.root / "killed"
        if point.read_text() != name or done.exists():
            return False
        done.touch()
        return True

    def die(self, name: str) -> None:
        if self.reached(name):
            os.kill(os.getpid(), signal.SIGKILL)

    def die_with_the_gateway(self, name: str) -> None:
        if self.reached(name):
            os.kill(int((self.root / "gateway.pid").read_text()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def kill_the_gateway(self, name: str) -> None:
        if self.reached(name):
            os.kill(int((self.root / "gateway.pid").read_text()), signal.SIGKILL)


class KillSteps:
    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.points = Points(self.root)
        self.fake = FakeSteps(train_steps=10, checkpoint_every=5)

    def _started(self, step: str) -> None:
        with (self.root / "journal").open("a") as journal:
            journal.write(step + "\n")
        self.points.die(step)
        self.points.die_with_the_gateway(f"all:{step}")
        self.points.kill_the_gateway(f"gateway:{step}")

    def validate(self, run):
        self._started("validate")
        return self.fake.validate(run)

    def screen(self, run, validation):
        self._started("screen")
        screening = self.fake.screen(run, validation)
        self.points.die("screened")
        if self.points.reached("parking"):
            run.park = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        if self.points.reached("releasing"):
            run.release = lambda: os.kill(os.getpid(), signal.SIGKILL)
        return screening

    def review(self, run, screening):
        return self.fake.review(run, screening)

    def train(self, run, screening):
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(self.root)])
        self._started("train")
        if self.points.reached("worker"):
            worker.send_signal(signal.SIGKILL)
        report, hold = run.metrics, self.root / "hold"

        def metrics(step, total, values):
            report(step, total, values)
            if step == 7:
                self.points.die("step 7")
                self.points.die_with_the_gateway("all:step 7")
            while hold.exists() and not run.wait(0.02):
                (self.root / "holding").touch()
            if worker.poll() is not None or ((self.root / "point").read_text() == "worker" and _killed(worker)):
                raise RuntimeError("a training worker died")

        run.metrics = metrics
        try:
            return self.fake.train(run, screening)
        finally:
            worker.kill()
            worker.wait()

    def evaluate(self, run, training):
        self._started("evaluate")
        return self.fake.evaluate(run, training)

    def export(self, run, screening, training, evaluation):
        self._started("export")
        if self.points.reached("succeeding"):
            run.succeed = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return self.fake.export(run, screening, training, evaluation)


def _killed(worker) -> bool:
    try:
        return worker.wait(timeout=0.2) is not None
    except subprocess.TimeoutExpired:
        return False


def make(root: str) -> KillSteps:
    return KillSteps(root)


class KillLauncher(ProcessLauncher):
    def __init__(self, config: DriverConfig, root: Path) -> None:
        super().__init__(config, root / "logs")
        self.points = Points(root)

    def start(self, job_id: str, attempt: int) -> str:
        self.points.die("claimed")
        handle = super().start(job_id, attempt)
        self.points.die("launched")
        return handle


def main(root: Path) -> None:
    (root / "gateway.pid").write_text(str(os.getpid()))
    url = (root / "database").read_text()
    store = JobStore(Database.open(url))
    config = DriverConfig(
        url,
        str(root / "files"),
        "kill_kit:make",
        {"root": str(root)},
        lease_seconds=LEASE_SECONDS,
        heartbeat_seconds=0.1,
    )
    leases = Leases(store, LEASE_SECONDS, START_SECONDS)
    reconciler = Reconciler(
        store, leases, KillLauncher(config, root), Slots(), RetryPolicy(stop=5.0, pause=5.0, backoff=0.05)
    )
    points = Points(root)
    while True:
        points.die("gateway")
        reconciler.tick()
        time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
