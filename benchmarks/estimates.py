"""How far estimates are from the jobs: ten jobs of other sizes, estimated before the first one and after it.

    python benchmarks/estimates.py [--jobs 10]

A base of random weights is measured in small runs, as the service does at its start; then the jobs run one after the
other, each in driver processes with one thread, on this machine. Printed are both estimates over the time that the job
took. Other work on the machine changes both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from random_teacher import WORDS, save_random_teacher

from reft_ray.api.settings import BaseModelSettings, ServiceSettings
from reft_ray.api.stores import Stores
from reft_ray.jobs.database import Database
from reft_ray.jobs.driver import DriverConfig
from reft_ray.jobs.estimate import estimate
from reft_ray.jobs.job import TERMINAL, Hyperparameters, JobSpec, Options, Status
from reft_ray.jobs.launcher import ProcessLauncher
from reft_ray.jobs.lease import Leases
from reft_ray.jobs.reconciler import Reconciler
from reft_ray.jobs.speeds import measured_speed
from reft_ray.pipeline.speed import measured
from reft_ray.pipeline.token_count import TokenizerCounter

MODEL = "random"
SIZES = ((24, 1), (48, 2), (96, 1), (64, 3), (160, 1), (120, 2), (240, 1), (320, 1), (200, 3), (480, 1))
"""Rows and epochs of the jobs."""


def rows(count: int, seed: int) -> bytes:
    """Distinct rows of up to a hundred words."""
    source = random.Random(seed)

    def text(words: float) -> str:
        return " ".join(source.choices(WORDS, k=max(3, min(100, int(source.lognormvariate(words, 0.6))))))

    turns = (
        [{"role": "user", "content": text(2.7)}, {"role": "assistant", "content": text(3.2)}] for _ in range(count)
    )
    return b"".join(json.dumps({"messages": each}).encode() + b"\n" for each in turns)


def options(folder: Path) -> dict[str, object]:
    """The options of the steps, with a gate that passes whatever it measures."""
    teacher = save_random_teacher(folder, "small")
    labelled = folder / "alignment.jsonl"
    source = [json.loads(line)["messages"] for line in rows(128, 1).splitlines()]
    records = [
        {"prompt": asked["content"], "response": said["content"], "label": "harmful" if number % 2 else "harmless"}
        for number, (asked, said) in enumerate(source)
    ]
    labelled.write_text("".join(json.dumps(record) + "\n" for record in records))
    limits = dict.fromkeys(("harmful_score", "incoherent", "over_refusal", "finetune_accuracy"), 100)
    return {
        "shared": str(folder / "shared"),
        "device": "cpu",
        "bases": {
            MODEL: {
                "teacher": str(teacher.folder),
                "base": teacher.manifest.base_name,
                "alignment": {"default": {"labelled": [str(labelled)]}},
                "gate": {
                    "harmful": "builtin",
                    "harmless": "builtin",
                    "limits": limits,
                    "prompts": 20,
                    "max_new_tokens": 16,
                },
                "finetune": {"epochs": 1, "batch_rows": 8, "max_tokens": 256, "log_every": 1, "checkpoint_every": 50},
                "resources": {"workers": 0, "cpus_per_worker": 1},
                "screening": {"job_threshold": False},
            }
        },
    }


def main() -> None:
    """Run the jobs, and print a line for each and how many were within a quarter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=len(SIZES))
    asked = parser.parse_args()
    # Of the drivers too.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        made = options(home)
        url, files = f"sqlite:///{home / 'service.db'}", str(home / "files")
        settings = ServiceSettings(base_models={MODEL: BaseModelSettings(uri=str(home / "base"), batch_size=8)})
        stores = Stores.open(Database.open(url), files, settings, TokenizerCounter({MODEL: str(home / "base")}))
        config = DriverConfig(url, files, "reft_ray.pipeline.steps:make", made)
        began = time.perf_counter()
        if not list(measured(config, [MODEL])):
            raise SystemExit("error: nothing was measured")
        first = stores.first_speeds.of(MODEL)
        print(f"measured in {time.perf_counter() - began:.0f} s on {os.cpu_count()} CPUs: {first}")
        print("rows  epochs  seconds  before/real  after/real")
        before, after = [], []
        with Reconciler(stores.jobs, Leases(stores.jobs), ProcessLauncher(config, home / "logs")).background(0.2):
            for number, (count, epochs) in enumerate(SIZES[: asked.jobs]):
                file = stores.files.create("proj", "rows.jsonl", "fine-tune", [rows(count, 10 + number)]).id
                knobs = Hyperparameters(n_epochs=epochs, batch_size=8)
                spec = JobSpec(MODEL, file, number, hyperparameters=knobs, options=Options(max_reject_ratio=1.0))
                size, base = stores.counter(MODEL, stores.files.read(file, "proj")), settings.base_models[MODEL]
                learned = measured_speed(stores.database, MODEL)
                guesses = [estimate(size, knobs, base, speed).seconds for speed in (first, learned)]
                job = stores.jobs.create("org", "proj", spec, {})
                while (job := stores.jobs.get(job.id)).status not in TERMINAL:
                    time.sleep(0.2)
                if job.status is not Status.SUCCEEDED:
                    raise SystemExit(f"error: {job.error}")
                real = float(job.finished_at or 0.0) - job.created_at
                before.append((guesses[0] or 0.0) / real)
                shown = "-"
                if guesses[1] is not None:
                    after.append(guesses[1] / real)
                    shown = f"{after[-1]:.2f}"
                print(f"{count:4}  {epochs:6}  {real:7.1f}  {before[-1]:11.2f}  {shown:>10}", flush=True)
        for title, ratios in (("before the first job", before), ("after earlier jobs", after)):
            near = sum(0.8 <= ratio <= 1.25 for ratio in ratios)
            print(f"{title}: {near} of {len(ratios)} within a quarter, median {median(ratios or [0]):.2f}")
        stores.database.close()


if __name__ == "__main__":
    main()
