"""Loading and unloading adapters on one base does not change what the others compute."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from reft_ray.core.errors import ReftError
from reft_ray.hf.forward import decoder_layers
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import LoraSettings, attach, save_adapter
from reft_ray.hf.shared_base import SharedBase

IDS_BT = torch.tensor([[1, 8, 9, 10]])


def saved(llama: Path, folder: Path, seed: int) -> Path:
    model = attach(load_base(str(llama)).model, "student", LoraSettings(rank=4), seed)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_B.student." in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    save_adapter(model, "student", folder, "tiny")
    return folder


def logits(base: SharedBase, *keys: str | None) -> torch.Tensor:
    ids_BT = IDS_BT.expand(len(keys), -1)
    positions_BT = torch.arange(IDS_BT.shape[1]).expand_as(ids_BT)
    return base.logits(ids_BT, torch.ones_like(ids_BT), positions_BT, DynamicCache(), keys)


def test_the_last_adapter_can_be_unloaded_and_loaded_again(llama: Path, tmp_path: Path) -> None:
    folders = {key: saved(llama, tmp_path / key, seed) for seed, key in enumerate("ab")}
    base = SharedBase(load_base(str(llama)), max_adapters=1)
    plain = logits(base, None)
    alone = {}
    for key, folder in [*folders.items(), *folders.items()]:
        assert base.ensure_adapter(key, folder)
        assert base.adapters == [key]
        assert torch.equal(alone.setdefault(key, logits(base, key)), logits(base, key))
        assert torch.equal(logits(base, None), plain)
        torch.testing.assert_close(logits(base, key, None), torch.cat([alone[key], plain]))
    assert not torch.equal(alone["a"], alone["b"])


def test_a_pass_that_fails_leaves_the_base_usable(llama: Path, tmp_path: Path) -> None:
    base = SharedBase(load_base(str(llama)))
    base.ensure_adapter("a", saved(llama, tmp_path / "a", 1))
    mixed, alone = logits(base, "a", None), logits(base, "a")

    def fails(*_args: object) -> None:
        raise RuntimeError("out of memory")

    handle = decoder_layers(base._model)[-1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        logits(base, "a", None)
    handle.remove()
    assert torch.equal(logits(base, "a"), alone)
    assert torch.equal(logits(base, "a", None), mixed)


def test_an_adapter_that_does_not_fit_leaves_the_others_unchanged(llama: Path, tmp_path: Path) -> None:
    good = saved(llama, tmp_path / "good", 1)
    bad = saved(llama, tmp_path / "bad", 2)
    (bad / "adapter_config.json").write_text((bad / "adapter_config.json").read_text().replace('"r": 4', '"r": 8'))
    base = SharedBase(load_base(str(llama)), max_adapters=2)
    plain = logits(base, None)
    with pytest.raises(ReftError, match="does not fit"):
        base.ensure_adapter("bad", bad)
    assert torch.equal(logits(base, None), plain)
    base.ensure_adapter("good", good)
    before = logits(base, "good")
    with pytest.raises(ReftError, match="does not fit"):
        base.ensure_adapter("bad", bad)
    assert base.adapters == ["good"]
    assert torch.equal(logits(base, "good"), before)
    assert torch.equal(logits(base, None), plain)
