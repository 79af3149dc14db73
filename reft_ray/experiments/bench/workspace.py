"""What all sections of a comparison share: rows, base and teacher, and results cached by what they depend on."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from reft_ray.atomic import atomic_write
from reft_ray.core.conversation import Example, Label
from reft_ray.core.errors import ReftError
from reft_ray.evaluation.judge_settings import judges_from
from reft_ray.evaluation.judges import Respond, ResponseJudge
from reft_ray.experiments.bench.config import BenchConfig
from reft_ray.experiments.bench.rows import BenchRows, TaskRows, builtin_rows, folder_rows
from reft_ray.finetuning.config import Resources, TeacherConfig
from reft_ray.finetuning.prompts import read_labelled
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.finetuning.trainer import prepare_teacher
from reft_ray.hf.generate import load_responder
from reft_ray.hf.loading import fingerprint
from reft_ray.hf.model_store import cache_root
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.testbed.base_model import ensure_base

Log = Callable[[str], None]
Result = dict[str, Any]

LOG_SECONDS = 60.0


def content_key(value: Any) -> str:
    """16 hex digits of SHA-256 over a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def time_left(seconds: float, share: float) -> str:
    """How long the rest takes at the speed so far: `share` of the work took `seconds`."""
    return f"about {seconds * (1 - share) / share / 60:.0f} min left"


