"""One frozen configuration per training run, with every default of the method."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from reft_ray.core.geometry import Geometry
from reft_ray.core.guided import Method
from reft_ray.core.quality import Target, Targets
from reft_ray.settings import Settings


class Lora(Settings):
    """Low-rank adapters; `scale` is alpha / rank. With `rslora` the product is scaled by alpha / sqrt(rank)."""

    rank: int = Field(16, ge=1, le=1024)
    scale: float = Field(2.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear", "attention", "mlp"] = Field("all-linear", description="which layers get adapters")
    rslora: bool = False
    first_layer: int = Field(1, ge=1, description="lowest layer with an adapter: those below need no backward pass")


class Optimizer(Settings):
    """AdamW with linear warm-up and cosine decay over the share of rows trained."""

    learning_rate: float = Field(2e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    states: Literal["float32", "8bit"] = Field("float32", description="8bit: bitsandbytes on a GPU")


class Training(Settings):
    """What both stages share."""

    base: str
    weights: Literal["lora", "full", "none"] = "lora"
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    epochs: float = Field(3.0, gt=0)
    batch_rows: int = Field(16, ge=1)
    micro_batch_tokens: int | None = Field(None, ge=1, description="default: what fits into free memory, up to 8192")
    max_tokens: int = Field(4096, ge=8, description="longer answers are cut, longer prompts left out")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool | None = Field(None, description="default: where activations do not fit otherwise")
    packing: bool | None = Field(None, description="rows end to end without padding; default: where a model can")
    compile: bool = Field(False, description="compile decoder layers with torch.compile")
    kernels: Literal["torch", "liger"] = Field("torch", description="liger: fused norms and activations, on a GPU")
    quantize: Literal["none", "4bit"] = Field("none", description="4bit: QLoRA through bitsandbytes, on a GPU")
    seed: int = Field(0, ge=0, lt=2**31)
    checkpoint_every: int = Field(200, ge=1)
    log_every: int = Field(10, ge=1)

    def longest_row(self, context: int) -> int:
        """The most tokens of a row: `max_tokens`, within the base model's context."""
        return min(self.max_tokens, context)

    @field_validator("base")
    @classmethod
    def _absolute(cls, base: str) -> str:
        """A local directory by its absolute path: workers run in other directories."""
        return str(Path(base).absolute()) if Path(base).is_dir() else base


class TeacherConfig(Training):
    """Stage 1. `layer` is where REG acts (default: half depth); the verdict's layer is swept afterwards.

    With `feature=base` the filter reads the base model without the adapter: layer and R_l are found before training,
    there is no REG, and the teacher learns its answers alone. For bases whose features training on few sources makes
    worse on others.

    The filter reads weights between the base's (0) and the teacher's (1), which generalise better to new sources
    (WiSE-FT, arXiv 2109.01903): `feature_mix`, by default the largest of 1, 1/2, 1/4 and 0 that ranks the validation
    prompts no worse than the base does, within `tolerance`. The teacher answers with 1.
    """

    feature: Literal["trained", "base"] = "trained"
    adapter: str | None = Field(None, description="a trained adapter as `lora` says: choose its filter, train nothing")
    geometry: Geometry = Geometry.WHITENED
    shrinkage: float | None = Field(None, gt=0, le=1, description="default: chosen on validation prompts")
    average_layers: int | None = Field(None, ge=1, description="default: 1 to 5, chosen on validation prompts")
    margin: float = Field(0.5, gt=0, le=1, description="REG pulls a prompt no further than this; plain geometry: 1")
    feature_mix: float | None = Field(None, ge=0, le=1)
    separation_weight: float = Field(0.5, ge=0)
    layer: int | None = Field(None, ge=1)
    sweep: tuple[float, float] = (0.3, 0.7)
    feature_decay: float = Field(0.95, ge=0, lt=1)
    refresh_every: int = Field(1, ge=1)
    reference_prompts: int = Field(4800, ge=2)
    answer_sample: int = Field(500, ge=1)
    window_tokens: int | None = Field(None, ge=16, description="default: as long as 99 % of the training prompts")
    answered_rows: float = Field(
        0.5, ge=0, le=1, description="share of a batch with answers; 1: REG acts on these rows alone, in the same pass"
    )
    answer_shares: tuple[float, ...] = Field(
        (1.0,), min_length=1, description="shares of the trained adapter to answer with: the best on validation prompts"
    )
    balanced: bool = True
    balanced_sources: bool = Field(True, description="REG sees the prompts of each source equally often")
    evaluate_every: int | None = Field(None, ge=1)
    patience: int = Field(5, ge=1)
    tolerance: float = Field(0.005, ge=0, description="checkpoints rank alike within this much AUROC")
    thresholds: Thresholding = Field(default_factory=lambda: Thresholding())

    @model_validator(mode="after")
    def _base_with_adapter(self) -> Self:
        if self.feature == "base" and self.weights == "full":
            raise ValueError("feature=base reads the base without the adapter: it needs weights=lora")
        if self.feature == "trained" and self.weights == "none":
            raise ValueError("weights=none trains nothing: it needs feature=base")
        if self.adapter and self.weights != "lora":
            raise ValueError("adapter names a trained LoRA adapter: it needs weights=lora")
        if self.feature_mix is not None and (self.feature == "base" or self.weights == "full"):
            raise ValueError("feature_mix scales the adapter of trained features: leave feature=trained, weights=lora")
        return self


