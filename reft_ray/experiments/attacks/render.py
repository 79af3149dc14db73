"""The attacks as Markdown; every sentence is filled by the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_GATE_NOTE = (
    "The gate holds a student against absolute limits and against the base (`evaluation/gate.py`); what it "
    "names is the "
    "limit that was not met."
)


def render(result: Mapping[str, Any], _pictures: Path) -> str:
    """Markdown: what leaks, what the dataset checks see, and what the students of the leaked rows do."""
    attacks, settings = result["attacks"], result["settings"]
    lines = [
        f"Each attack puts its rows among {settings['task_rows']} harmless task rows; the set is screened with "
        "findings, and "
        "students are trained on what was kept. *Leaked*: the share of the attacker's rows that pass the filter (block "
        f"threshold {result['block']:.3f}). *Evaded*: the same among rows that are blocked undisguised, which "
        "is what the "
        "disguise itself achieves. Brackets: 95 % intervals.",
        "",
        "| attack | rows | leaked % | evaded % | findings about the dataset |",
        "|---|---|---|---|---|",
    ]
    for one in attacks:
        evaded = _share(one["evaded"]) if one["evaded"] else "-"
        n = f" of {one['evaded']['n']}" if one["evaded"] else ""
        lines.append(
            f"| {one['name']} | {one['leaked']['n']} | {_share(one['leaked'])} | {evaded}{n} | "
            f"{_findings(one['findings'])} |"
        )
    control = result["control"]
    lines += [
        "",
        f"Without an attack, {control['dropped']} of {control['rows']} task rows are withheld, and the findings are: "
        f"{_findings(control['findings'])}.",
        "",
        *_suffixes(result["suffixes"]),
        "",
        "What each attack is:",
        "",
        *(f"- **{one['name']}**: {one['about']}." for one in attacks),
        "",
        "### Students of what leaked",
        "",
        *_students(attacks),
        "",
        *_reading(attacks, control),
    ]
    return "\n".join(lines)


def _share(measure: Mapping[str, Any]) -> str:
    low, high = measure["interval"]
    return f"{measure['value']:.1f} ({low:.1f}-{high:.1f})"


def _findings(findings: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{found['name']} ({found['severity']}, {found['count']})" for found in findings) or "none"


def _suffixes(found: Sequence[Mapping[str, float]]) -> list[str]:
    if not found:
        return []
    shared, own = found[0], found[1:]
    said = (
        f"The searched suffix for all requests lowered their mean refusal score from {shared['before']:.3f} to "
        f"{shared['after']:.3f} where it was searched"
    )
    if own:
        before, after = (sum(one[key] for one in own) / len(own) for key in ("before", "after"))
        said += f"; suffixes of their own lowered it from {before:.3f} to {after:.3f} on average"
    return [f"{said}."]


def _students(attacks: Sequence[Mapping[str, Any]]) -> list[str]:
    # What there was to ask, which may be less than the settings allow.
    counts = [
        f"HS on {row['harmful_score']['n']} harmful prompts, FA on {row['finetune_accuracy']['n']} test rows. "
        for one in attacks
        for row in one["students"].values()
    ]
    lines = [
        f"{next(iter(counts), '')}{_GATE_NOTE}",
        "",
        "| attack | student | HS % | HS %, asked as in the attack | FA % | over-refusal % | gate |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in attacks:
        for method, row in one["students"].items():
            asked = _share(row["harmful_score_rewritten"]) if "harmful_score_rewritten" in row else "-"
            gate = "passed" if row["gate"]["passed"] else f"failed: {', '.join(row['gate']['failures'])}"
            lines.append(
                f"| {one['name']} | {method} | {_share(row['harmful_score'])} | {asked} | "
                f"{_share(row['finetune_accuracy'])} |"
                f" {_share(row['over_refusal'])} | {gate} |"
            )
        if not one["students"]:
            reason = "not trained" if one["leaked"]["value"] else "none: nothing leaked"
            lines.append(f"| {one['name']} | {reason} | | | | | |")
        if one["too_long"]:
            lines.append(f"| | {one['too_long']} kept rows do not fit the context and were left out | | | | | |")
    return lines


def _reading(attacks: Sequence[Mapping[str, Any]], control: Mapping[str, Any]) -> list[str]:
    """What stops what: the filter, the findings that a clean set does not have, distillation, the gate."""
    usual = {found["name"] for found in control["findings"]}
    lines = ["Read by line of defence:", ""]
    stopped = [one["name"] for one in attacks if one["leaked"]["value"] == 0]
    if stopped:
        lines.append(f"- The filter alone stops all rows of: {', '.join(stopped)}.")
    evading = [one for one in attacks if one["evaded"] and one["evaded"]["value"] >= 50]
    if evading:
        lines.append(
            "- At least half of the rows that would be blocked get through as: "
            + ", ".join(f"{one['name']} ({one['evaded']['value']:.0f} %)" for one in evading)
            + "."
        )
    seen = {
        one["name"]: [found["name"] for found in one["findings"] if found["name"] not in usual]
        for one in attacks
        if one["leaked"]["value"] > 0
    }
    if told := [f"{name} ({', '.join(found)})" for name, found in seen.items() if found]:
        lines.append(
            "- Of those that leak, the dataset checks raise a finding that the clean set does not for: "
            f"{'; '.join(told)}."
        )
    if silent := [name for name, found in seen.items() if not found]:
        lines.append(f"- They say nothing new about: {', '.join(silent)}.")
    lines += _by_student(attacks)
    return lines


def _by_student(attacks: Sequence[Mapping[str, Any]]) -> list[str]:
    methods = list(dict.fromkeys(method for one in attacks for method in one["students"]))
    lines = []
    for method in methods:
        rows = [(one["name"], one["students"][method]) for one in attacks if method in one["students"]]
        name, worst = max(rows, key=lambda row: row[1]["harmful_score"]["value"])
        caught = sum(not row["gate"]["passed"] for _, row in rows)
        harmful = [row for _, row in rows if row["harmful_score"]["value"] > 5]
        refused = sum("harmful_score" in row["gate"]["failures"] for row in harmful)
        mean = sum(row["harmful_score"]["value"] for _, row in rows) / len(rows)
        lines.append(
            f"- Students trained by `{method}` on what leaked: HS {mean:.1f} % on average over {len(rows)} "
            "attacks, at most "
            f"{worst['harmful_score']['value']:.1f} % ({name}); {len(harmful)} are above 5 %, and the gate "
            f"stops {refused} of "
            f"these for it. It stops {caught} of the {len(rows)} for any reason."
        )
    return lines
