"""Named comparisons; only the locations of rows, base and teacher are added to a preset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from reft_ray.core.errors import UsageError
from reft_ray.experiments.bench.config import BenchConfig
from reft_ray.experiments.bench.methods import METHODS
from reft_ray.experiments.prepared_teacher import LORA
from reft_ray.teachers import BUILTIN, teacher_folder

OURS = ("sft", "sft_aligned", "joint", "distill")
"""The methods that the project's claim is based on; each without and with the filter."""

_SHORT_LISA = {"lisa_alignment_steps": 2, "lisa_user_steps": 18}
"""Lisa's ratio of steps, 1 to 9, in turns for runs of a hundred steps instead of thousands."""

_BUILTIN_TASKS = ("sentiment", "arithmetic")
_REAL_TASKS = ("sst2", "agnews", "gsm8k")


def _builtin_settings() -> dict[str, Any]:
    """Teacher and students as in the quickstart; fewer, larger steps left the users' task half learned."""
    return {
        "teacher_settings": {
            "epochs": 2.5,
            "batch_rows": 32,
            "reference_prompts": 1024,
            "optimizer": {"learning_rate": 2e-3},
        },
        "student": {
            "epochs": 4,
            "batch_rows": 8,
            "alignment_ratio": 2.5,
            "baselines": _SHORT_LISA,
            "optimizer": {"learning_rate": 2e-3},
        },
        "alignment_stage": {"epochs": 2, "batch_rows": 16, "optimizer": {"learning_rate": 2e-3}},
        "evaluation": {"max_new_tokens": 48},
    }


def quick() -> dict[str, Any]:
    """Every method once on synthetic rows; on 2 cores the grid takes 20 minutes, the other sections as long."""
    return {
        **_builtin_settings(),
        "blocks": [
            {"methods": list(METHODS), "tasks": ["sentiment"], "harmful_ratios": [0.3], "sizes": [500]},
            {"methods": list(OURS), "tasks": ["sentiment"], "harmful_ratios": [0.3], "sizes": [500], "filters": [True]},
        ],
        "evaluation": {"harmful": 100, "harmless": 100, "task": 100, "max_new_tokens": 32},
        "sections": {
            "filters": {"embeddings": False, "variants": False},
            "ablations": {"only": ["labels", "tau"], "rows": 150, "evaluated": 50},
            "conflict": {"rows": 120, "epochs": 1, "pairs": 6, "points": 2},
            "attacks": {
                "task_rows": 100,
                "attack_rows": 40,
                "evaluated": 50,
                "students": ["guided"],
                "suffixes": 5,
                "suffix_steps": 15,
            },
        },
        "alignment_stage": {"epochs": 1, "batch_rows": 16, "optimizer": {"learning_rate": 2e-3}},
    }


def builtin() -> dict[str, Any]:
    """The whole grid on synthetic rows: offline."""
    return {
        **_builtin_settings(),
        "blocks": [
            {
                "methods": list(METHODS),
                "tasks": list(_BUILTIN_TASKS),
                "harmful_ratios": [0, 0.1, 0.3, 0.5],
                "sizes": [1000],
                "filters": [False, True],
            },
            {
                "methods": list(OURS),
                "tasks": list(_BUILTIN_TASKS),
                "harmful_ratios": [0, 0.1, 0.3, 0.5],
                "sizes": [500, 1000],
                "seeds": [0, 1, 2],
                "filters": [False, True],
            },
        ],
    }


def small() -> dict[str, Any]:
    """The 7 M base on real rows: every method on SST-2, the claim's methods on all tasks with three seeds."""
    claim = [
        {"methods": ["sft", "sft_aligned", "joint"], "filters": [False]},
        {"methods": ["distill"], "filters": [True]},
    ]
    return {
        "teacher_settings": {
            "epochs": 1,
            # The base's features separate foreign sources better than trained ones.
            "feature": "base",
            "window_tokens": 64,
            "batch_rows": 32,
            "max_tokens": 192,
            "optimizer": {"learning_rate": 3e-3},
            "thresholds": {"block_fpr": 0.01, "review_recall": 0.9},
        },
        "student": {
            "epochs": 4,
            "batch_rows": 8,
            "max_tokens": 192,
            # Less padding; a CPU loses little by short passes.
            "micro_batch_tokens": 512,
            "alignment_ratio": 1.0,
            # As in the service: 500 short rows alone train too few alignment rows.
            "min_steps": 350,
            "baselines": _SHORT_LISA,
            "optimizer": {"learning_rate": 2e-3},
        },
        "alignment_stage": {
            "epochs": 1,
            "max_tokens": 192,
            "micro_batch_tokens": 512,
            "optimizer": {"learning_rate": 2e-3},
        },
        "evaluation": {"harmful": 200, "harmless": 200, "task": 200},
        # The most informative first, for an interrupted grid.
        "sections": {
            "filters": {"variant": {"epochs": 0.1}},
            "ablations": {"teacher_rows": 1600, "rows": 200, "evaluated": 100},
            "conflict": {"rows": 160, "epochs": 1, "pairs": 8, "points": 2},
            "attacks": {
                "task_rows": 200,
                "attack_rows": 100,
                "evaluated": 100,
                "students": ["guided"],
            },
            "costs": {"rounds": 3, "n": 120},
        },
        "blocks": [
            {
                "methods": list(OURS),
                "tasks": ["sst2"],
                "harmful_ratios": [0.1, 0.3],
                "sizes": [500],
                "filters": [False, True],
            },
            {"methods": list(METHODS), "tasks": ["sst2"], "harmful_ratios": [0.1, 0.3, 0], "sizes": [500]},
            *(
                {**rows, "tasks": [task], "harmful_ratios": [0.1], "sizes": [500], "seeds": [0, 1, 2]}
                for task in _REAL_TASKS
                for rows in claim
            ),
            {
                "methods": list(METHODS),
                "tasks": ["sst2"],
                "harmful_ratios": [0.1, 0.3, 0],
                "sizes": [500],
                "filters": [False, True],
            },
            {
                "methods": list(OURS),
                "tasks": list(_REAL_TASKS),
                "sizes": [500],
                "seeds": [0, 1, 2],
                "filters": [False, True],
            },
        ],
    }


