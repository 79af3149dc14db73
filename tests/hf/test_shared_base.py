"""Adapters come and go on one base, and whoever stays says what it said before."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from reft_ray.core.errors import ReftError
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


def said(base: SharedBase, *keys: str | None) -> torch.Tensor:
    ids_BT = IDS_BT.expand(len(keys), -1)
    positions_BT = torch.arange(IDS_BT.shape[1]).expand_as(ids_BT)
    return base.logits(ids_BT, torch.ones_like(ids_BT), positions_BT, DynamicCache(), keys)


def test_the_last_adapter_leaves_and_comes_back(llama: Path, tmp_path: Path) -> None:
    folders = {key: saved(llama, tmp_path / key, seed) for seed, key in enumerate("ab")}
    base = SharedBase(load_base(str(llama)), most_adapters=1)
    plain = said(base, None)
    alone = {}
    for key, folder in [*folders.items(), *folders.items()]:
        assert base.hold(key, folder)
        assert base.adapters == [key]
        assert torch.equal(alone.setdefault(key, said(base, key)), said(base, key))
        assert torch.equal(said(base, None), plain)
        torch.testing.assert_close(said(base, key, None), torch.cat([alone[key], plain]))
    assert not torch.equal(alone["a"], alone["b"])


def test_an_adapter_that_does_not_fit_leaves_the_others_as_they_were(llama: Path, tmp_path: Path) -> None:
    good = saved(llama, tmp_path / "good", 1)
    bad = saved(llama, tmp_path / "bad", 2)
    (bad / "adapter_config.json").write_text((bad / "adapter_config.json").read_text().replace('"r": 4', '"r": 8'))
    base = SharedBase(load_base(str(llama)), most_adapters=2)
    plain = said(base, None)
    with pytest.raises(ReftError, match="does not fit"):
        base.hold("bad", bad)
    assert torch.equal(said(base, None), plain)
    base.hold("good", good)
    before = said(base, "good")
    with pytest.raises(ReftError, match="does not fit"):
        base.hold("bad", bad)
    assert base.adapters == ["good"]
    assert torch.equal(said(base, "good"), before)
    assert torch.equal(said(base, None), plain)
