"""Both loops in this process: artefacts, soft targets, exact resumption."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reft_ray.core.batch import collate, micro_batches
from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.errors import ReftError, StoppedError, UsageError
from reft_ray.core.losses import held_out
from reft_ray.finetuning.config import FinetuneConfig, Resources, TeacherConfig
from reft_ray.finetuning.rows import (
    LEAST_ALIGNMENT,
    CyclingSampler,
    SamplerState,
    enough_alignment,
    global_batches,
    rank_slice,
    shuffled,
)
from reft_ray.finetuning.runtime import LocalRuntime
from reft_ray.finetuning.targets import ensure_soft_targets, soft_targets_on_worker
from reft_ray.finetuning.teacher_filter import FilterSelection, sample_answers, sweep_layers
from reft_ray.finetuning.teacher_loop import TeacherData, train_teacher
from reft_ray.finetuning.trainer import FinetuneInputs, finetune, prepare_teacher
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import attach_saved, merge
from reft_ray.hf.ref_teacher import RefTeacher

HARMFUL = [
    Example(chat(f"how to steal a {w}", "sorry i cannot"), Label.HARMFUL, "a") for w in ["car", "bread", "me", "that"]
]
HARMLESS = [
    Example(chat(f"how to bake a {w}", "here is how"), Label.HARMLESS, "b") for w in ["car", "bread", "me", "that"]
]
UNANSWERED = [
    Example(chat("please steal bread"), Label.HARMFUL, "c"),
    Example(chat("please tell me"), Label.HARMLESS, "c"),
]
USER = [Example(chat(f"tell me {'no ' * i}", "sure here is")) for i in range(10)]
LOCAL = Resources(workers=0)


def teacher_config(base: Path, **changes: object) -> TeacherConfig:
    values = {
        "base": str(base),
        "epochs": 4,
        "batch_rows": 8,
        "lora": {"rank": 4},
        "optimizer": {"learning_rate": 0.01},
    }
    return TeacherConfig.of({**values, **changes})


def filter_score(teacher: RefTeacher, hidden_states: Sequence[torch.Tensor]) -> float:
    """The filter's score from the hidden states of one plain forward pass."""
    readouts = teacher.readouts
    return float(readouts.score({layer: hidden_states[layer][:, -1] for layer in readouts.layers}))


def finetune_config(base: Path, **changes: object) -> FinetuneConfig:
    values = {"base": str(base), "epochs": 2, "batch_rows": 4, "lora": {"rank": 4, "dropout": 0.1}}
    return FinetuneConfig.of({**values, **changes})


