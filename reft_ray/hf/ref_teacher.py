"""The Ref-Teacher as an artefact: one directory that says what it was made from, and refuses anything else.

    teacher.json           what it is: base, template, layer, thresholds, calibration, quality, training config
    refusal.safetensors    R_l after training, [D] float32
    adapter/               the LoRA adapter as a PEFT directory (or `model/`: full weights)
    README.md              the same for people

The id is a content hash; loading recomputes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reft_ray.core.errors import ReftError
from reft_ray.core.quality import FilterQuality
from reft_ray.core.verdict import Calibration, Thresholds
from reft_ray.hf.card import teacher_card
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import Base, load_base
from reft_ray.hf.lora import attach_saved, merge, save_adapter
from reft_ray.hf.precision import resolve_dtype
from reft_ray.hf.product import ADAPTER, MODEL, OutputKind, check_replaceable
from reft_ray.hf.scorer import TeacherScorer, packs

FORMAT = 1
MANIFEST = "teacher.json"
_REFUSAL = "refusal.safetensors"
TEACHER = OutputKind(
    "Ref-Teacher", (MANIFEST,), (_REFUSAL, "README.md", *ADAPTER.below("adapter"), *MODEL.below("model"))
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artefact is. Texts longer than `window_tokens` are scored in windows.

    `feature` says whether hidden states were trained to be scored ("trained") or are the base's own ("base"),
    `feature_mix` how much of the adapter the filter reads: 0 is the base's hidden state, 1 the teacher's.

    `histogram` counts the validation scores in equal bins over [-1, 1], for drift.
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
    position: str = "prompt_end"
    format: int = FORMAT

    @classmethod
    def read(cls, values: dict[str, Any]) -> Manifest:
        """From JSON. Raises ReftError for another format or missing keys."""
        if values.get("format") != FORMAT:
            raise ReftError(f"this release reads Ref-Teacher format {FORMAT}, not {values.get('format')}")
        try:
            if values.get("feature", "trained") not in ("trained", "base"):
                raise ReftError(f"{MANIFEST}: unknown feature {values['feature']!r}")
            # Artefacts from before there was a mix read all of the adapter or nothing.
            mix = values.get("feature_mix", 0.0 if values.get("feature") == "base" else 1.0)
            if not 0 <= mix <= 1:
                raise ReftError(f"{MANIFEST}: feature_mix {mix} is not in [0, 1]")
            return cls(
                **{
                    **values,
                    "feature_mix": mix,
                    "thresholds": Thresholds(**values["thresholds"]),
                    "calibration": Calibration(**values["calibration"]),
                    "quality": FilterQuality(**values["quality"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ReftError(f"{MANIFEST} is not complete: {error}") from None


class RefTeacher:
    """A prepared teacher on disk, checked but not yet on any model."""

    def __init__(self, folder: Path, manifest: Manifest, refusal_D: Tensor, teacher_id: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.refusal_D = refusal_D
        self.id = teacher_id

    @classmethod
    def load(cls, folder: str | Path) -> RefTeacher:
        """Read and verify an artefact. Raises ReftError when it is absent, changed or of another format."""
        # Absolute, because workers that read it again run in directories of their own.
        folder = Path(folder).absolute()
        if not (folder / MANIFEST).is_file():
            raise ReftError(f"no Ref-Teacher at {folder}: {MANIFEST} is missing")
        try:
            values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ReftError(f"{folder / MANIFEST}:{error.lineno}: not JSON ({error.msg})") from None
        stated = values.pop("id", None)
        manifest = Manifest.read(values)
        actual = content_id(folder, values)
        if stated != actual:
            raise ReftError(f"{folder} was changed after it was made: its id is {stated}, its content gives {actual}")
        refusal_D = load_file(folder / _REFUSAL)["refusal"]
        if refusal_D.shape != (manifest.width,):
            raise ReftError(
                f"the refusal feature in {folder} has shape {tuple(refusal_D.shape)}, not ({manifest.width},)"
            )
        return cls(folder, manifest, refusal_D, actual)

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
        if made.layer > base.layers:
            raise ReftError(f"{self.id} reads layer {made.layer}, the base has {base.layers}")

    def base(self, name: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Base:
        """The base model that the artefact names, or the same weights at another path; checked."""
        base = load_base(name or self._base_path(), dtype, device)
        self.check(base, ChatFormat(base.tokenizer))
        return base

    def _base_path(self) -> str:
        """The recorded path; an artefact that was moved together with its base finds it beside itself."""
        recorded = self.manifest.base_name
        beside = self.folder.parent / Path(recorded).name
        return str(beside) if not Path(recorded).exists() and beside.is_dir() else recorded

    def attach(self, model: nn.Module, name: str = "teacher", trainable: bool = False) -> PeftModel:
        """Put the teacher's adapter on a base model that `check` accepted. Raises ReftError for full weights."""
        if self.manifest.weights != "lora":
            raise ReftError(f"{self.id} was trained with full weights: it cannot share a base, use cached soft targets")
        return attach_saved(model, name, self.folder / "adapter", trainable)

    def standalone(self, base: Base, mix: float = 1.0) -> nn.Module:
        """The teacher as a bare model with a share of its adapter merged; takes over the base's weights."""
        if mix == 0:
            return base.model
        if self.manifest.weights == "lora":
            return merge(self.attach(base.model), mix)
        base.model.load_state_dict(load_file(self.folder / "model" / "model.safetensors"), strict=False)
        return base.model.eval()

    def scorer(
        self,
        base_name: str | None = None,
        device: str | None = None,
        precision: str = "auto",
        window_tokens: int | None = None,
        batch_tokens: int = 4096,
    ) -> TeacherScorer:
        """The filter, ready to score: its share of the adapter merged in float32, cut, then cast.

        `window_tokens` replaces the window that the teacher was measured with.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        base = self.base(base_name)
        made = self.manifest
        model = self.standalone(base, made.feature_mix)
        dtype = resolve_dtype(precision, device)
        packed = packs(device, dtype)
        if packed:
            model.set_attn_implementation("flash_attention_2")  # type: ignore[operator]
        scorer = TeacherScorer(
            model.to(device=device, dtype=dtype),  # type: ignore[arg-type]
            ChatFormat(base.tokenizer),
            self.refusal_D,
            made.layer,
            self.id,
            made.thresholds,
            made.calibration,
            made.response_offset,
            window_tokens or made.window_tokens,
            batch_tokens,
            packed=packed,
        )
        if device == "cpu":
            scorer.spread()
        return scorer


def save_teacher(folder: Path, model: nn.Module, manifest: Manifest, refusal_D: Tensor) -> RefTeacher:
    """Write an artefact under a temporary name and rename it; an older artefact there is replaced.

    `model` carries the adapter `teacher`, or is the fully finetuned model itself. Raises ReftError when `folder`
    holds anything but an artefact.
    """
    check_replaceable(folder, TEACHER)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".teacher-") as scratch:
        made = Path(scratch) / "artefact"
        made.mkdir()
        save_file({"refusal": refusal_D.float().cpu().contiguous()}, made / _REFUSAL)
        if isinstance(model, PeftModel):
            save_adapter(model, "teacher", made / "adapter", manifest.base_name)
        else:
            model.save_pretrained(made / "model")  # type: ignore[operator]
        values = dataclasses.asdict(manifest)
        teacher_id = content_id(made, json.loads(json.dumps(values)))
        (made / MANIFEST).write_text(json.dumps({"id": teacher_id, **values}, indent=2) + "\n", encoding="utf-8")
        (made / "README.md").write_text(teacher_card(teacher_id, values), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return RefTeacher.load(folder)


def content_id(folder: Path, manifest: dict[str, Any]) -> str:
    """`rt-` and 16 hex digits of SHA-256 over the manifest and every tensor file, in the order of their names."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return "rt-" + digest.hexdigest()[:16]


def load_scorer(
    teacher: Path, base: str | None, precision: str = "auto", threshold: float | None = None
) -> TeacherScorer:
    """Load a teacher's artefact and build its scorer; each screening process does so itself.

    `threshold` replaces the teacher's own thresholds: rows above it are blocked, and none is left for review.
    """
    scorer = RefTeacher.load(teacher).scorer(base, precision=precision)
    if threshold is not None:
        scorer.thresholds = Thresholds(threshold, threshold)
    return scorer