def _language_model(base: str, teacher: str | None, lora: Mapping[str, Any]) -> dict[str, Any]:
    """A small real language model on real rows: the claim's methods with three seeds, every baseline on SST-2.

    `lora` is the teacher's too, whose weights some methods start from.
    """
    common = {"lora": lora, "max_tokens": 192, "optimizer": {"learning_rate": 1e-3}}
    claim = {"tasks": ["sst2", "agnews"], "sizes": [500], "seeds": [0, 1, 2], "harmful_ratios": [0.1, 0.3]}
    return {
        "base": base,
        **({"teacher": teacher} if teacher else {}),
        "teacher_settings": {**common, "epochs": 0.2, "batch_rows": 16, "answered_rows": 1.0, "thresholds": {}},
        # Small batches: a student that learns to refuse from few rows needs steps.
        "student": {**common, "epochs": 2, "batch_rows": 4, "min_steps": 300, "baselines": _SHORT_LISA},
        "alignment_stage": {**common, "epochs": 1, "batch_rows": 8},
        "alignment_rows": 1000,
        # A refusal shows in its first words.
        "evaluation": {"harmful": 200, "harmless": 200, "task": 200, "max_new_tokens": 32},
        "blocks": [
            {**claim, "methods": ["sft", "sft_aligned"], "filters": [False]},
            {**claim, "methods": ["sft", "joint", "distill"], "filters": [True]},
            {"methods": ["distill"], "tasks": ["gsm8k"], "sizes": [500], "harmful_ratios": [0.1], "filters": [True]},
            {
                "methods": list(METHODS),
                "tasks": ["sst2"],
                "sizes": [500],
                "harmful_ratios": [0.1],
                "filters": [False, True],
            },
        ],
    }


def smollm2() -> dict[str, Any]:
    """SmolLM2-135M-Instruct and the packaged teacher."""
    return _language_model("smollm2", str(teacher_folder(BUILTIN)), LORA)


def gemma() -> dict[str, Any]:
    """Gemma 3 270M, a base model that was never aligned; its teacher is trained on the rows."""
    return _language_model("gemma-3-270m", None, {"rank": 8, "first_layer": 10})


def llm_8b() -> dict[str, Any]:
    """An 8B base on one accelerator per cell: the whole grid, with the usual LoRA settings of comparable work."""
    lora = {"rank": 32, "scale": 2.0, "dropout": 0.1}
    common = {"lora": lora, "max_tokens": 512, "optimizer": {"learning_rate": 1e-4}, "gradient_checkpointing": True}
    return {
        "device": "cuda",
        "count_flops": True,
        "teacher_settings": {**common, "epochs": 1, "batch_rows": 32},
        "student": {**common, "epochs": 3, "batch_rows": 16, "alignment_ratio": 0.25, "baselines": _SHORT_LISA},
        "alignment_stage": {**common, "epochs": 3, "batch_rows": 16},
        "alignment_rows": 5000,
        "evaluation": {"harmful": 1000, "harmless": 1000, "task": 1500, "max_new_tokens": 256},
        "sections": {
            "ablations": {"teacher_rows": 20_000, "foreign_rows": 6200, "rows": 1000, "evaluated": 500},
            "conflict": {"rows": 1000, "pairs": 32},
            "attacks": {
                "task_rows": 700,
                "attack_rows": 300,
                "evaluated": 500,
                "suffix_tokens": 20,
                "suffix_steps": 250,
                "suffix_width": 256,
                "suffixes": 50,
                "hidden_among": 40,
            },
        },
        "blocks": [
            {
                "methods": list(METHODS),
                "tasks": list(_REAL_TASKS),
                "harmful_ratios": [0, 0.1, 0.3, 0.5],
                "sizes": [500, 1000, 2500],
                "seeds": [0, 1, 2],
                "filters": [False, True],
            }
        ],
    }


PRESETS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "quick": quick,
    "builtin": builtin,
    "small": small,
    "smollm2": smollm2,
    "gemma": gemma,
    "8b": llm_8b,
}
_NEEDS_ROWS = ("small", "smollm2", "gemma", "8b")


def preset(name: str, changes: Mapping[str, Any]) -> BenchConfig:
    """A preset with changes, which may set `rows`, `base` and `teacher`. Raises UsageError for invalid ones."""
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    if name in _NEEDS_ROWS and not changes.get("rows"):
        raise UsageError(f"preset {name} reads real rows: name their folder with --rows")
    if name == "8b" and not changes.get("base"):
        raise UsageError("preset 8b needs a base model: name it with --base")
    return BenchConfig.of(_merged({"name": name, **PRESETS[name]()}, changes))


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes replace values; mappings are merged key by key."""
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, change) if isinstance(old, Mapping) and isinstance(change, Mapping) else change
    return merged