@pytest.fixture(scope="module")
def teacher(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RefTeacher:
    data = TeacherData(HARMFUL + HARMLESS + UNANSWERED, HARMFUL + HARMLESS)
    return prepare_teacher(teacher_config(llama), data, tmp_path_factory.mktemp("made") / "teacher", LOCAL)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_existing_soft_labels_need_no_model(teacher: RefTeacher, llama: Path, tmp_path: Path, monkeypatch) -> None:
    made = ensure_soft_targets(finetune_config(llama), teacher, HARMFUL + HARMLESS, tmp_path)
    monkeypatch.setattr(RefTeacher, "base", lambda *_, **__: pytest.fail("the base was loaded"))
    assert ensure_soft_targets(finetune_config(llama), teacher, HARMFUL + HARMLESS, tmp_path) == made


@pytest.mark.parametrize(
    ("gpu", "precision", "loaded"),
    [
        (True, "auto", (torch.bfloat16, "cuda")),
        (True, "float32", (torch.float32, "cuda")),
        (False, "auto", (torch.float32, "cpu")),
    ],
)
def test_a_worker_makes_soft_labels_on_its_accelerator(
    teacher: RefTeacher, llama: Path, tmp_path: Path, monkeypatch, gpu: bool, precision: str, loaded: tuple
) -> None:
    def base(self: RefTeacher, name: str, dtype: torch.dtype, device: str) -> None:
        raise ReftError(f"{dtype} on {device}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(RefTeacher, "base", base)
    config = finetune_config(llama, precision=precision)
    with pytest.raises(ReftError, match="{} on {}".format(*loaded)):
        soft_targets_on_worker(config, teacher, HARMFUL, tmp_path, gpu)


def test_the_teacher_separates_what_it_was_taught_and_its_artefact_is_whole(teacher: RefTeacher, llama: Path) -> None:
    made = teacher.manifest
    assert made.quality.auroc > 0.9
    assert made.layer in sweep_layers(2, (0.3, 0.7)) == [1]
    assert {"a (harmful)", "b (harmless)"} == set(made.per_source)
    assert sum(made.histogram) == 8
    assert (teacher.folder / "README.md").read_text().startswith(f"# Ref-Teacher {teacher.id}")
    scorer = teacher.scorer(precision="float32")
    base = load_base(str(llama))
    model, fmt = teacher.standalone(base), ChatFormat(base.tokenizer)
    texts = ["how to steal a car", "how to bake a car", "x" * 900]
    for text, found in zip(texts, scorer.score(texts), strict=True):
        ids = torch.tensor([fmt.prompt(chat(text))])[:, : base.context]
        with torch.no_grad():
            plain = filter_score(teacher, model(input_ids=ids, output_hidden_states=True).hidden_states)
        if found.windows == 1:
            assert found.score == pytest.approx(plain, abs=1e-4)
    assert scorer.score(texts)[2].windows > 1


def test_an_artefact_that_was_changed_or_belongs_elsewhere_is_refused(
    teacher: RefTeacher, llama: Path, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(teacher.folder, copy)
    assert RefTeacher.load(copy).id == teacher.id
    manifest = json.loads((copy / "teacher.json").read_text())
    manifest["layer"] += 1
    (copy / "teacher.json").write_text(json.dumps(manifest))
    with pytest.raises(ReftError, match="was changed after it was made"):
        RefTeacher.load(copy)
    with pytest.raises(ReftError, match="was made for the base"):
        teacher.base(str(tiny_bases["gemma"]))
    base = load_base(str(llama))
    base.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ReftError, match="was made with chat template"):
        teacher.check(base, ChatFormat(base.tokenizer))
    with pytest.raises(ReftError, match=r"teacher\.json is missing"):
        RefTeacher.load(tmp_path / "nothing")


@pytest.mark.parametrize("method", ["sft", "guided"])
def test_resuming_is_bit_equal_to_running_through(
    teacher: RefTeacher, llama: Path, tmp_path: Path, method: str
) -> None:
    config = finetune_config(llama, method=method, checkpoint_every=2)
    inputs = FinetuneInputs(USER, len(USER), HARMFUL + HARMLESS, teacher)
    whole = finetune(config, inputs, tmp_path / "whole", LOCAL, "whole")
    runs = tmp_path / ".runs"
    kept = sorted((runs / "whole").glob("checkpoint-*"))
    assert [c.name[-1] for c in kept] == ["2", "4", "6"]
    broken = runs / "broken"
    broken.mkdir()
    kept[0].rename(broken / kept[0].name)
    again = finetune(config, inputs, tmp_path / "again", LOCAL, "broken")
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name])
    state = json.loads((max(broken.glob("checkpoint-*")) / "state.json").read_text())
    assert state["state"]["rows_done"] == 2 * len(USER)


def test_a_small_run_labels_no_more_alignment_rows_than_it_draws(
    teacher: RefTeacher, llama: Path, tmp_path: Path
) -> None:
    alignment = (HARMFUL + HARMLESS) * 100
    inputs = FinetuneInputs(USER[:2], 2, alignment, teacher)
    finetune(finetune_config(llama, method="guided"), inputs, tmp_path / "student", LOCAL)
    (index,) = (tmp_path / ".runs" / "targets").glob("*/index.json")
    assert json.loads(index.read_text())["rows"] == LEAST_ALIGNMENT < len(alignment)


def test_alignment_rows_are_a_fixed_sample_in_order_that_grows_with_the_run() -> None:
    rows = range(2000)
    few, more = enough_alignment(rows, 10), enough_alignment(rows, 300)
    assert (len(few), len(more)) == (LEAST_ALIGNMENT, 512)
    assert list(few) == sorted(set(few)) == list(enough_alignment(rows, LEAST_ALIGNMENT))
    assert list(enough_alignment(few, 10)) == list(few)
    assert enough_alignment(rows, 1025) is rows


def test_a_checkpoint_of_another_configuration_is_refused(llama: Path, tmp_path: Path) -> None:
    inputs = FinetuneInputs(USER, len(USER))
    finetune(finetune_config(llama, method="sft"), inputs, tmp_path / "a", LOCAL, "run")
    with pytest.raises(ReftError, match="written with a different configuration"):
        finetune(finetune_config(llama, method="sft", seed=1), inputs, tmp_path / "a", LOCAL, "run")


