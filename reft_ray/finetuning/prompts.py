"""Labelled prompts and answers from JSONL files; errors name file and line.

    labelled   {"prompt": "...", "label": "harmful" | "harmless", "source"?, "licence"?, "category"?, "response"?}
    answers    {"prompt": "...", "response": "...", "source"?, "licence"?}

Rows of any format of `rows.format` are read, e.g. `messages` instead of `prompt` and `response`.
"""

from __future__ import annotations

import codecs
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reft_ray.core.conversation import Example, Label
from reft_ray.core.errors import ReftError
from reft_ray.rows.reader import RowReader

_SHOWN_PROBLEMS = 5


def read_labelled(path: str | Path, label: Label | None = None) -> list[Example]:
    """Labelled rows; `label` is the label of all rows of a file that holds one class.

    Raises ReftError that names the first bad lines and how many there are.
    """
    rows: list[Example] = []
    problems: list[str] = []
    reader = RowReader(judging=True)
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue
            try:
                rows.append(replace(_example(reader, text, label), place=f"{path}:{number}"))
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
    if problems:
        more = f" (and {len(problems) - _SHOWN_PROBLEMS} more)" if len(problems) > _SHOWN_PROBLEMS else ""
        raise ReftError("; ".join(problems[:_SHOWN_PROBLEMS]) + more)
    if not rows:
        raise ReftError(f"{path} has no rows")
    return rows


def _example(reader: RowReader, line: bytes, label: Label | None) -> Example:
    row = reader.read_line(line)
    if isinstance(row, list):
        raise ValueError(str(row[0]))
    if label is None:
        given = row.fields.get("label")
        if given not in set(Label):
            raise ValueError(f"label must be harmful or harmless, not {given!r}")
        label = Label(given)
    source, licence, category = (str(row.fields.get(key) or "") for key in ("source", "licence", "category"))
    example = Example(row.conversation, label, source, licence=licence, category=category[:64])
    asked = [turn for turn in example.messages if turn.role != "assistant"]
    if not asked or not asked[-1].content.strip():
        raise ValueError("the prompt is empty")
    return example


def under_licences(rows: Sequence[Example], licences: Sequence[str]) -> tuple[list[Example], Counter[str]]:
    """(the rows under one of the licences, or all rows if none is named; how many were left out, by licence)."""
    if not licences:
        return list(rows), Counter()
    left_out = Counter(row.licence for row in rows if row.licence not in licences)
    return [row for row in rows if row.licence in licences], left_out


def sources_of(rows: Iterable[Example], use: str) -> list[dict[str, Any]]:
    """What a model card says of rows: {source, licence, label, prompts, use}; `prompts` counts rows."""
    counts = Counter((row.source, row.licence, str(row.label or "")) for row in rows)
    return [
        {"source": source, "licence": licence, "label": label, "prompts": count, "use": use}
        for (source, licence, label), count in sorted(counts.items())
    ]


def check_labels(rows: Sequence[Example], name: str) -> None:
    """Raise ReftError unless there are rows of both labels; `name` names the prompts in the error."""
    seen = {row.label for row in rows}
    missing = [label.value for label in Label if label not in seen]
    if missing:
        raise ReftError(f"the {name} prompts hold no {' and no '.join(missing)} row: both labels are needed")


def join_answers(prompts: Sequence[Example], answers: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(the labelled prompts, each with its first answer of the same label if any; the answers to other prompts)."""
    known: dict[str, Example] = {}
    for answer in answers:
        known.setdefault(_key(answer), answer)
    joined = []
    for prompt in prompts:
        found = None if prompt.answered else known.get(_key(prompt))
        same = found is not None and found.label == prompt.label
        joined.append(replace(prompt, messages=found.messages) if found and same else prompt)
    taken = {_key(prompt) for prompt in prompts}
    return joined, [answer for key, answer in known.items() if key not in taken]


def without_prompts_of(rows: Sequence[Example], held: Sequence[Example]) -> list[Example]:
    """The rows whose prompts are not in the held-out rows."""
    known = {_key(row) for row in held}
    return [row for row in rows if _key(row) not in known]


def _key(row: Example) -> str:
    return row.prompt[-1].content


def hold_out_sources(rows: Sequence[Example], sources: Sequence[str]) -> tuple[list[Example], list[Example]]:
    """(training, validation): validation has all rows of the named sources. Raises ReftError for an unknown source."""
    found = {row.source for row in rows}
    if missing := [source for source in sources if source not in found]:
        raise ReftError(f"no row has source {missing[0]!r}; there are {', '.join(sorted(found))}")
    held = set(sources)
    return [row for row in rows if row.source not in held], [row for row in rows if row.source in held]


def hold_out_rows(rows: Sequence[Example], share: float = 0.1, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(training, validation): validation has a random share of each label's prompts, with all their rows.

    Both have the same sources, so this validation is optimistic.
    """
    drawn: list[Example] = []
    chosen: set[str] = set()
    for label in Label:
        of_label = [row for row in rows if row.label is label]
        random.Random(f"{seed}/holdout/{label}").shuffle(of_label)  # noqa: S311
        prompts = list(dict.fromkeys(_key(row) for row in of_label))
        chosen.update(prompts[: max(1, round(share * len(prompts)))])
        drawn += of_label
    held = [row for row in drawn if _key(row) in chosen]
    return without_prompts_of(drawn, held), held
