"""Labelled prompts and answers from JSONL files, with every problem at its file and line.

    labelled   {"prompt": "...", "label": "harmful" | "harmless", "source"?: "...", "response"?: "..."}
    answers    {"prompt": "...", "response": "...", "source"?: "..."}

Either may hold `messages` in place of `prompt` and `response`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reft_ray.core.conversation import ROLES, Conversation, Example, Label, chat, conversation_from
from reft_ray.core.errors import ReftError

_SHOWN_PROBLEMS = 5


def read_labelled(path: str | Path, label: Label | None = None) -> list[Example]:
    """Labelled rows; `label` is given to rows of a file that holds one class.

    Raises ReftError that names the first bad lines and how many there are.
    """
    rows: list[Example] = []
    problems: list[str] = []
    for number, values in _objects(Path(path), problems):
        try:
            rows.append(replace(_example(values, label), place=f"{path}:{number}"))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        more = f" (and {len(problems) - _SHOWN_PROBLEMS} more)" if len(problems) > _SHOWN_PROBLEMS else ""
        raise ReftError("; ".join(problems[:_SHOWN_PROBLEMS]) + more)
    if not rows:
        raise ReftError(f"{path} holds no row")
    return rows


def _objects(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                problems.append(f"{path}:{number}: not JSON ({error})")
                continue
            if isinstance(values, dict):
                yield number, values
            else:
                problems.append(f"{path}:{number}: a row must be a JSON object, not {type(values).__name__}")


def _example(values: dict[str, Any], label: Label | None) -> Example:
    given = values.get("label")
    if label is None:
        if given not in set(Label):
            raise ValueError(f"label must be harmful or harmless, not {given!r}")
        label = Label(given)
    return Example(_conversation(values), label, str(values.get("source") or ""))


def _conversation(values: dict[str, Any]) -> Conversation:
    turns = values.get("messages")
    if turns is not None:
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("messages must be a list of objects")
        for turn in turns:
            if turn.get("role") not in ROLES:
                raise ValueError(f"unknown role {turn.get('role')!r}, one of {', '.join(ROLES)}")
        conversation = conversation_from(turns)
    else:
        prompt, response = values.get("prompt"), values.get("response")
        if not isinstance(prompt, str) or not isinstance(response, str | None):
            raise ValueError("prompt must be a string, and response a string where there is one")
        conversation = chat(prompt, response)
    asked = [turn for turn in conversation if turn.role != "assistant"]
    if not asked or not asked[-1].content.strip():
        raise ValueError("the prompt is empty")
    return conversation


def check_labels(rows: Sequence[Example], name: str) -> None:
    """Raise ReftError unless rows of both labels are there; `name` is what people call the prompts."""
    seen = {row.label for row in rows}
    missing = [label.value for label in Label if label not in seen]
    if missing:
        raise ReftError(f"the {name} prompts hold no {' and no '.join(missing)} row: both labels are needed")


def join_answers(prompts: Sequence[Example], answers: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(the labelled prompts, with their answers where there are any; the answered rows to other prompts).

    The first answer to a prompt counts.
    """
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


def apart_from(rows: Sequence[Example], held: Sequence[Example]) -> list[Example]:
    """The rows whose prompts are not among those that validate."""
    known = {_key(row) for row in held}
    return [row for row in rows if _key(row) not in known]


def _key(row: Example) -> str:
    return row.prompt[-1].content


def hold_out_sources(rows: Sequence[Example], sources: Sequence[str]) -> tuple[list[Example], list[Example]]:
    """(training, validation): rows of the named sources validate. Raises ReftError for a source that is not there."""
    found = {row.source for row in rows}
    if missing := [source for source in sources if source not in found]:
        raise ReftError(f"no row has source {missing[0]!r}; there are {', '.join(sorted(found))}")
    held = set(sources)
    return [row for row in rows if row.source not in held], [row for row in rows if row.source in held]


def hold_out_rows(rows: Sequence[Example], share: float = 0.1, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(training, validation) by a random share of each label's prompts, with all of their rows.

    Both are of the same sources, so the figures of such a validation flatter.
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
    return apart_from(drawn, held), held
