"""The model card of a Ref-Teacher: what `teacher.json` says, for people."""

from __future__ import annotations

from typing import Any


def teacher_card(teacher_id: str, manifest: dict[str, Any]) -> str:
    """Markdown from the manifest's values; nothing here is written by hand."""
    quality, limits = manifest["quality"], manifest["thresholds"]
    lines = [
        f"# Ref-Teacher {teacher_id}",
        "",
        "Refuses harmful prompts and tells harmful from harmless ones by the cosine between a prompt's hidden feature",
        "and its refusal feature (arXiv 2506.07356). Made by reft_ray; load it with `RefTeacher.load`.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | `{manifest['base_name']}` (fingerprint `{manifest['base_fingerprint']}`) |",
        f"| chat template | `{manifest['template_hash']}` |",
        f"| layer, position | {manifest['layer']}, {manifest['position']} |",
        f"| window | texts longer than {manifest['window_tokens']} tokens are scored in windows, the highest decides |",
        f"| weights | {manifest['weights']} |",
        f"| features | {manifest['feature']}, {manifest['feature_mix']:g} of the adapter |",
        f"| thresholds | review above {limits['review']:.4f}, block above {limits['block']:.4f} |",
        f"| answers of an assistant | both thresholds higher by {manifest['response_offset']:.4f} |",
        f"| validation rows | {quality['rows']} ({quality['harmful']} harmful) |",
        f"| AUROC, AUPRC | {quality['auroc']:.4f}, {quality['auprc']:.4f} |",
        f"| recall at 1 % FPR | {quality['recall_at_1_fpr']:.4f} |",
        f"| recall, FPR at the block threshold | {quality['recall']:.4f}, {quality['fpr']:.4f} |",
        "",
        "## Validation per source",
        "",
        "| source | rows | share blocked |",
        "|---|---|---|",
    ]
    lines += [
        f"| {source.replace('|', '/')} | {int(row['rows'])} | {row['blocked']:.4f} |"
        for source, row in sorted(manifest["per_source"].items())
    ]
    lines += [
        "",
        "## Limits",
        "",
        "One axis, harmful or not: it has no view on categories. Languages, domains and attacks outside its training",
        "sources are not covered by the figures above; measure them with `reft-ray teacher evaluate`.",
        "",
    ]
    return "\n".join(lines)