class Workspace:
    """One comparison with its files in `out`: everything expensive is made on first use and kept.

    No new work starts after `seconds`; running work is finished.
    """

    def __init__(
        self,
        config: BenchConfig,
        out: Path,
        log: Log = lambda _line: None,
        workers: int = 0,
        seconds: float = math.inf,
    ) -> None:
        self.config = config
        self._ends = time.monotonic() + seconds
        self.workers = workers
        self.out = out.absolute()
        self.log = log
        self.failures: list[str] = []
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def has_time(self) -> bool:
        """Whether new work may start."""
        return time.monotonic() < self._ends

    @property
    def data(self) -> Path:
        """The folder of real rows. Raises ReftError for a comparison on synthetic rows."""
        if self.config.rows is None:
            raise ReftError("this section reads real rows: name their folder with --rows")
        return Path(self.config.rows).absolute() / "data"

    @cached_property
    def rows(self) -> BenchRows:
        """All rows of the comparison."""
        if self.config.rows is None:
            return builtin_rows(self.config.builtin_sizes)
        return folder_rows(self.data)

    @cached_property
    def alignment_rows(self) -> list[Example]:
        """The provider's refusals and helpful answers, half each if there are enough; the same for every method."""
        half = self.config.alignment_rows // 2
        file = self.config.alignment
        rows = read_labelled(file) if file else self.rows.alignment
        return [row for label in Label for row in _drawn(rows, label, half)]

    def harmful_rows(self, count: int) -> list[Example]:
        """Harmful prompts of the provider with complying answers, for defences that need them."""
        return _drawn(self.rows.complied, Label.HARMFUL, count)

    @cached_property
    def base(self) -> str:
        """The base model: a directory or a hub id."""
        if self.config.base is not None:
            return self.config.base
        if self.config.rows is not None:
            return str(Path(self.config.rows).absolute() / "models/base-7m")
        self.log("the built-in base model")
        return str(ensure_base(cache_root(), 0, None, self.config.recipe))

    @cached_property
    def teacher(self) -> RefTeacher:
        """The Ref-Teacher: the configured artefact, or one that is trained here once."""
        if self.config.teacher is not None:
            return RefTeacher.load(self.config.teacher)
        settings = TeacherConfig.of({"base": self.base, **self.config.teacher_settings})
        folder = self.out / f"teacher-{self.teacher_key(settings)}"
        return self.train_teacher(folder, settings, self.rows.teacher, "the Ref-Teacher")

    def teacher_key(self, settings: TeacherConfig, *more: object) -> str:
        """What a teacher depends on: its settings, rows and base, wherever a worker's cache keeps that."""
        return content_key([settings.model_dump(mode="json") | {"base": self._fingerprint}, self.rows.identity, *more])

    def train_teacher(self, folder: Path, settings: TeacherConfig, data: TeacherData, title: str) -> RefTeacher:
        """A teacher, trained once in `folder` on as many workers as cells run at a time."""

        def train(storage: Path) -> None:
            resources, progress = self.resources(storage, self.workers), self._progress(title)
            prepare_teacher(settings, data, folder, resources, "teacher", progress)

        return RefTeacher.load(self.train_once(folder, "teacher.json", f"training {title}", train))

    def _progress(self, title: str) -> Callable[[Mapping[str, Any]], None]:
        """Logs a training's share of the work and the time left, once a minute."""
        started = logged = time.monotonic()

        def report(metrics: Mapping[str, Any]) -> None:
            nonlocal logged
            now, share = time.monotonic(), float(metrics.get("progress") or 0.0)
            if share and now >= logged + LOG_SECONDS:
                logged = now
                self.log(f"{title}: {share:.0%}, {time_left(now - started, share)}")

        return report

    def train_once(self, folder: Path, marker: str, title: str, train: Callable[[Path], object]) -> Path:
        """Fill `folder` by `train` unless its file `marker` exists.

        `train` gets a directory for its checkpoints, the same one after an interruption.
        """
        if not (folder / marker).is_file():
            self.log(title)
            storage = folder.with_name(f".{folder.name}.runs")
            train(storage)
            shutil.rmtree(storage)
        return folder

    def resources(self, storage: Path, workers: int = 0) -> Resources:
        """Training in this process or on Ray workers, on the comparison's device; all runs share soft labels."""
        return Resources(
            workers=workers,
            gpus_per_worker=1 if self.config.device == "cuda" else 0,
            storage=str(storage),
            shared=str(self.out),
        )

    def respond(self, student: Path | None, task: TaskRows) -> Respond:
        """Load a student, or the base; its answers are as long as the comparison allows and the task needs.

        It answers in the precision that students are trained in.
        """
        tokens = max(self.config.evaluation.max_new_tokens, task.answer_tokens)
        precision = self.config.student.get("precision", "auto")
        return load_responder(self.base, student, tokens, self.config.device, precision)

    @cached_property
    def judges(self) -> Mapping[str, ResponseJudge]:
        """The judges of harmful answers, built once."""
        return judges_from(self.config.judges, self.config.device)

    def identity(self) -> dict[str, str]:
        """What all results depend on: rows, base and teacher by content."""
        return {**self.identity_without_teacher(), "teacher": self.teacher.id}

    def identity_without_teacher(self) -> dict[str, str]:
        """The same for results that do not use a teacher."""
        file = self.config.alignment
        aligned = {"alignment": hashlib.sha256(Path(file).read_bytes()).hexdigest()} if file else {}
        return {"rows": self.rows.identity, "base": self._fingerprint, **aligned}

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.base)

    def title(self) -> str:
        """Rows, base and teacher as one line of a report."""
        made = self.teacher.manifest
        return (
            f"Rows {self.rows.identity}, base `{Path(self.base).name}` ({made.base_fingerprint}), Ref-Teacher "
            f"{self.teacher.id} (layer {made.layer}, block threshold {made.thresholds.block:.3f})."
        )

    def settings(self, section: str) -> dict[str, Any]:
        """A section's part of the configuration."""
        return self.config.sections.get(section, {})

    def cached(
        self, kind: str, name: str, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The result of `make`, from `out/KIND/NAME-HASH.json` if it was made with the same key before.

        Each result is written at once, so that an interrupted comparison resumes. Errors are not cached.
        """
        if (known := self.stored(kind, name, key)) is not None:
            return known
        path = self.path_of(kind, name, key)
        started = time.perf_counter()
        result = make()
        document = {"key": key, "seconds": round(time.perf_counter() - started, 1), "result": result}
        with atomic_write(path) as scratch:
            scratch.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
        return result

    def path_of(self, kind: str, name: str, key: Mapping[str, Any]) -> Path:
        """The file of the result with this key; it need not exist."""
        return self.out / kind / f"{name}-{content_key(key)}.json"

    def stored(self, kind: str, name: str, key: Mapping[str, Any]) -> Result | None:
        """The cached result with this key, or None."""
        path = self.path_of(kind, name, key)
        if not path.is_file():
            return None
        found: Result = json.loads(path.read_text(encoding="utf-8"))["result"]
        return found


def _drawn(rows: Sequence[Example], label: Label, count: int) -> list[Example]:
    of_label = [row for row in rows if row.label is label]
    random.Random(f"bench/{label}").shuffle(of_label)  # noqa: S311 - an order, not a secret
    return of_label[:count]
