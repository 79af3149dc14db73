"""Search over learning rate, LoRA rank and alpha with Ray Tune, on rows that were screened once.

A trial is a whole finetuning run of the job's configuration. Its score is

    validation loss + safety_weight * KL to the Ref-Teacher's soft labels on alignment rows

because the validation loss alone would always choose the smallest alpha, and with it the least safe student.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.schedulers import ASHAScheduler

from reft_ray.atomic import atomic_directory
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.targets import ensure_soft_targets
from reft_ray.finetuning.trainer import FinetuneInputs, finetune
from reft_ray.hf.adapter_files import ADAPTER, check_replaceable
from reft_ray.hf.compute import default_device

SCORE = "score"


@dataclass(frozen=True, slots=True)
class Space:
    """The values that are tried; a trial has one of each."""

    learning_rate: Sequence[float] = (5e-5, 1e-4, 2e-4, 4e-4)
    rank: Sequence[int] = (8, 16, 32)
    alpha: Sequence[float] = (0.5, 1.0, 2.0)

    @property
    def size(self) -> int:
        """How many different trials there are."""
        return len(self.learning_rate) * len(self.rank) * len(self.alpha)


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial's settings and figures; NaN where it failed before its first checkpoint."""

    settings: dict[str, float]
    valid_loss: float
    distill: float
    score: float
    folder: str = field(repr=False, default="")


def with_settings(config: FinetuneConfig, settings: Mapping[str, float]) -> FinetuneConfig:
    """The configuration of a trial."""
    values = config.model_dump()
    values["optimizer"]["learning_rate"] = settings["learning_rate"]
    values["lora"]["rank"] = int(settings["rank"])
    values["distill_weight"] = settings["alpha"]
    return FinetuneConfig.of(values)


def search(
    config: FinetuneConfig,
    inputs: FinetuneInputs,
    out: Path,
    resources: Resources,
    space: Space = Space(),
    trials: int = 8,
    safety_weight: float = 1.0,
    done: Callable[[int], None] | None = None,
) -> list[Trial]:
    """Run the trials and copy the best adapter to `out`; the trials, best first.

    Each trial trains in one process with the resources of one worker. The worst trials at a checkpoint are
    stopped early (ASHA). All trials' adapters stay next to `out`. Raises ReftError if there are no validation rows, or
    if no trial succeeded.
    """
    if not inputs.validation:
        raise UsageError("trials are compared on validation rows: name a --validation file")
    check_replaceable(out, ADAPTER)
    folder = (Path(resources.storage) if resources.storage else out.with_name(out.name + ".trials")).absolute()
    shared = Path(resources.shared or folder)
    alone = resources.model_copy(update={"workers": 0, "storage": None, "shared": str(shared)})
    inputs = inputs.for_run(config)
    if inputs.teacher and config.caches_labels:
        device = default_device() if resources.gpus_per_worker else "cpu"
        ensure_soft_targets(config, inputs.teacher, inputs.alignment, shared / "targets", device)

    def trial(settings: dict[str, float], inputs: FinetuneInputs) -> None:
        place = Path(ray.tune.get_context().get_trial_dir()).absolute()

        def report(metrics: Mapping[str, Any]) -> None:
            if "valid_loss" in metrics:
                found = {name: float(metrics.get(name, 0.0)) for name in ("valid_loss", "distill")}
                score = found["valid_loss"] + safety_weight * found["distill"]
                ray.tune.report({**found, SCORE: score, "folder": str(place / "adapter")})

        finetune(with_settings(config, settings), inputs, place / "adapter", alone, "run", report)

    every = trials >= space.size
    draw = ray.tune.grid_search if every else ray.tune.choice
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(
            ray.tune.with_parameters(trial, inputs=inputs),
            {"CPU": resources.cpus_per_worker or 1, "GPU": resources.gpus_per_worker},
        ),
        param_space={name: draw(list(values)) for name, values in asdict(space).items()},
        tune_config=ray.tune.TuneConfig(
            metric=SCORE,
            mode="min",
            num_samples=1 if every else trials,
            search_alg=ray.tune.search.BasicVariantGenerator(random_state=config.seed),
            scheduler=ASHAScheduler(grace_period=1),
        ),
        run_config=ray.tune.RunConfig(
            name="trials", storage_path=str(folder), verbose=0, callbacks=[_Counter(done)] if done else []
        ),
    )
    # Tune prints its settings at any verbosity, where the caller may write JSON.
    with redirect_stdout(sys.stderr):
        found = tuner.fit()
    ranked = sorted(
        (_trial_of(found[index]) for index in range(len(found))),
        key=lambda trial: (math.isnan(trial.score), trial.score),
    )
    best = next((trial for trial in ranked if trial.folder and Path(trial.folder).is_dir()), None)
    if best is None:
        raise ReftError(f"no trial ended with an adapter: {_first_error(found)}")
    with atomic_directory(out, replace=True) as made:
        shutil.copytree(best.folder, made, dirs_exist_ok=True)
    return [best, *(trial for trial in ranked if trial is not best)]


def _trial_of(result: Any) -> Trial:
    metrics = result.metrics or {}
    found = {name: float(metrics.get(name, math.nan)) for name in ("valid_loss", "distill", SCORE)}
    return Trial(
        dict(result.config), found["valid_loss"], found["distill"], found[SCORE], str(metrics.get("folder", ""))
    )


def _first_error(found: Any) -> str:
    error = next(iter(found.errors), None)
    return str(error).strip().splitlines()[-1] if error else "they were all stopped"


class _Counter(ray.tune.Callback):
    """Passes on how many trials have ended, in this process: Tune also stores it, without what it calls."""

    def __init__(self, done: Callable[[int], None] | None = None) -> None:
        self._done = done
        self._ended = 0

    def __reduce__(self) -> tuple[type[_Counter], tuple[()]]:
        return _Counter, ()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count a trial, successful or not."""
        self._ended += 1
        if self._done is not None:
            self._done(self._ended)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count it as well."""
        self.on_trial_complete(iteration, trials, trial)
