"""Other defences in the training loop: their rows, exact resumption, and settings that conflict."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.runtime import LocalRuntime
from reft_ray.finetuning.student_loop import train_student
from reft_ray.finetuning.trainer import FinetuneInputs, finetune

USER = [Example(chat(f"tell me {'no ' * i}", "sure here is")) for i in range(10)]
HARMFUL = [Example(chat(f"how to steal a {w}", "sorry i cannot"), Label.HARMFUL) for w in ("car", "bread", "me")]
LOCAL = Resources(workers=0)
HARD = {"method": "distill", "labels": "hard"}
STEPS = {
    "lisa": {**HARD, "step": "lisa", "baselines": {"lisa_alignment_steps": 1, "lisa_user_steps": 2}},
    "vaccine": {"method": "sft", "step": "vaccine"},
    "booster": {**HARD, "step": "booster"},
    "ldifs": {"method": "sft", "step": "ldifs"},
}


def config(base: Path, **changes: object) -> FinetuneConfig:
    values = {"base": str(base), "epochs": 2, "batch_rows": 4, "lora": {"rank": 4}, "checkpoint_every": 2}
    return FinetuneConfig.of({**values, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("step", STEPS)
def test_resuming_is_bit_equal_to_running_through(llama: Path, tmp_path: Path, step: str) -> None:
    settings = config(llama, **STEPS[step])
    inputs = FinetuneInputs(USER, len(USER), HARMFUL)
    whole = finetune(settings, inputs, tmp_path / "whole", LOCAL, "whole")
    runs = tmp_path / ".runs"
    first = min((runs / "whole").glob("checkpoint-*"))
    (runs / "broken").mkdir()
    first.rename(runs / "broken" / first.name)
    again = finetune(settings, inputs, tmp_path / "again", LOCAL, "broken")
    plain = finetune(config(llama, method="sft"), inputs, tmp_path / "plain", LOCAL, "plain")
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name
    assert any(not torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(whole).items())


def test_a_run_may_start_from_an_adapter_of_the_same_shape(llama: Path, tmp_path: Path) -> None:
    inputs = FinetuneInputs(USER, len(USER))
    first = finetune(config(llama, method="sft"), inputs, tmp_path / "first", LOCAL)
    still = {"learning_rate": 1e-12, "weight_decay": 0}
    second = finetune(
        config(llama, method="sft", init_adapter=str(first), optimizer=still), inputs, tmp_path / "second", LOCAL
    )
    for name, tensor in weights(first).items():
        torch.testing.assert_close(tensor, weights(second)[name], atol=1e-6, rtol=0)
    with pytest.raises(ReftError, match="does not fit this adapter's rank and layers"):
        finetune(
            config(llama, method="sft", init_adapter=str(first), lora={"rank": 2}), inputs, tmp_path / "odd", LOCAL
        )
    with pytest.raises(ReftError, match=r"set lora.scale=2 to start from it"):
        finetune(
            config(llama, method="sft", init_adapter=str(first), lora={"rank": 4, "scale": 1.0}),
            inputs,
            tmp_path / "half",
            LOCAL,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "lisa", "method": "sft"}, "step=lisa reads alignment rows by hard labels"),
        ({"step": "booster", "method": "distill"}, "step=booster reads alignment rows by hard labels"),
        ({"init_adapter": "a", "init": "aligned"}, "init_adapter is a start by itself"),
    ],
)
def test_conflicting_settings_are_refused(llama: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(llama, **changes)


def test_other_steps_are_not_sharded(llama: Path) -> None:
    with pytest.raises(ReftError, match="step=ldifs keeps whole weights: use strategy=data_parallel"):
        train_student(LocalRuntime(), config(llama, method="sft", step="ldifs"), USER, sharded=True)