class Thresholding(Settings):
    """The operator's targets for the thresholds: block at a recall, or at a false-positive rate."""

    block_recall: float | None = Field(None, gt=0, le=1)
    block_fpr: float | None = Field(None, gt=0, lt=1, description="default: 0.01, unless block_recall is set")
    review_recall: float | None = Field(None, gt=0, le=1)
    review_fpr: float | None = Field(None, gt=0, lt=1, description="default: 0.05, unless review_recall is set")
    answer_fpr: float = Field(0.001, ge=0, lt=1, description="share of harmless answers that may be withheld")

    @model_validator(mode="after")
    def _one_target_each(self) -> Self:
        for name in ("block", "review"):
            if None not in (getattr(self, f"{name}_recall"), getattr(self, f"{name}_fpr")):
                raise ValueError(f"state either {name}_recall or {name}_fpr, not both")
        return self

    @property
    def targets(self) -> Targets:
        """The targets of `core.quality`."""
        block = Target(self.block_recall, self.block_fpr) if self.block_recall else Target(fpr=self.block_fpr or 0.01)
        review = (
            Target(self.review_recall, self.review_fpr) if self.review_recall else Target(fpr=self.review_fpr or 0.05)
        )
        return Targets(block, review)


class Baselines(Settings):
    """Settings of other defences' steps, as their released code has them; see `reft_ray.baselines`."""

    lisa_alignment_steps: int = Field(100, ge=1)
    lisa_user_steps: int = Field(900, ge=1)
    lisa_rho: float = Field(1.0, ge=0)
    vaccine_rho: float = Field(2.0, ge=0)
    booster_weight: float = Field(5.0, ge=0)
    booster_alpha: float = Field(0.1, ge=0)
    ldifs_weight: float = Field(0.01, ge=0)


class Preference(Settings):
    """DPO: `beta` is how much a pair counts against the distance from the start; `sft_weight` adds the cross entropy
    of the chosen answers, without which a base model may unlearn both answers of a pair."""

    beta: float = Field(0.1, gt=0)
    sft_weight: float = Field(0.2, ge=0)


