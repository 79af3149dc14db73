"""Preference pairs, early stopping and the best checkpoint in whole runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reft_ray.core.conversation import Conversation, Example, Message, chat
from reft_ray.core.errors import ReftError
from reft_ray.finetuning.best import BestState, BestWeights
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.encoding import SkippedRows, encode, pair_of, pairs_of
from reft_ray.finetuning.trainer import FinetuneInputs, finetune
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_base, load_tokenizer
from reft_ray.hf.lora import attach_saved, merge
from reft_ray.rows.text import with_rejected

LOCAL = Resources(workers=0)


def pair(prompt: str, chosen: str, rejected: str, place: str = "") -> Example:
    return Example(with_rejected(chat(prompt, chosen), chat(prompt, rejected)), place=place)


PAIRS = [pair(f"how can i {'how ' * n}", "please sure", "no sorry") for n in range(4)]


def config_of(base: Path, **changes: object) -> FinetuneConfig:
    values = {"base": str(base), "method": "sft", "epochs": 3, "batch_rows": 4, "lora": {"rank": 4}, "log_every": 1}
    return FinetuneConfig.of({**values, "optimizer": {"learning_rate": 5e-3}, **changes})


def log_p(model: torch.nn.Module, fmt: ChatFormat, turns: Conversation) -> float:
    row = fmt.encode(Example(turns))
    with torch.no_grad():
        logits_TV = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    return sum(float(logits_TV[t - 1, row.ids[t]]) for t in range(1, len(row)) if row.loss_mask[t])


def test_pairs_learn_only_where_they_differ(llama: Path) -> None:
    shared = (*chat("hi", "yes"), Message("user", "and"))
    row = Example(with_rejected((*shared, Message("assistant", "a")), (*shared, Message("assistant", "b"))))
    chosen, rejected = pair_of(row)
    assert [turn.trained for turn in chosen.messages] == [False, False, False, True]
    assert (chosen.response, rejected.response) == ("a", "b")
    fmt, skipped = ChatFormat(load_tokenizer(str(llama))), SkippedRows()
    plain = Example(chat("hi", "yes"), place="row 2")
    encoded = encode(pairs_of(fmt, None), [plain, row, pair("x", "same", "same", "row 3")], skipped)
    assert [(side.index, side.trained_tokens > 0) for side in encoded] == [(0, True), (1, True)]
    assert skipped.note == "row 2: the row is not a preference pair: it has no rejected answer: left out, and 1 more"


def test_dpo_prefers_the_chosen_answers(llama: Path, tmp_path: Path) -> None:
    reports = []
    config = config_of(llama, loss="dpo", preference={"beta": 0.5, "sft_weight": 0.0})
    out = finetune(config, FinetuneInputs(PAIRS, len(PAIRS)), tmp_path / "out", LOCAL, progress=reports.append)
    assert reports[0]["task"] == pytest.approx(0.6931, abs=1e-3)  # the start prefers neither
    assert reports[-1]["task"] < reports[0]["task"]
    base = load_base(str(llama))
    fmt = ChatFormat(base.tokenizer)
    answers = [chat("how can i ", "please sure"), chat("how can i ", "no sorry")]
    before = [log_p(base.model, fmt, turns) for turns in answers]
    student = merge(attach_saved(base.model, "student", out))
    after = [log_p(student, fmt, turns) for turns in answers]
    assert after[0] - before[0] > after[1] - before[1]


def test_dpo_compares_with_the_adapter_that_it_starts_from(llama: Path, tmp_path: Path) -> None:
    sft = finetune(config_of(llama), FinetuneInputs(PAIRS, 4), tmp_path / "sft", LOCAL)
    reports = []
    config = config_of(llama, loss="dpo", init_adapter=str(sft), epochs=1, preference={"sft_weight": 0.0})
    out = finetune(config, FinetuneInputs(PAIRS, 4), tmp_path / "dpo", LOCAL, progress=reports.append)
    assert reports[0]["task"] == pytest.approx(0.6931, abs=1e-3)
    assert load_file(out / "adapter_model.safetensors").keys() == load_file(sft / "adapter_model.safetensors").keys()


def test_full_weights_have_no_start_to_compare_with(llama: Path) -> None:
    with pytest.raises(ReftError, match="needs weights=lora"):
        config_of(llama, loss="dpo", weights="full")


def test_the_best_checkpoint_is_exported_and_a_run_stops_when_it_gets_worse(llama: Path, tmp_path: Path) -> None:
    rows = [Example(chat("how can i", "sure")), Example(chat("please", "sure"))]
    other = [Example(chat("how can i", "no sorry"))]
    reports = []
    config = config_of(llama, epochs=20, batch_rows=2, checkpoint_every=1, select="best", patience=3)
    inputs = FinetuneInputs(rows, 2, validation=other)
    out = finetune(config, inputs, tmp_path / "out", LOCAL, "run", progress=reports.append)
    losses = [report["valid_loss"] for report in reports]
    best = losses.index(min(losses[:-1]))
    assert len(losses) < 20
    assert len(losses) - 1 - best == 4  # three worse ones, and the report of the end
    saved = tmp_path / f".runs/run/checkpoint-{best + 1:08d}/adapter/adapter_model.safetensors"
    exported = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in load_file(saved).items())


def test_comparing_checkpoints_needs_validation_rows(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ReftError, match="validation rows: there are none"):
        finetune(config_of(llama, patience=1), FinetuneInputs(PAIRS, 4), tmp_path / "out", LOCAL)


def test_a_loss_that_is_not_a_number_is_never_the_best() -> None:
    best = BestWeights(FinetuneConfig(base="x", select="best", patience=2), BestState())
    for step, loss in enumerate((float("nan"), 1.0, float("nan"))):
        best.update(loss, step, {"w": torch.tensor([step])})
    assert (best.state.step, int(best.weights["w"])) == (1, 1)
    assert not best.exhausted
    best.update(1.0, 3, {})
    assert best.exhausted


def test_the_adapter_has_its_tokenizer_and_template(llama: Path, tmp_path: Path) -> None:
    out = finetune(config_of(llama, epochs=1), FinetuneInputs(PAIRS, 4), tmp_path / "out", LOCAL)
    tokenizer = load_tokenizer(str(out))
    assert ChatFormat(tokenizer).template == ChatFormat(load_tokenizer(str(llama))).template
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(llama)
    assert replace(PAIRS[0]).rejected
