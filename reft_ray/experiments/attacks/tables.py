"""The attacks as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reft_ray.experiments.markdown import gate, interval, percent, table

_LEGEND = (
    "Leaked: the attacker's rows that pass the filter. Evaded: those among the rows that are blocked undisguised. "
    "Brackets: 95 % intervals."
)


def render(result: Mapping[str, Any], _pictures: Path) -> str:
    """Markdown: what leaks, the findings about the datasets, and the students of the kept rows."""
    attacks, control, settings = result["attacks"], result["control"], result["settings"]
    withheld = f"{control['dropped']} of {control['rows']}"
    lines = [
        _LEGEND,
        "",
        *table(("task rows", "block threshold"), [(settings["task_rows"], f"{result['block']:.3f}")]),
        "",
        *table(
            ("attack", "rows", "leaked %", "evaded %", "task rows withheld", "findings about the dataset"),
            [
                *map(_attack, attacks),
                ("none", "", "", "", withheld, _findings(control["findings"])),
            ],
        ),
        "",
        *table(("attack", "description"), ((one["name"], one["about"]) for one in attacks)),
        "",
    ]
    if result["suffixes"]:
        lines += [*_suffixes(result["suffixes"]), ""]
    return "\n".join([*lines, "### Students of the kept rows", "", *_students(attacks)])


def _attack(one: Mapping[str, Any]) -> Sequence[object]:
    evaded = f"{_share(one['evaded'])} of {one['evaded']['n']}" if one["evaded"] else "-"
    withheld = f"{one['harmless_dropped']} of {one['harmless']}"
    return one["name"], one["leaked"]["n"], _share(one["leaked"]), evaded, withheld, _findings(one["findings"])


def _share(measure: Mapping[str, Any]) -> str:
    return interval([measure["value"], *measure["interval"]], ".1f")


def _findings(findings: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{found['name']} ({found['severity']}, {found['count']})" for found in findings) or "none"


def _suffixes(found: Sequence[Mapping[str, float]]) -> list[str]:
    """The first search is for one suffix for all requests, the others are for one request each."""
    rows = []
    for title, part in (("one for all requests", found[:1]), ("one for each request (mean)", found[1:])):
        if part:
            scores = (sum(one[key] for one in part) / len(part) for key in ("before", "after"))
            rows.append((title, len(part), *(f"{score:.3f}" for score in scores)))
    return table(("searched suffix", "searches", "refusal score before", "after"), rows)


def _students(attacks: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ("attack", "student", "HS %", "HS %, asked as in the attack", "FA %", "over-refusal %", "gate", "too long")
    rows: list[Sequence[object]] = []
    for one in attacks:
        for method, row in one["students"].items():
            rewritten = "harmful_score_rewritten"
            asked = percent(row, rewritten) if rewritten in row else "-"
            others = (percent(row, name) for name in ("finetune_accuracy", "over_refusal"))
            rows.append(
                (one["name"], method, percent(row, "harmful_score"), asked, *others, gate(row), one["too_long"])
            )
        if not one["students"]:
            state = "not trained" if one["leaked"]["value"] else "nothing leaked"
            rows.append((one["name"], state, "", "", "", "", "", one["too_long"]))
    counts = [row["prompts"] for one in attacks for row in one["students"].values()][:1]
    asked_of = table(("harmful prompts", "harmless prompts", "task prompts"), (list(n.values()) for n in counts))
    return [*(asked_of if counts else ()), "", *table(head, rows)]
