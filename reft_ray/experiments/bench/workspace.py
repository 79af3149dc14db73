"""What every section of a comparison works with: rows, base and teacher, and results cached by what they depend on."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from reft_ray.core.errors import ReftError
from reft_ray.evaluation.judges import Respond
from reft_ray.experiments.bench.config import BenchConfig
from reft_ray.experiments.bench.rows import BenchRows, TaskRows, builtin_rows, folder_rows
from reft_ray.finetuning.config import Resources, TeacherConfig
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.finetuning.trainer import prepare_teacher
from reft_ray.hf.generate import load_responder
from reft_ray.hf.loading import fingerprint
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.serving.builtin import cache_root
from reft_ray.testbed.base_model import ensure_base

Say = Callable[[str], None]
Result = dict[str, Any]


def content_key(value: Any) -> str:
    """16 hex digits of SHA-256 over a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Workspace:
    """One comparison under `out`; everything expensive is made on first use and kept there."""

    def __init__(
        self,
        config: BenchConfig,
        out: Path,
        say: Say = lambda _line: None,
        workers: int = 0,
        seconds: float = math.inf,
    ) -> None:
        self.config = config
        self._ends = time.monotonic() + seconds
        self.workers = workers
        self.out = out.absolute()
        self.say = say
        self.failures: list[str] = []
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def in_time(self) -> bool:
        """Whether another piece may be started; what runs is never cut off."""
        return time.monotonic() < self._ends

    @property
    def data(self) -> Path:
        """The folder of real rows. Raises ReftError in the built-in world, which has none."""
        if self.config.rows is None:
            raise ReftError("this section reads real rows: name their folder with --rows")
        return Path(self.config.rows).absolute() / "data"

    @cached_property
    def rows(self) -> BenchRows:
        """All rows of the comparison."""
        if self.config.rows is None:
            return builtin_rows(self.config.world)
        return folder_rows(self.data)

    @cached_property
    def base(self) -> str:
        """The base model: a directory or a hub id."""
        if self.config.base is not None:
            return self.config.base
        if self.config.rows is not None:
            return str(Path(self.config.rows).absolute() / "models/base-7m")
        self.say("the built-in base model")
        return str(ensure_base(cache_root(), 0, None, self.config.recipe))

    @cached_property
    def teacher(self) -> RefTeacher:
        """The Ref-Teacher: the configured artefact, or one trained here once."""
        if self.config.teacher is not None:
            return RefTeacher.load(self.config.teacher)
        settings = TeacherConfig.of({"base": self.base, **self.config.teacher_settings})
        folder = self.out / f"teacher-{content_key([settings.model_dump(mode='json'), self.rows.identity])}"
        return self.prepared(folder, settings, self.rows.teacher, "the Ref-Teacher")

    def prepared(self, folder: Path, settings: TeacherConfig, data: TeacherData, title: str) -> RefTeacher:
        """A teacher, trained once on as many workers as cells run at a time."""

        def train(storage: Path) -> None:
            prepare_teacher(settings, data, folder, self.resources(storage, self.workers), run_id="teacher")

        return RefTeacher.load(self.trained(folder, "teacher.json", f"training {title}", train))

    def trained(self, folder: Path, whole: str, what: str, train: Callable[[Path], object]) -> Path:
        """`folder`, filled by `train` once; the file `whole` says that it is.

        `train` is given a directory for its checkpoints, the same one after an interruption.
        """
        if not (folder / whole).is_file():
            self.say(what)
            storage = folder.with_name(f".{folder.name}.runs")
            train(storage)
            shutil.rmtree(storage)
        return folder

    def resources(self, storage: Path, workers: int = 0) -> Resources:
        """Training in this process or on Ray workers, on the comparison's device; soft labels are shared by all."""
        return Resources(
            workers=workers,
            gpus_per_worker=1 if self.config.device == "cuda" else 0,
            storage=str(storage),
            shared=str(self.out),
        )

    def respond(self, student: Path | None, task: TaskRows) -> Respond:
        """A student, or the base, that answers with as many tokens as the comparison allows and the task needs."""
        tokens = max(self.config.evaluation.max_new_tokens, task.answer_tokens)
        return load_responder(self.base, student, tokens, self.config.device)

    def identity(self) -> dict[str, str]:
        """What all results depend on: rows, base and teacher by content."""
        return {**self.world_identity(), "teacher": self.teacher.id}

    def world_identity(self) -> dict[str, str]:
        """The same without the teacher, for what does not use one."""
        return {"rows": self.rows.identity, "base": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.base)

    def title(self) -> str:
        """The same for people."""
        made = self.teacher.manifest
        return (
            f"Rows {self.rows.identity}, base `{Path(self.base).name}` ({made.base_fingerprint}), Ref-Teacher "
            f"{self.teacher.id} (layer {made.layer}, block threshold {made.thresholds.block:.3f})."
        )

    def settings(self, section: str) -> dict[str, Any]:
        """What the configuration says about a section."""
        return self.config.sections.get(section, {})

    def cached(
        self, kind: str, name: str, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The result of `make`, from `out/KIND/NAME-HASH.json` where it was made under the same key before.

        Written at once when it is there, so that an interrupted comparison goes on. What `make` raises is not kept.
        """
        if (known := self.known(kind, name, key)) is not None:
            return known
        path = self.path_of(kind, name, key)
        started = time.perf_counter()
        result = make()
        document = {"key": key, "seconds": round(time.perf_counter() - started, 1), "result": result}
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.writing")
        scratch.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
        scratch.replace(path)
        return result

    def path_of(self, kind: str, name: str, key: Mapping[str, Any]) -> Path:
        """Where a result of this key lies, made or not."""
        return self.out / kind / f"{name}-{content_key(key)}.json"

    def known(self, kind: str, name: str, key: Mapping[str, Any]) -> Result | None:
        """The result of this key, or None where it was not made yet."""
        path = self.path_of(kind, name, key)
        if not path.is_file():
            return None
        found: Result = json.loads(path.read_text(encoding="utf-8"))["result"]
        return found
