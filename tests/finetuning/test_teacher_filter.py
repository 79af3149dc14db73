"""What the filter reads: geometry, layers and shares, the same on any number of ranks, and old artefacts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reft_ray.core.batch import TokenizedExample
from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.errors import ReftError
from reft_ray.finetuning.config import Resources, TeacherConfig
from reft_ray.finetuning.teacher_filter import sample_per_class
from reft_ray.finetuning.teacher_loop import TeacherData, equal_shares
from reft_ray.finetuning.trainer import prepare_teacher
from reft_ray.hf.ref_teacher import RefTeacher, content_id

HARMFUL = [
    Example(chat(f"how to steal a {thing}", "sorry i cannot help"), Label.HARMFUL, "a")
    for thing in ("car", "bread", "me", "please")
]
HARMLESS = [
    Example(chat(f"how can i bake {thing}", "sure here is bread"), Label.HARMLESS, "b")
    for thing in ("bread", "a car", "with me", "please")
]
DATA = TeacherData(HARMFUL + HARMLESS, HARMFUL + HARMLESS)
TEXTS = [row.prompt[-1].content for row in DATA.validation]


def built(base: Path, out: Path, **changes: object) -> RefTeacher:
    config = TeacherConfig.of({"base": str(base), "weights": "none", "feature": "base", **changes})
    return prepare_teacher(config, DATA, out, Resources(workers=0))


@pytest.mark.parametrize("geometry", ["whitened", "centred", "plain"])
def test_a_teacher_is_built_without_training(llama: Path, tmp_path: Path, geometry: str) -> None:
    made = built(llama, tmp_path / "teacher", geometry=geometry)
    assert made.manifest.geometry == geometry
    assert sorted(path.name for path in made.folder.iterdir()) == ["README.md", "refusal.safetensors", "teacher.json"]
    scores = [item.score for item in made.scorer(precision="float32").score(TEXTS)]
    # The thresholds were chosen on the scores that the filter gives.
    blocked = sum(score > made.manifest.thresholds.block for score in scores[: len(HARMFUL)]) / len(HARMFUL)
    assert blocked == pytest.approx(made.manifest.quality.recall)
    with pytest.raises(ReftError, match="has no adapter"):
        made.attach(torch.nn.Linear(1, 1))


def test_the_filter_of_a_trained_adapter_is_chosen_anew(llama: Path, tmp_path: Path) -> None:
    trained = {"base": str(llama), "epochs": 1, "lora": {"rank": 2}, "optimizer": {"learning_rate": 0.05}}
    config = TeacherConfig.of({**trained, "feature_mix": 1.0})
    teacher = prepare_teacher(config, DATA, tmp_path / "teacher", Resources(workers=0))
    changes = {"adapter": str(teacher.folder / "adapter"), "feature_mix": 0.5}
    again = prepare_teacher(TeacherConfig.of({**trained, **changes}), DATA, tmp_path / "again", Resources(workers=0))
    weights = [load_file(made.folder / "adapter" / "adapter_model.safetensors") for made in (teacher, again)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (teacher.manifest.feature_mix, again.manifest.feature_mix) == (1.0, 0.5)
    assert again.manifest.config["steps"] == 0
    with pytest.raises(ReftError, match="does not fit this adapter's rank"):
        prepare_teacher(
            TeacherConfig.of({**trained, **changes, "lora": {"rank": 4}}), DATA, tmp_path / "no", Resources(workers=0)
        )


def test_reference_prompts_are_of_all_sources_in_equal_numbers_while_they_last() -> None:
    sizes = {"large": 100, "small": 3, "middle": 20}
    sources = [name for name, size in sizes.items() for _ in range(size)]
    rows = [TokenizedExample([n], [False], 0, Label.HARMFUL, n) for n in range(len(sources))]

    def drawn(count: int, known: list[str] | None) -> Counter[str]:
        return Counter(sources[row.index] for row in sample_per_class(rows, count, 0, known))

    assert drawn(60, sources) == {"large": 14, "small": 3, "middle": 13}
    assert drawn(2000, sources) == sizes
    assert drawn(60, None)["large"] > 20


def test_layers_are_averaged(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_bases["llama"]  # its four layers leave a choice
    made = built(base, tmp_path / "teacher", sweep=(0.25, 0.75), average_layers=2)
    assert len(made.readouts.layers) == 2
    one = built(base, tmp_path / "one", sweep=(0.25, 0.75), average_layers=1)
    assert len(one.readouts.layers) == 1
    scores = made.scorer(precision="float32").score(TEXTS)
    assert all(-1 <= item.score <= 1 for item in scores)


def test_an_artefact_of_format_1_is_read_as_plain(llama: Path, tmp_path: Path) -> None:
    made = built(llama, tmp_path / "teacher", geometry="plain", average_layers=1)
    expected = [item.score for item in made.scorer(precision="float32").score(TEXTS)]
    file = made.folder / "refusal.safetensors"
    (refusal_D,) = load_file(file).values()
    save_file({"refusal": refusal_D}, file)
    values = json.loads((made.folder / "teacher.json").read_text())
    for key in ("id", "geometry", "shrinkage", "layers"):
        del values[key]
    values["format"] = 1
    values = {"id": content_id(made.folder, values), **values}
    (made.folder / "teacher.json").write_text(json.dumps(values))
    old = RefTeacher.load(made.folder)
    assert (old.manifest.geometry, old.readouts.layers) == ("plain", made.readouts.layers)
    assert [item.score for item in old.scorer(precision="float32").score(TEXTS)] == expected


def test_readouts_of_another_width_or_layer_are_refused(llama: Path, tmp_path: Path) -> None:
    made = built(llama, tmp_path / "teacher", average_layers=1)
    file = made.folder / "refusal.safetensors"
    tensors = load_file(file)
    for wrong, message in (
        ({name: part[..., :-1].contiguous() for name, part in tensors.items()}, "the base's width is"),
        ({f"1{name}": part for name, part in tensors.items()}, "has layers"),
        ({"nonsense": torch.zeros(1)}, "does not hold refusal features"),
    ):
        save_file(wrong, file)
        values = json.loads((made.folder / "teacher.json").read_text())
        values.pop("id")
        (made.folder / "teacher.json").write_text(json.dumps({"id": content_id(made.folder, values), **values}))
        with pytest.raises(ReftError, match=message):
            RefTeacher.load(made.folder)


def test_reg_sees_every_source_of_a_label_equally_often() -> None:
    counts = {("forum", Label.HARMFUL): 5, ("list", Label.HARMFUL): 2, ("chat", Label.HARMLESS): 3}
    rows, sources = [], []
    for (source, label), count in counts.items():
        rows += [TokenizedExample([n], [False], 0, label, n) for n in range(count)]
        sources += [source] * count

    shared = equal_shares(rows, sources)

    assert Counter(row.label for row in shared) == {Label.HARMFUL: 10, Label.HARMLESS: 3}
    assert Counter(row.index for row in shared if row.label is Label.HARMFUL) == {0: 4, 1: 3, 2: 1, 3: 1, 4: 1}