def test_a_checkpoint_of_other_inputs_is_refused(teacher: RefTeacher, llama: Path, tmp_path: Path) -> None:
    config = finetune_config(llama, method="distill", labels="hard")
    inputs = FinetuneInputs(USER, len(USER), HARMFUL + HARMLESS, teacher)

    def run(inputs: FinetuneInputs) -> Path:
        return finetune(config, inputs, tmp_path / "out", LOCAL, "run")

    first = weights(run(inputs))
    foreign = RefTeacher(teacher.folder, teacher.manifest, teacher.readouts, "rt-another")
    for name, changes in {
        "dataset": {"rows": [*USER[:-1], USER[0]]},
        "Ref-Teacher": {"teacher": foreign},
        "alignment set": {"alignment": HARMLESS + HARMFUL},
    }.items():
        with pytest.raises(ReftError, match=rf"checkpoint-\d+ was written with a different {name}: choose"):
            run(replace(inputs, **changes))
    # A checkpoint without inputs can be resumed with any.
    state = max((tmp_path / ".runs" / "run").glob("checkpoint-*")) / "state.json"
    values = json.loads(state.read_text())
    del values["inputs"]
    state.write_text(json.dumps(values))
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(run(inputs)).items())


def test_a_teacher_trains_on_more_workers_than_a_step_has_rows(llama: Path) -> None:
    class Last(LocalRuntime):
        rank, world_size = 7, 8

        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            # Class moments [2, D + 1, D + 1] gain a row of each class from the other ranks.
            return tensor + torch.eye(tensor.shape[-1]) if tensor.ndim == 3 else tensor

    # Two prompts a step and none of them for this rank; it must still take part in their sums.
    reports: list[Mapping[str, Any]] = []
    config = teacher_config(llama, batch_rows=2, epochs=1, log_every=1)
    train_teacher(Last(progress=reports.append), config, TeacherData(HARMFUL + HARMLESS, UNANSWERED))
    assert [report["step"] for report in reports] == [1, 2, 3, 4]
    assert [report["total"] for report in reports[:3]] == [0, 0, 0]


