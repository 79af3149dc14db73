"""What a Ref-Teacher's directory holds besides its weights: the model card, and alignment rows that come with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SOURCE_KEYS = ("source", "licence", "label", "prompts", "use")
ANSWER_MEASURES = ("harmful_score", "over_refusal", "incoherent")
"""Measures of the teacher's own answers, each in percent with a limit."""

ALIGNMENT = "alignment.jsonl"


def alignment_file(teacher: Path) -> Path | None:
    """The labelled alignment rows that come with a teacher, if any: for students of its base model."""
    file = teacher / ALIGNMENT
    return file if file.is_file() else None


def model_card(teacher_id: str, manifest: Mapping[str, Any]) -> str:
    """The manifest as Markdown."""
    quality, limits = manifest["quality"], manifest["thresholds"]
    facts = {
        "base model": f"`{manifest['base_name']}` (fingerprint `{manifest['base_fingerprint']}`)",
        "chat template": f"`{manifest['template_hash']}`",
        "layers, position": f"{', '.join(map(str, manifest['layers']))}; {manifest['position']}",
        "geometry": manifest["geometry"],
        "window": f"longer texts are scored in windows of {manifest['window_tokens']} tokens; the highest score counts",
        "weights": manifest["weights"],
        "features": f"{manifest['feature']}, {manifest['feature_mix']:g} of the adapter",
        "thresholds": f"review above {limits['review']:.4f}, block above {limits['block']:.4f}",
        "assistant's answers": f"both thresholds are raised by {manifest['response_offset']:.4f}",
        "validation rows": f"{quality['rows']} ({quality['harmful']} harmful)",
        "AUROC, AUPRC": f"{quality['auroc']:.4f}, {quality['auprc']:.4f}",
        "recall at 1 % FPR": f"{quality['recall_at_1_fpr']:.4f}",
        "recall, FPR at the block threshold": f"{quality['recall']:.4f}, {quality['fpr']:.4f}",
    }
    lines = [
        f"# Ref-Teacher {teacher_id}",
        "",
        "Refuses harmful prompts, and separates harmful from harmless ones by the cosine between a prompt's hidden",
        "feature and its refusal feature (arXiv 2506.07356). Made by reft_ray; load it with `RefTeacher.load`.",
        "",
        *_table(("", ""), facts.items()),
        "",
        *_sources(manifest["sources"]),
        "## Validation per source",
        "",
        *_table(
            ("source", "rows", "share blocked"),
            (
                (source, int(row["rows"]), f"{row['blocked']:.4f}")
                for source, row in sorted(manifest["per_source"].items())
            ),
        ),
        "",
        *_answers(manifest),
        *_recalibrations(manifest["config"].get("recalibrated", ())),
        "## What it cannot do",
        "",
        "- Name a kind of harm: it has one score, harmful or not, and no categories.",
        "- Judge languages that its sources do not contain. They are in English unless their names say otherwise.",
        f"- Read more than {manifest['window_tokens']} tokens at once: a longer text is cut into windows, and harm",
        "  that shows only across windows is missed.",
        "- Cover domains and attacks that its sources do not contain: measure yours with `reft-ray teacher evaluate`.",
        "",
    ]
    return "\n".join(lines)


def _sources(sources: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not sources:
        return
    yield from ("## Sources", "")
    yield from _table(SOURCE_KEYS, ([row[key] or "not stated" for key in SOURCE_KEYS] for row in sources))
    yield ""


def _answers(manifest: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Its own answers", "")
    found = manifest["answers_quality"]
    if found is None:
        yield from ("Not measured: run `reft-ray teacher check` before it teaches.", "")
        return
    yield from _table(
        ("measure", "percent", "95 % interval", "prompts", "limit"),
        (
            (
                name.replace("_", " "),
                f"{found[name]['value']:.1f}",
                "{:.1f} to {:.1f}".format(*found[name]["interval"]),
                found[name]["n"],
                f"{found['limits'][name]:g}",
            )
            for name in ANSWER_MEASURES
        ),
    )
    yield ""


def _recalibrations(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for entry in entries:
        files = ", ".join(f"{file['name']} ({file['rows']} rows)" for file in entry["prompts"])
        yield from (f"Thresholds and calibration were chosen again, from `{entry['teacher']}`, on {files}.", "")


def _table(header: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |" if any(header) else "|" + " |" * len(header)
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(" ".join(str(cell).split()).replace("|", "/") for cell in row) + " |"
