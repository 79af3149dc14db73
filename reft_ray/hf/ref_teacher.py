"""The Ref-Teacher as an artefact: a directory that names its base model and works with no other.

    teacher.json           base, template, layer, thresholds, calibration, quality, training config
    refusal.safetensors    per layer that is read: R_l, and W c and W where there are any, float32
    adapter/               the LoRA adapter as a PEFT directory (or `model/`: full weights)
    README.md              the model card

The id is a content hash, verified at loading.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reft_ray.atomic import atomic_directory
from reft_ray.core.errors import ReftError
from reft_ray.core.geometry import Geometry, Readouts
from reft_ray.core.quality import FilterQuality
from reft_ray.core.verdict import Calibration, Thresholds
from reft_ray.hf.adapter_files import ADAPTER, MODEL, OutputKind, check_replaceable
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.compute import default_device, resolve_dtype
from reft_ray.hf.loading import Base, load_base
from reft_ray.hf.lora import attach_saved, merge, save_adapter
from reft_ray.hf.model_store import KNOWN
from reft_ray.hf.packing import is_fast
from reft_ray.hf.scorer import TeacherScorer
from reft_ray.hf.signatures import SIGNATURE, sign_if_asked, verify_if_asked
from reft_ray.hf.teacher_card import ALIGNMENT, ANSWER_MEASURES, SOURCE_KEYS, model_card

FORMAT = 2
MANIFEST = "teacher.json"
_REFUSAL = "refusal.safetensors"
TEACHER = OutputKind(
    "Ref-Teacher",
    (MANIFEST,),
    (_REFUSAL, ALIGNMENT, "README.md", SIGNATURE, *ADAPTER.in_folder("adapter"), *MODEL.in_folder("model")),
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `teacher.json`. Texts longer than `window_tokens` are scored in windows.

    `feature` says whether hidden states were trained to be scored ("trained") or are the base's own ("base"),
    `feature_mix` the share of the adapter that the filter applies: 0 is the base's hidden state, 1 the teacher's.

    `histogram` counts the validation scores in equal bins over [-1, 1], for drift.

    `sources` lists the rows by {source, licence, label, prompts, use}. `answers_quality` has the teacher's own harmful
    score, over-refusal and incoherent answers in percent with their limits, or None if they were never measured.
    """

    base_name: str
    base_fingerprint: str
    template_hash: str
    layer: int
    width: int
    weights: str
    thresholds: Thresholds
    calibration: Calibration
    quality: FilterQuality
    per_source: dict[str, dict[str, float]]
    histogram: list[int]
    config: dict[str, Any]
    response_offset: float = 0.0
    window_tokens: int = 512
    feature: str = "trained"
    feature_mix: float = 1.0
    geometry: str = Geometry.PLAIN
    shrinkage: float | None = None
    layers: tuple[int, ...] = ()
    position: str = "prompt_end"
    sources: list[dict[str, Any]] = field(default_factory=list)
    answers_quality: dict[str, Any] | None = None
    format: int = FORMAT

    @classmethod
    def read(cls, values: dict[str, Any]) -> Manifest:
        """From JSON. Raises ReftError for an unknown format or missing keys."""
        if values.get("format") not in (1, FORMAT):
            raise ReftError(f"this release reads Ref-Teacher formats 1 and {FORMAT}, not {values.get('format')}")
        try:
            if values.get("feature", "trained") not in ("trained", "base"):
                raise ReftError(f"{MANIFEST}: unknown feature {values['feature']!r}")
            # Artefacts older than the mix apply all of the adapter or nothing.
            mix = values.get("feature_mix", 0.0 if values.get("feature") == "base" else 1.0)
            if not 0 <= mix <= 1:
                raise ReftError(f"{MANIFEST}: feature_mix {mix} is not in [0, 1]")
            _check_provenance(values.get("sources", []), values.get("answers_quality"))
            return cls(
                **{
                    **values,
                    "feature_mix": mix,
                    # Format 1 read one layer by the plain cosine.
                    "geometry": Geometry(values.get("geometry", Geometry.PLAIN)),
                    "layers": tuple(values.get("layers") or [values["layer"]]),
                    "thresholds": Thresholds(**values["thresholds"]),
                    "calibration": Calibration(**values["calibration"]),
                    "quality": FilterQuality(**values["quality"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ReftError(f"{MANIFEST} is incomplete: {error}") from None


def _check_provenance(sources: Any, answers_quality: Any) -> None:
    """Raise KeyError, TypeError or ValueError for a source without a key, or a measure without a value or a limit."""
    for source in sources:
        for key in SOURCE_KEYS:
            source[key]
    for name in ANSWER_MEASURES if answers_quality is not None else ():
        float(answers_quality[name]["value"])
        float(answers_quality["limits"][name])


class RefTeacher:
    """A teacher on disk, verified but not loaded onto a model."""

    def __init__(self, folder: Path, manifest: Manifest, readouts: Readouts, teacher_id: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.readouts = readouts
        self.id = teacher_id

    @classmethod
    def load(cls, folder: str | Path) -> RefTeacher:
        """Read and verify an artefact. Raises ReftError if it is absent, changed or of an unknown format."""
        # Absolute, because workers read it again from other working directories.
        folder = Path(folder).absolute()
        if not (folder / MANIFEST).is_file():
            raise ReftError(f"no Ref-Teacher at {folder}: {MANIFEST} is missing")
        verify_if_asked(folder)
        try:
            values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ReftError(f"{folder / MANIFEST}:{error.lineno}: not JSON ({error.msg})") from None
        stated = values.pop("id", None)
        manifest = Manifest.read(values)
        actual = content_id(folder, values)
        if stated != actual:
            raise ReftError(f"{folder} was changed after it was made: its id is {stated}, its content gives {actual}")
        return cls(folder, manifest, _read_readouts(folder / _REFUSAL, manifest), actual)

    def check(self, base: Base, chat: ChatFormat) -> None:
        """Raise ReftError unless the artefact was made for this base model, template and layer."""
        made = self.manifest
        if base.fingerprint != made.base_fingerprint:
            raise ReftError(
                f"{self.id} was made for the base {made.base_name} ({made.base_fingerprint}), "
                f"not for {base.name} ({base.fingerprint})"
            )
        if chat.hash != made.template_hash:
            raise ReftError(f"{self.id} was made with chat template {made.template_hash}, the base has {chat.hash}")
        if max(made.layers) > base.layers:
            raise ReftError(f"{self.id} reads layer {max(made.layers)}, the base has {base.layers}")

    def base(self, name: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Base:
        """The base model that the artefact names, or the same weights from the path `name`; checked."""
        base = load_base(name or self._base_path(), dtype, device)
        self.check(base, ChatFormat(base.tokenizer))
        return base

    def _base_path(self) -> str:
        """The recorded path; if artefact and base were moved together, the base in the same parent folder."""
        recorded = self.manifest.base_name
        if recorded in KNOWN:
            return recorded
        sibling = self.folder.parent / Path(recorded).name
        return str(sibling) if not Path(recorded).exists() and sibling.is_dir() else recorded

    def attach(self, model: nn.Module, name: str = "teacher", trainable: bool = False) -> PeftModel:
        """Attach the teacher's adapter to a base model that `check` accepted. Raises ReftError for full weights."""
        if self.manifest.weights != "lora":
            raise ReftError(f"{self.id} has no adapter (weights={self.manifest.weights}): use teacher_forward=cached")
        return attach_saved(model, name, self.folder / "adapter", trainable)

    def standalone(self, base: Base, mix: float = 1.0) -> nn.Module:
        """The teacher as a bare model with a share of its adapter merged; modifies the base's weights in place."""
        if mix == 0 or self.manifest.weights == "none":
            return base.model
        if self.manifest.weights == "lora":
            return merge(self.attach(base.model), mix)
        # A large model is in several files.
        for file in sorted((self.folder / "model").glob("*.safetensors")):
            base.model.load_state_dict(load_file(file), strict=False)
        return base.model.eval()

    def scorer(
        self,
        base_name: str | None = None,
        device: str | None = None,
        precision: str = "auto",
        window_tokens: int | None = None,
        batch_tokens: int = 4096,
    ) -> TeacherScorer:
        """The filter, ready to score: its share of the adapter merged in float32, truncated, then cast.

        `window_tokens` replaces the window that the teacher was validated with.
        """
        device = device or default_device()
        base = self.base(base_name)
        made = self.manifest
        model = self.standalone(base, made.feature_mix)
        dtype = resolve_dtype(precision, device)
        scorer = TeacherScorer(
            model.to(device=device, dtype=dtype),  # type: ignore[arg-type]
            ChatFormat(base.tokenizer),
            self.readouts,
            self.id,
            made.thresholds,
            made.calibration,
            made.response_offset,
            window_tokens or made.window_tokens,
            batch_tokens,
            packed=is_fast(device, dtype),
        )
        if device == "cpu":
            scorer.enable_parallel_passes()
        return scorer


def save_teacher(
    folder: Path, model: nn.Module, manifest: Manifest, readouts: Readouts, weights: Mapping[str, Tensor] | None = None
) -> RefTeacher:
    """Write an artefact under a temporary name and rename it; an older artefact is replaced.

    `model` carries the adapter `teacher`, or is the fully finetuned model itself; `weights` are its trained parameters
    by name if they were gathered from shards. Raises ReftError if `folder` holds anything but an artefact.
    """
    check_replaceable(folder, TEACHER)
    with atomic_directory(folder, replace=True) as made:
        save_file({name: part.contiguous() for name, part in readouts.to("cpu").tensors().items()}, made / _REFUSAL)
        if isinstance(model, PeftModel):
            tensors = None if weights is None else dict(weights)
            save_adapter(model, "teacher", made / "adapter", manifest.base_name, tensors)
        elif manifest.weights == "full":
            model.save_pretrained(made / "model", state_dict=weights)  # type: ignore[operator]
        _write_manifest(made, manifest)
    return RefTeacher.load(folder)


def save_with_manifest(folder: Path, teacher: RefTeacher, manifest: Manifest) -> RefTeacher:
    """Write a teacher's tensors with a different manifest to `folder`, which may be its own directory; the id is new.

    Raises ReftError if `folder` holds anything but an artefact.
    """
    check_replaceable(folder, TEACHER)
    with atomic_directory(folder.absolute(), replace=True) as made:
        shutil.copytree(
            teacher.folder, made, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, "README.md", SIGNATURE)
        )
        _write_manifest(made, dataclasses.replace(manifest, format=FORMAT))
    return RefTeacher.load(folder)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    """The manifest with the id of the directory's content, and the model card."""
    values = dataclasses.asdict(manifest)
    teacher_id = content_id(folder, json.loads(json.dumps(values)))
    (folder / MANIFEST).write_text(json.dumps({"id": teacher_id, **values}, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(teacher_id, values), encoding="utf-8")
    sign_if_asked(folder)


def _read_readouts(file: Path, manifest: Manifest) -> Readouts:
    tensors = load_file(file)
    if set(tensors) == {"refusal"}:
        tensors = {f"{manifest.layer}.refusal": tensors["refusal"]}
    try:
        readouts = Readouts.from_tensors(tensors)
    except (KeyError, ValueError) as error:
        raise ReftError(f"{file} does not hold refusal features: {error}") from None
    if readouts.layers != tuple(sorted(manifest.layers)):
        raise ReftError(f"{file} has layers {readouts.layers}, {MANIFEST} says {manifest.layers}")
    for name, part in tensors.items():
        if any(size != manifest.width for size in part.shape):
            raise ReftError(f"{name} in {file} has shape {tuple(part.shape)}, the base's width is {manifest.width}")
    return readouts


def content_id(folder: Path, manifest: dict[str, Any]) -> str:
    """`rt-` and 16 hex digits of SHA-256 over the manifest and every tensor file, in order of name."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return "rt-" + digest.hexdigest()[:16]


def load_scorer(
    teacher: str | Path, base: str | None, precision: str = "auto", threshold: float | None = None
) -> TeacherScorer:
    """Load a teacher's artefact and build its scorer, in each screening process.

    `threshold` replaces the teacher's thresholds: rows above it are blocked, and none is left for review.
    """
    scorer = RefTeacher.load(teacher).scorer(base, precision=precision)
    if threshold is not None:
        scorer.thresholds = Thresholds(threshold, threshold)
    return scorer