def test_a_checkpoint_of_a_teacher_with_other_prompts_is_refused(llama: Path, tmp_path: Path) -> None:
    config = teacher_config(llama, epochs=1)
    prepare_teacher(config, TeacherData(HARMFUL + HARMLESS, UNANSWERED), tmp_path / "one", LOCAL, "run")
    with pytest.raises(ReftError, match="written with a different set of training prompts: choose a new run id"):
        prepare_teacher(
            config, TeacherData(HARMFUL + HARMLESS + UNANSWERED, UNANSWERED), tmp_path / "two", LOCAL, "run"
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "guided", "teacher_forward": "live"},
        {"method": "distill", "labels": "hard"},
        {"method": "guided", "weights": "full"},
        {"method": "filter", "init": "aligned", "lora": {"rank": 4}},
        {"method": "sft", "gradient_checkpointing": True},
    ],
)
def test_every_switch_trains(teacher: RefTeacher, llama: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    config = finetune_config(llama, **{"epochs": 4, "optimizer": {"learning_rate": 0.003}, **changes})
    seen: list[dict[str, float]] = []
    inputs = FinetuneInputs(USER, len(USER), HARMFUL + HARMLESS, teacher)
    config = config.model_copy(update={"log_every": 1})
    finetune(config, inputs, tmp_path / "out", LOCAL, progress=lambda m: seen.append(dict(m)))
    assert seen[-1]["progress"] == 1.0
    assert seen[-2]["task"] < seen[0]["task"]


def test_cached_labels_train_like_the_live_teacher(teacher: RefTeacher, llama: Path, tmp_path: Path) -> None:
    inputs = FinetuneInputs(USER, len(USER), HARMFUL + HARMLESS, teacher)
    out = {}
    for forward in ("cached", "live"):
        config = finetune_config(llama, method="guided", teacher_forward=forward, topk=10_000, lora={"rank": 4})
        out[forward] = weights(finetune(config, inputs, tmp_path / forward, LOCAL))
    for name, tensor in out["cached"].items():
        assert torch.allclose(tensor, out["live"][name], atol=2e-4)


def test_missing_inputs_are_reported_before_training(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ReftError, match="needs a Ref-Teacher"):
        finetune(finetune_config(llama, method="guided"), FinetuneInputs(USER, 10), tmp_path / "x", LOCAL)
    with pytest.raises(ReftError, match="no rows to train on"):
        finetune(finetune_config(llama, method="sft"), FinetuneInputs([], 0), tmp_path / "x", LOCAL)
    with pytest.raises(ReftError, match="hold no harmless row"):
        TeacherData(HARMFUL, HARMFUL + HARMLESS)
    with pytest.raises(UsageError, match="learning_rat: unknown key, did you mean learning_rate"):
        FinetuneConfig.of({"base": "b", "optimizer": {"learning_rat": 1}})
    with pytest.raises(UsageError, match="teacher_forward=cached"):
        FinetuneConfig.of({"base": "b", "weights": "full", "teacher_forward": "live"})


def test_a_directory_with_anything_else_is_refused_before_training_and_keeps_its_files(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "package.json").write_text("{}")
    # Neither base exists, so a run that started would fail on that.
    with pytest.raises(ReftError, match="mine exists and holds no adapter"):
        finetune(finetune_config(Path("/none"), method="sft"), FinetuneInputs(USER, len(USER)), mine, LOCAL)
    with pytest.raises(ReftError, match="mine exists and holds no Ref-Teacher"):
        prepare_teacher(teacher_config(Path("/none")), TeacherData(UNANSWERED, UNANSWERED), mine, LOCAL)
    with pytest.raises(ReftError, match="mine is the base model that is finetuned"):
        finetune(finetune_config(mine, method="sft", weights="full"), FinetuneInputs(USER, len(USER)), mine, LOCAL)
    assert [path.name for path in mine.iterdir()] == ["package.json"]


def test_what_came_into_a_directory_while_a_run_trained_is_not_lost(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def put(_metrics: Mapping[str, Any]) -> None:
        out.mkdir(exist_ok=True)
        (out / "package.json").write_text("{}")

    with pytest.raises(ReftError, match="out exists and holds no adapter"):
        finetune(finetune_config(llama, method="sft"), FinetuneInputs(USER, len(USER)), out, LOCAL, progress=put)
    assert (out / "package.json").is_file()


def test_relative_paths_are_made_absolute_because_workers_run_elsewhere(
    teacher: RefTeacher, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama.parent)
    assert finetune_config(Path(llama.name)).base == str(llama)
    assert FinetuneConfig.of({"base": "org/model-on-a-hub"}).base == "org/model-on-a-hub"
    monkeypatch.chdir(teacher.folder.parent)
    assert RefTeacher.load(teacher.folder.name).folder == teacher.folder


def test_rows_come_once_per_epoch_in_an_order_of_the_seed_alone() -> None:
    order = list(shuffled(range(100), 16, "a"))
    assert sorted(order) == list(range(100))
    assert order == list(shuffled(range(100), 16, "a"))
    assert order != list(shuffled(range(100), 16, "b"))
    batches = list(global_batches(order, 8, skip=24))
    assert [row for batch in batches for row in batch] == order[24:]
    assert sorted(row for rank in range(3) for row in rank_slice(order, rank, 3)) == list(range(100))


def test_a_cycle_continues_at_its_position(llama: Path) -> None:
    fmt = ChatFormat(load_base(str(llama)).tokenizer)
    rows = [fmt.encode(row, i) for i, row in enumerate(USER)]
    cycle = CyclingSampler(rows, "s")
    first = [row.index for row in cycle.take_rows(7)]
    rest = [row.index for row in cycle.take_rows(13)]
    assert sorted(first + rest[:3]) == sorted(rest[3:]) == list(range(10))
    resumed = CyclingSampler(rows, "s", SamplerState(position=7))
    assert [row.index for row in resumed.take_rows(13)] == rest
    assert sum(map(len, cycle.take_tokens(50))) >= 50


def test_a_cycle_gives_back_what_it_took_too_much(llama: Path) -> None:
    fmt = ChatFormat(load_base(str(llama)).tokenizer)
    rows = [fmt.encode(row, i) for i, row in enumerate(USER)]
    longest = max(map(len, rows))
    cycle, budget = CyclingSampler(rows, "s"), 1.3 * longest
    taken = [cycle.take_tokens(budget) for _ in range(20)]
    total = sum(len(row) for call in taken for row in call)
    assert 20 * budget <= total < 20 * budget + longest
    half = CyclingSampler(rows, "s")
    for _ in range(10):
        half.take_tokens(budget)
    resumed = CyclingSampler(rows, "s", half.state)
    assert [resumed.take_tokens(budget) for _ in range(10)] == taken[10:]


def test_a_local_runtime_keeps_only_whole_checkpoints(tmp_path: Path) -> None:
    runtime = LocalRuntime(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("power cut")

    runtime.report({"step": 1}, lambda folder: (folder / "state.json").write_text("{}") and None)
    with pytest.raises(RuntimeError, match="power cut"):
        runtime.report({"step": 2}, fail)
    assert runtime.latest_checkpoint() == tmp_path / "checkpoint-00000001"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001"]


def test_the_teachers_gradient_reaches_only_its_adapter(teacher: RefTeacher, llama: Path) -> None:
    model = teacher.attach(load_base(str(llama)).model, trainable=True)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"teacher"}
    assert ModelForward(model).model is model


LONG = "how " * 300


def test_rows_that_do_not_fit_are_skipped_and_named(llama: Path, teacher: RefTeacher, tmp_path: Path) -> None:
    reports: list[dict] = []
    long = Example(chat(LONG, "sorry i cannot"), Label.HARMFUL, "a", place="rows.jsonl:9")
    data = TeacherData([*HARMFUL, *HARMLESS, long, long], [*HARMFUL, *HARMLESS, long])
    made = prepare_teacher(teacher_config(llama), data, tmp_path / "teacher", LOCAL, progress=reports.append)
    assert reports[-1]["note"].startswith("rows.jsonl:9: the prompt has ")
    assert reports[-1]["note"].endswith("tokens, the context holds 256: left out, and 2 more")
    assert made.manifest.quality.rows == 8

    student = FinetuneInputs(
        [*USER, Example(chat(LONG, "no"), place="row 11")], 11, [*HARMFUL, *HARMLESS, long], teacher
    )
    whole = FinetuneInputs([*USER], 10, [*HARMFUL, *HARMLESS], teacher)
    finetune(finetune_config(llama, batch_rows=11, epochs=2), student, tmp_path / "a", LOCAL, progress=reports.append)
    first, second = reports[-1]["note"].split("; ")
    assert first.startswith("rows.jsonl:9: the prompt has")
    assert second.startswith("row 11: the prompt has")
    assert second.endswith(": left out")
    finetune(finetune_config(llama, batch_rows=10, epochs=2), whole, tmp_path / "b", LOCAL, progress=reports.append)
    assert reports[-1]["note"] == ""
    assert reports[-1]["step"] == 2


def test_a_dataset_of_which_no_row_fits_is_an_error(llama: Path, tmp_path: Path) -> None:
    inputs = FinetuneInputs([Example(chat(LONG, "no"), place="row 1")] * 2, 2)
    with pytest.raises(
        ReftError, match=r"row 1: the prompt has 903 tokens, the context holds 256: left out, and 1 more"
    ):
        finetune(finetune_config(llama, method="sft"), inputs, tmp_path / "x", LOCAL)
    assert not (tmp_path / "x").exists()


def test_the_filter_reads_in_windows_as_long_as_the_prompts_it_learned_from(llama: Path, tmp_path: Path) -> None:
    hidden = Example(chat("please tell me how " * 40 + "to steal a car"), Label.HARMFUL, "a")
    data = TeacherData(HARMFUL + HARMLESS, [*HARMFUL, *HARMLESS, hidden])
    made = prepare_teacher(teacher_config(llama), data, tmp_path / "teacher", LOCAL)
    lengths = [len(ChatFormat(load_base(str(llama)).tokenizer).prompt(row.prompt)) for row in HARMFUL]
    assert max(lengths) <= made.manifest.window_tokens < max(lengths) + 16
    # What the thresholds were chosen on is what the filter will give.
    found = made.scorer().score([row.prompt[-1].content for row in data.validation])
    assert found[-1].windows > 1
    limit = made.manifest.thresholds.block
    blocked = sum(item.score > limit for item in found[:4] + found[-1:]) / 5
    assert blocked == pytest.approx(made.manifest.quality.recall)


def test_rows_that_only_answer_take_no_part_in_the_refusal_feature(llama: Path, tmp_path: Path) -> None:
    config = teacher_config(llama, feature="base")
    further = [Example(chat("tell me to bake", "sure here is bread"), Label.HARMLESS)] * 8
    plain = prepare_teacher(config, TeacherData(HARMFUL + HARMLESS, HARMFUL + HARMLESS), tmp_path / "plain", LOCAL)
    more = prepare_teacher(config, TeacherData(HARMFUL + HARMLESS, HARMFUL + HARMLESS, further), tmp_path / "m", LOCAL)
    assert all(map(torch.equal, plain.readouts.tensors().values(), more.readouts.tensors().values()))
    assert more.manifest.config["steps"] > plain.manifest.config["steps"]
    first, second = weights(plain.folder / "adapter"), weights(more.folder / "adapter")
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_a_teacher_may_keep_the_features_of_its_base(llama: Path, tmp_path: Path) -> None:
    data = TeacherData(HARMFUL + HARMLESS + UNANSWERED, HARMFUL + HARMLESS)
    made = prepare_teacher(teacher_config(llama, feature="base"), data, tmp_path / "teacher", LOCAL)
    # The teacher answers with an adapter on every layer; the filter reads the base without it.
    assert all(tensor.any() for tensor in weights(made.folder / "adapter").values())
    base = load_base(str(llama))
    texts = [row.prompt[-1].content for row in data.validation]
    ids = [torch.tensor([ChatFormat(base.tokenizer).prompt(chat(text))]) for text in texts]
    with torch.no_grad():
        found = [base.model(input_ids=row, output_hidden_states=True).hidden_states for row in ids]
    expected = [filter_score(made, hidden) for hidden in found]
    assert [item.score for item in made.scorer(precision="float32").score(texts)] == pytest.approx(expected, abs=1e-5)

    prompts = TeacherData(UNANSWERED, UNANSWERED)
    with pytest.raises(ReftError, match="feature=base learns from answers alone"):
        prepare_teacher(teacher_config(llama, feature="base"), prompts, tmp_path / "none", LOCAL)
    with pytest.raises(UsageError, match="it needs weights=lora"):
        teacher_config(llama, feature="base", weights="full")


def test_the_filter_may_read_a_share_of_the_adapter(llama: Path, tmp_path: Path) -> None:
    data = TeacherData(HARMFUL + HARMLESS + UNANSWERED, HARMFUL + HARMLESS)
    made = prepare_teacher(teacher_config(llama, feature_mix=0.25), data, tmp_path / "teacher", LOCAL)
    whole = prepare_teacher(teacher_config(llama), data, tmp_path / "whole", LOCAL)
    # What is trained is the same; the teacher answers with all of it.
    adapter, other = weights(made.folder / "adapter"), weights(whole.folder / "adapter")
    assert all(torch.equal(adapter[name], other[name]) for name in adapter)
    texts = [row.prompt[-1].content for row in data.validation]
    ids = [torch.tensor([ChatFormat(load_base(str(llama)).tokenizer).prompt(chat(text))]) for text in texts]

    scale = teacher_config(llama).lora.scale

    def hidden_states(share: float) -> list[tuple[torch.Tensor, ...]]:
        base = load_base(str(llama))
        weight = dict(base.model.named_parameters())
        for name in {key.rsplit(".lora_", 1)[0] for key in adapter}:
            up, down = (adapter[f"{name}.lora_{part}.weight"] for part in "BA")
            weight[f"{name.removeprefix('base_model.model.')}.weight"].data += share * scale * up @ down
        with torch.no_grad():
            return [base.model(input_ids=row, output_hidden_states=True).hidden_states for row in ids]

    expected = [filter_score(made, hidden) for hidden in hidden_states(0.25)]
    assert [item.score for item in made.scorer(precision="float32").score(texts)] == pytest.approx(expected, abs=1e-5)
    limit = made.manifest.thresholds.block
    harmful = expected[: len(HARMFUL)]
    assert sum(score > limit for score in harmful) / len(harmful) == pytest.approx(made.manifest.quality.recall)
    assert expected != pytest.approx([filter_score(made, hidden) for hidden in hidden_states(1.0)], abs=1e-3)
    for wrong in ({"feature": "base"}, {"weights": "full"}):
        with pytest.raises(UsageError, match="feature_mix scales the adapter"):
            teacher_config(llama, feature_mix=0.5, **wrong)


@pytest.mark.parametrize(
    ("ranking", "read"),
    [
        ({1.0: 0.95}, 1.0),
        ({1.0: 0.90, 0.5: 0.95}, 0.5),
        ({1.0: 0.90, 0.5: 0.90}, 0.0),
    ],
)
def test_the_filter_reads_as_much_as_ranks_other_sources_no_worse(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranking: dict[float, float], read: float
) -> None:
    measured: list[float] = []

    def quick_auroc(_selection: FilterSelection, _prompts: int, mix: float = 1.0) -> float:
        measured.append(mix)
        return {0.0: 0.95, **ranking}[mix]

    monkeypatch.setattr(FilterSelection, "quick_auroc", quick_auroc)
    data = TeacherData(HARMFUL + HARMLESS, HARMFUL + HARMLESS)
    made = prepare_teacher(teacher_config(llama), data, tmp_path / "teacher", LOCAL)
    assert made.manifest.feature_mix == read
    # Shares below the chosen one are not measured, except the base, once.
    assert set(measured) == {0.0, *ranking}
    scorer = made.scorer(precision="float32")
    found = [item.score for item in scorer.score([row.prompt[-1].content for row in HARMFUL])]
    blocked = sum(score > made.manifest.thresholds.block for score in found) / len(found)
    assert blocked == pytest.approx(made.manifest.quality.recall)


def test_a_stopped_run_resumes_at_the_exact_row(llama: Path, tmp_path: Path) -> None:
    config = finetune_config(llama, method="sft", log_every=1)
    inputs = FinetuneInputs(USER, len(USER))
    whole = weights(finetune(config, inputs, tmp_path / "whole", LOCAL, "whole"))
    seen: list[int] = []

    def run() -> Path:
        return finetune(
            config,
            inputs,
            tmp_path / "stopped",
            LOCAL,
            "stopped",
            lambda metrics: seen.append(metrics["rows"]),
            # Called before the step is reported: True after the second step, and not again after the restart.
            stop=lambda: len(seen) == 1,
        )

    with pytest.raises(StoppedError, match="its state is saved"):
        run()
    assert seen == [4, 8]
    assert not (tmp_path / "stopped").exists()
    resumed = weights(run())
    assert seen == [4, 8, 10, 14, 18, 20]
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    saved = tmp_path / ".runs" / "stopped" / "checkpoint-00000002" / "adapter"
    assert (saved / "adapter_config.json").is_file()
    assert weights(saved).keys() == whole.keys()


def test_a_small_file_gets_its_steps_from_alignment_rows(teacher: RefTeacher, llama: Path, tmp_path: Path) -> None:
    """Ten rows twice over are six steps; the four before them distil alone, and a stop among them loses nothing."""
    config = finetune_config(llama, min_steps=10, checkpoint_every=100, log_every=1)
    data = FinetuneInputs(USER, len(USER), HARMFUL + HARMLESS, teacher)
    reports: list[Mapping[str, Any]] = []
    whole = finetune(config, data, tmp_path / "whole", LOCAL, progress=reports.append)
    assert [report["step"] for report in reports] == list(range(1, 11))
    assert [report["rows"] for report in reports] == [0, 0, 0, 0, 4, 8, 10, 14, 18, 20]
    assert [report["progress"] for report in reports[:5]] == pytest.approx([4 / 36, 8 / 36, 12 / 36, 16 / 36, 20 / 36])
    assert ["task" in report for report in reports[:6]] == [False] * 4 + [True] * 2
    assert all(report["distill"] > 0 for report in reports)

    asked = iter([False, True])
    stopping = Resources(workers=0, storage=str(tmp_path / "storage"))
    with pytest.raises(StoppedError):
        finetune(config, data, tmp_path / "half", stopping, run_id="r", stop=lambda: next(asked, True))
    resumed = finetune(config, data, tmp_path / "half", stopping, run_id="r", stop=lambda: False)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_reports_that_were_lost_are_repeated_after_a_restart(llama: Path, tmp_path: Path) -> None:
    config = finetune_config(llama, method="sft", log_every=1, checkpoint_every=2)
    inputs = FinetuneInputs(USER, len(USER))
    received: list[Mapping[str, Any]] = []

    def die_at_the_second(metrics: Mapping[str, Any]) -> None:
        # The checkpoint of the second step is complete by now.
        if metrics["step"] == 2:
            raise RuntimeError("the listener died")
        received.append(metrics)

    with pytest.raises(RuntimeError, match="died"):
        finetune(config, inputs, tmp_path / "out", LOCAL, "run", die_at_the_second)
    before = len(received)
    finetune(config, inputs, tmp_path / "out", LOCAL, "run", received.append)
    first = received[before]
    assert [report["step"] for report in first["earlier"]] == [1, 2]
    assert first["earlier"][0] == received[0]
    assert {report["step"] for report in received} | {2} == set(range(1, received[-1]["step"] + 1))
    assert not any("earlier" in report for report in received[before + 1 :])


def test_validation_rows_are_measured_at_checkpoints_and_change_nothing(llama: Path, tmp_path: Path) -> None:
    config = finetune_config(
        llama, method="sft", epochs=8, log_every=1, checkpoint_every=6, optimizer={"learning_rate": 0.01}
    )
    rows = [Example(chat(f"tell me {word}", "sure here is")) for word in ("how", "that", "bread")]
    received: list[Mapping[str, Any]] = []
    inputs = FinetuneInputs(USER, len(USER), validation=rows)
    student = finetune(config, inputs, tmp_path / "measured", LOCAL, progress=received.append)
    assert [report["step"] for report in received if "valid_loss" in report] == [6, 12, 18, 24]
    assert all(0 <= report["accuracy"] <= 1 for report in received)
    first, last = received[0], received[-1]
    assert last["accuracy"] > first["accuracy"]
    assert last["valid_loss"] < first["task"]
    assert last["valid_accuracy"] > first["accuracy"]
    # Dropout is on again after each of them: the student is that of a run without.
    unmeasured = finetune(config, FinetuneInputs(USER, len(USER)), tmp_path / "unmeasured", LOCAL)
    for name, tensor in weights(unmeasured).items():
        assert torch.equal(tensor, weights(student)[name])
    base = load_base(str(llama))
    fmt = ChatFormat(base.tokenizer)
    model = merge(attach_saved(base.model, "student", student))
    found = held_out(ModelForward(model), [collate([fmt.encode(row)], fmt.pad_id) for row in rows])
    assert last["valid_loss"] == pytest.approx(found.loss, rel=1e-4)
    assert last["valid_accuracy"] == pytest.approx(found.accuracy)


def test_the_answers_that_an_offset_rests_on_are_drawn_from_all_rows():
    rows = [Example(chat("hi", f"refused {i}")) for i in range(50)] + [
        Example(chat("hi", f"helped {i}")) for i in range(50)
    ]
    drawn = sample_answers([Example(chat("no answer")), *rows], 20, seed=0)
    assert len(set(drawn)) == 20
    assert {text.split()[0] for text in drawn} == {"refused", "helped"}
    assert drawn == sample_answers(rows, 20, seed=0)
    assert len(sample_answers(rows, 500, seed=0)) == 100


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    steps: list[int] = []

    def diverge(parameters: Any, max_norm: float) -> torch.Tensor:
        steps.append(len(steps) + 1)
        return torch.tensor(float("nan") if steps[-1] == 2 else 1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", diverge)

    def run() -> None:
        if stage == "teacher":
            data = TeacherData(HARMFUL + HARMLESS, HARMFUL + HARMLESS)
            prepare_teacher(teacher_config(llama), data, tmp_path / "out", LOCAL)
        else:
            finetune(finetune_config(llama, method="sft"), FinetuneInputs(USER, len(USER)), tmp_path / "out", LOCAL)

    with pytest.raises(ReftError, match=r"^step 2: gradient_norm is nan: start a new run with a lower optimizer\."):
        run()
    assert steps == [1, 2]
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_keeps_its_micro_batch_and_its_threads(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finetune_config(llama, method="sft", checkpoint_every=2)
    inputs = FinetuneInputs(USER, len(USER))
    sized: list[int] = []

    def run(tokens: int, threads: int, stop: Callable[[], bool] | None) -> Path:
        monkeypatch.setattr("reft_ray.finetuning.model.tokens_that_fit", lambda *_: tokens)
        monkeypatch.setattr(
            "reft_ray.finetuning.student_loop.keep_faster_threads", lambda _run, earlier: earlier or threads
        )
        return finetune(config, inputs, tmp_path / "out", LOCAL, "run", stop=stop)

    def split(rows: Sequence[Any], tokens: int, *rest: Any) -> list[Any]:
        sized.append(tokens)
        return micro_batches(rows, tokens, *rest)

    monkeypatch.setattr("reft_ray.finetuning.student_loop.micro_batches", split)
    with pytest.raises(StoppedError):
        run(128, 3, lambda: True)
    run(512, 1, lambda: False)
    assert set(sized) == {128}
    state = json.loads((max((tmp_path / ".runs" / "run").glob("checkpoint-*")) / "state.json").read_text())["state"]
    assert (state["micro_batch_tokens"], state["threads"]) == (128, 3)


def test_rows_longer_than_a_micro_batch_are_computed_again_and_learned_alike(llama: Path, tmp_path: Path) -> None:
    rows = [*USER[:3], Example(chat("tell me " * 30, "sure here is"))]
    ran: list[bool] = []

    def train(name: str, **changes: object) -> dict[str, torch.Tensor]:
        config = finetune_config(llama, method="sft", lora={"rank": 4}, micro_batch_tokens=40, **changes)
        return weights(finetune(config, FinetuneInputs(rows, len(rows)), tmp_path / name, LOCAL))

    plain = train("plain", gradient_checkpointing=False)
    with pytest.MonkeyPatch.context() as patch:
        original = torch.utils.checkpoint.checkpoint

        def checkpoint(*args: Any, **options: Any) -> Any:
            ran.append(True)
            return original(*args, **options)

        patch.setattr("transformers.modeling_utils.checkpoint", checkpoint)
        found = train("default")
    # Every layer once for the long row, in each of two epochs.
    assert len(ran) == 2 * load_base(str(llama)).layers
    assert all(torch.equal(plain[name], tensor) for name, tensor in found.items())


def test_a_run_reports_its_phases(teacher: RefTeacher, llama: Path, tmp_path: Path) -> None:
    phases: list[tuple[str, float, str]] = []
    inputs = FinetuneInputs(USER, len(USER), HARMFUL + HARMLESS, teacher)
    config = finetune_config(llama, method="guided")
    finetune(config, inputs, tmp_path / "out", LOCAL, phase=lambda *phase: phases.append(phase))
    assert list(dict.fromkeys(name for name, _, _ in phases)) == ["soft labels", "loading", "training", "export"]
    assert [share for name, share, _ in phases if name == "soft labels"] == [0.0, 1.0]
    steps = [(share, note.split(",")[0]) for name, share, note in phases if name == "training"]
    assert steps == [
        (0.0, ""),
        (0.2, "step 1 of 6"),
        (0.4, "step 2 of 6"),
        (0.5, "step 3 of 6"),
        (0.7, "step 4 of 6"),
        (0.9, "step 5 of 6"),
    ]
