"""Which directories a run may replace."""

from pathlib import Path

import pytest

from reft_ray.core.errors import ReftError
from reft_ray.hf.adapter_files import ADAPTER, MODEL, OutputKind, check_replaceable
from reft_ray.hf.ref_teacher import TEACHER

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MODEL_FILES = ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json")
TEACHER_FILES = ("teacher.json", "refusal.safetensors", "README.md", *(f"adapter/{name}" for name in ADAPTER_FILES))


def holding(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


@pytest.mark.parametrize(
    ("kind", "files"),
    [(ADAPTER, ADAPTER_FILES), (MODEL, MODEL_FILES), (TEACHER, TEACHER_FILES), (TEACHER, ()), (ADAPTER, ())],
)
def test_an_older_output_of_the_kind_may_be_replaced(tmp_path: Path, kind: OutputKind, files: tuple[str, ...]) -> None:
    check_replaceable(holding(tmp_path, *files), kind)
    check_replaceable(tmp_path / "absent", kind)


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        (ADAPTER, ("package.json",)),
        (ADAPTER, ("adapter_config.json",)),
        (ADAPTER, MODEL_FILES),
        (ADAPTER, TEACHER_FILES),
        (MODEL, ("config.json",)),
        (TEACHER, ADAPTER_FILES),
        (TEACHER, ("README.md",)),
    ],
)
def test_another_kind_of_directory_may_not_be_replaced(
    tmp_path: Path, kind: OutputKind, files: tuple[str, ...]
) -> None:
    with pytest.raises(ReftError, match=f"{tmp_path} exists and holds no {kind.name}: choose another directory"):
        check_replaceable(holding(tmp_path, *files), kind)


@pytest.mark.parametrize(
    ("kind", "files", "foreign"),
    [
        (ADAPTER, ADAPTER_FILES, "thesis.tex"),
        (ADAPTER, ADAPTER_FILES, "data/adapter_config.json"),
        (MODEL, MODEL_FILES, "README.md"),
        (MODEL, MODEL_FILES, "other/weights.safetensors"),
        (TEACHER, TEACHER_FILES, "rows.jsonl"),
    ],
)
def test_an_output_with_foreign_files_may_not_be_replaced(
    tmp_path: Path, kind: OutputKind, files: tuple[str, ...], foreign: str
) -> None:
    with pytest.raises(ReftError, match=f"{tmp_path} holds {foreign} besides its {kind.name}: move it"):
        check_replaceable(holding(tmp_path, *files, foreign), kind)


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ReftError, match="is not a directory"):
        check_replaceable(holding(tmp_path, "notes") / "notes", ADAPTER)
