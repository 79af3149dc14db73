from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from reft_ray.core.errors import ReftError
from reft_ray.hf.forward import decoder_layers
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import (
    LoraSettings,
    activate,
    adapter_scale,
    attach,
    attach_saved,
    fitted,
    merge,
    read_adapter,
    save_adapter,
    saved_scale,
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


def test_a_vision_tower_is_neither_adapted_nor_taken_for_the_decoder() -> None:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3Config(
        text_config={**text, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 64, "sliding_window": 8},
        vision_config={**text, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    bare = Gemma3ForConditionalGeneration(config)
    layers = decoder_layers(bare)
    assert layers[0] is bare.get_decoder().layers[0]
    model = attach(bare, "teacher", LoraSettings(rank=2))
    model = attach(model, "student", LoraSettings(rank=2))
    for name in ("teacher", "student"):
        adapted = [key for key in dict(model.named_parameters()) if f".lora_A.{name}." in key]
        assert len(adapted) == 2 * 7
        assert all(".language_model." in key for key in adapted)


def test_rslora_scales_by_the_root_of_the_rank(llama: Path, tmp_path: Path) -> None:
    model = attach(load_base(str(llama)).model, "student", LoraSettings(rank=16, scale=2.0, rslora=True))
    assert adapter_scale(model, "student") == 8.0
    scalings = {module.scaling["student"] for module in model.modules() if isinstance(module, LoraLayer)}
    assert scalings == {8.0}
    save_adapter(model, "student", tmp_path / "a", "base")
    assert saved_scale(tmp_path / "a") == 8.0


def test_a_merge_into_narrow_weights_is_rounded_once(llama: Path) -> None:
    model = attach(load_base(str(llama)).model.to(torch.bfloat16), "student", LoraSettings(rank=2))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        for part in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(part["student"].weight, std=0.05)
        delta = layer.scaling["student"] * layer.lora_B["student"].weight @ layer.lora_A["student"].weight
        expected = (layer.base_layer.weight.float() + delta.float()).to(torch.bfloat16)
    merged = merge(model)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, expected)


@pytest.mark.parametrize(
    ("changes", "layers", "modules"),
    [
        ({}, {0, 1, 2, 3}, 7),
        ({"first_layer": 3}, {2, 3}, 7),
        ({"targets": "attention"}, {0, 1, 2, 3}, 4),
        ({"targets": "mlp", "first_layer": 4}, {3}, 3),
    ],
)
def test_adapters_are_on_the_chosen_layers_alone(
    llama: Path, tmp_path: Path, changes: dict[str, Any], layers: set[int], modules: int
) -> None:
    model = attach(load_base(str(llama)).model, "student", LoraSettings(rank=4, **changes))
    adapted = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in adapted} == layers
    assert len(adapted) == modules * len(layers)
    randomize(model, "student", 2)
    save_adapter(model, "student", tmp_path / "adapter", "base")
    again = attach_saved(load_base(str(llama)).model, "student", tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_experts_and_their_router_have_no_adapters(tiny_bases: dict[str, Path]) -> None:
    for shape in ("mixture", "sinks"):
        for targets in ("all-linear", "attention"):
            model = attach(load_base(str(tiny_bases[shape])).model, "student", LoraSettings(rank=2, targets=targets))
            adapted = {
                name.split(".lora_")[0].rsplit(".", 2)[1] for name, p in model.named_parameters() if p.requires_grad
            }
            assert adapted == {"self_attn"}
    with pytest.raises(ReftError, match=r"no linear layer for lora\.targets=mlp"):
        attach(load_base(str(tiny_bases["mixture"])).model, "student", LoraSettings(targets="mlp"))


def test_no_layer_for_an_adapter_is_an_error(llama: Path) -> None:
    with pytest.raises(ReftError, match=r"lora\.first_layer=9"):
        attach(load_base(str(llama)).model, "student", LoraSettings(first_layer=9))


@pytest.mark.parametrize("rank", [2, 3, 7])
def test_an_update_fits_an_adapter_of_any_rank(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, own_a = (torch.randn(size, generator=generator) for size in ((3, 8), (6, 3), (rank, 8)))
    saved = {"l.lora_A.weight": a, "l.lora_B.weight": b, "x.lora_A.weight": a, "x.lora_B.weight": b}
    like = {"l.lora_A.weight": own_a, "l.lora_B.weight": torch.zeros(6, rank), "y.lora_A.weight": own_a}
    found = fitted(saved, like, 0.5)
    assert found.keys() == like.keys()
    assert torch.equal(found["y.lora_A.weight"], own_a)
    product = found["l.lora_B.weight"] @ found["l.lora_A.weight"]
    u, s, vh = torch.linalg.svd(0.5 * b @ a)
    best = u[:, :rank] * s[:rank] @ vh[:rank] if rank < 3 else 0.5 * b @ a
    assert torch.allclose(product, best[:6], atol=1e-5)
    assert torch.equal(found["l.lora_A.weight"][3:], own_a[3:])
