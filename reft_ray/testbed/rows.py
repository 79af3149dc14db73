"""The world's rows as JSONL files in the formats that the commands read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from reft_ray.core.conversation import Example


def write_chat_rows(path: Path, rows: Iterable[Example]) -> int:
    """Write `{"messages": [...]}` lines and return their number; unanswered rows keep their prompt alone."""
    return _write(
        path,
        ({"messages": [{"role": turn.role, "content": turn.content} for turn in row.messages]} for row in rows),
    )


def write_labelled_prompts(path: Path, rows: Iterable[Example]) -> int:
    """Write `{"prompt", "label", "source", "response"?}` lines of one-turn rows and return their number."""
    return _write(path, (_labelled(row) for row in rows))


def _labelled(row: Example) -> dict[str, str]:
    if row.label is None or len(row.prompt) != 1:
        raise ValueError(
            f"a labelled prompt has a label and one user turn, got label {row.label}, {len(row.prompt)} turns"
        )
    record = {"prompt": row.prompt[0].content, "label": row.label.value, "source": row.source}
    return record | ({"response": row.response} if row.answered else {})


def _write(path: Path, records: Iterable[Mapping[str, object]]) -> int:
    """Write under a temporary name and rename at the end, so that no half file is ever seen."""
    scratch = path.with_name(f".{path.name}.tmp")
    count = 0
    with scratch.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    scratch.replace(path)
    return count
