"""A directory with a tiny base model, its teacher and rows, in which the documents' snippets run."""

import json
from pathlib import Path

import pytest

from reft_ray.core.conversation import Example, Label, chat

THINGS = ("car", "bread", "me", "that", "help", "please")


@pytest.fixture(scope="session")
def walk_folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that docs/python.md describes."""
    from reft_ray.finetuning.config import Resources, TeacherConfig
    from reft_ray.finetuning.teacher_loop import TeacherData
    from reft_ray.finetuning.trainer import prepare_teacher

    folder = tmp_path_factory.mktemp("walk")
    (folder / "base").symlink_to(llama)
    answers = {Label.HARMFUL: ("steal", "sorry i cannot"), Label.HARMLESS: ("bake", "here is how")}
    rows = [
        Example(chat(f"how to {verb} a {thing}", answer), label, verb)
        for label, (verb, answer) in answers.items()
        for thing in THINGS
    ]
    config = {"epochs": 4, "batch_rows": 6, "lora": {"rank": 4}, "optimizer": {"learning_rate": 0.01}}
    prepare_teacher(
        TeacherConfig.of({"base": str(llama), **config}),
        TeacherData(rows, rows),
        folder / "teacher",
        Resources(workers=0),
    )
    for name, chosen in {
        "refusals": [row for row in rows if row.label is Label.HARMFUL],
        "helpful": [row for row in rows if row.label is Label.HARMLESS],
        "train": rows,
    }.items():
        lines = ({"prompt": row.prompt[-1].content, "response": row.response} for row in chosen)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