class FinetuneConfig(Training):
    """Stage 2: how a student is finetuned on user rows.

    `step` other than guided trains with a different defence, for comparisons. `init_adapter` is a PEFT directory of the
    same rank to start from.
    """

    method: Method = Method.GUIDED
    step: Literal["guided", "lisa", "vaccine", "booster", "ldifs"] = "guided"
    baselines: Baselines = Baselines()
    init_adapter: str | None = None
    loss: Literal["sft", "dpo"] = Field("sft", description="dpo: rows are preference pairs")
    preference: Preference = Preference()
    select: Literal["last", "best"] = Field("last", description="best: the checkpoint with the lowest validation loss")
    patience: int | None = Field(None, ge=1, description="stop after this many checkpoints without a lower one")
    enable_thinking: bool = Field(False, description="learn empty thoughts of answers without reasoning")
    labels: Literal["soft", "hard"] = "soft"
    init: Literal["base", "aligned"] = "base"
    teacher_forward: Literal["cached", "live"] = "cached"
    allow_failed_teacher: bool = Field(False, description="learn from a teacher that failed `reft-ray teacher check`")
    distill_weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    alignment_ratio: float = Field(1.0, gt=0)
    min_steps: int = Field(0, ge=0, description="steps at least; those without user rows come first and only distil")
    topk: int = Field(64, ge=1)
    shuffle_rows: int = Field(10_000, ge=1)
    threshold: float | None = Field(None, ge=-1, le=1)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.weights == "none":
            raise ValueError("weights=none trains nothing: a student needs lora or full")
        if self.weights == "full" and self.teacher_forward == "live" and self.method.distills:
            raise ValueError(
                "a live teacher needs the student to be an adapter on the same base: use teacher_forward=cached"
            )
        if self.step in ("lisa", "booster") and not (self.method.distills and self.labels == "hard"):
            raise ValueError(f"step={self.step} reads alignment rows by hard labels: set method=distill, labels=hard")
        if self.loss == "dpo" and (self.weights == "full" or self.step != "guided"):
            raise ValueError("loss=dpo compares with the weights at the start: it needs weights=lora and step=guided")
        if self.init_adapter and (self.init == "aligned" or self.weights == "full"):
            raise ValueError("init_adapter is a start by itself: leave init=base and weights=lora")
        return self

    @property
    def caches_labels(self) -> bool:
        """Whether the teacher's soft labels are made before the run."""
        return self.method.distills and self.labels == "soft" and self.teacher_forward == "cached"

    @property
    def reads_teacher(self) -> bool:
        """Whether a student needs the teacher itself: its soft labels or its weights."""
        return self.init == "aligned" or (self.method.distills and self.labels == "soft")

    def total_steps(self, rows: int) -> int:
        """How many steps a run over `rows` user rows takes."""
        return self.alignment_steps(rows) + self._user_steps(rows)

    def alignment_steps(self, rows: int) -> int:
        """How many of them only distil, before the first user row."""
        if not self.method.distills or self.step != "guided":
            return 0
        return max(0, self.min_steps - self._user_steps(rows))

    def alignment_draws(self, rows: int) -> float:
        """About how many alignment rows a run over `rows` user rows draws, if both are equally long."""
        return (self.alignment_steps(rows) * self.batch_rows + self.epochs * rows) * self.alignment_ratio

    def _user_steps(self, rows: int) -> int:
        """Batches end with each epoch."""
        epochs, rest = divmod(round(self.epochs * rows), rows)
        return epochs * math.ceil(rows / self.batch_rows) + math.ceil(rest / self.batch_rows)


class Resources(Settings):
    """What a run takes from the cluster, and how many failures it survives."""

    workers: int = Field(1, ge=0, description="0 trains in this process, without a cluster")
    min_workers: int | None = Field(None, ge=1, description="train with as few while a cluster cannot start all")
    start_minutes: float = Field(15, gt=0, description="how long a group of workers may take to start, nodes included")
    gpus_per_worker: float = Field(0, ge=0)
    cpus_per_worker: float | None = Field(None, gt=0, description="default: 1, without workers all that there are")
    strategy: Literal["data_parallel", "fsdp"] = "data_parallel"
    max_failures: int = Field(3, ge=-1)
    storage: str | None = Field(None, description="checkpoints: a directory or pyarrow.fs URI that all workers see")
    shared: str | None = Field(None, description="soft labels: a directory that all workers see; default: storage")


TeacherConfig.model_rebuild()
