from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from reft_ray.core.errors import ReftError
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import (
    LoraSettings,
    activate,
    attach,
    attach_saved,
    merge,
    read_adapter,
    save_adapter,
    using_adapter,
)

IDS = torch.tensor([[1, 8, 9, 10]])


def randomize(model: PeftModel, name: str, seed: int) -> None:
    """Give a new adapter (whose B is zero) an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}." in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_two_adapters_share_one_base_and_switching_is_undone(llama: Path) -> None:
    base = load_base(str(llama))
    plain = logits(base.model)
    parameters = sum(p.numel() for p in base.model.parameters())
    model = attach(base.model, "teacher", LoraSettings(rank=4))
    randomize(model, "teacher", 1)
    teacher = logits(model)
    model = attach(model, "student", LoraSettings(rank=4), seed=3)
    assert torch.equal(logits(model), plain)  # a new adapter has no effect
    randomize(model, "student", 2)
    student = logits(model)
    model.train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".student." in name for name in trainable)
    with using_adapter(model, "teacher"):
        assert torch.equal(logits(model), teacher)
        assert not model.training
    assert model.training
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(logits(model.eval()), student)
    assert len({t.sum().item() for t in (plain, teacher, student)}) == 3
    held = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    assert held == parameters


def test_a_saved_adapter_loads_with_plain_peft_and_merges_to_the_same_logits(llama: Path, tmp_path: Path) -> None:
    model = attach(load_base(str(llama)).model, "student", LoraSettings(rank=4))
    randomize(model, "student", 5)
    expected = logits(model)
    save_adapter(model, "student", tmp_path / "a", str(llama))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "a").eval()
    assert torch.equal(logits(plain), expected)
    again = attach_saved(load_base(str(llama)).model, "other", tmp_path / "a")
    assert torch.equal(logits(again), expected)
    assert torch.allclose(logits(merge(again)), expected, atol=1e-5)
    named = {name: p.detach() for name, p in activate(model, "student", True).named_parameters() if p.requires_grad}
    save_adapter(model, "student", tmp_path / "b", str(llama), named)
    assert read_adapter(tmp_path / "a").keys() == read_adapter(tmp_path / "b").keys()


def test_the_seed_decides_the_adapter_and_the_global_generator_is_unchanged(llama: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first = attach(load_base(str(llama)).model, "student", LoraSettings(), seed=4)
    assert torch.equal(torch.rand(1), expected)
    second = attach(load_base(str(llama)).model, "student", LoraSettings(), seed=4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_folder_without_safetensors_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ReftError, match=r"adapter_model\.safetensors is missing"):
        attach_saved(load_base(str(llama)).model, "x", tmp_path)
