"""Import Ray once before warnings become errors: its deprecation warnings are not ours."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401

import pytest
import torch

from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import LoraSettings, attach, save_adapter


@pytest.fixture(scope="module")
def adapters(llama, tmp_path_factory):
    """Four adapters that change the base model's output."""
    model = load_base(str(llama)).model
    folders = []
    for seed in range(4):
        model = attach(model, f"a{seed}", LoraSettings(rank=4), seed)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f"lora_B.a{seed}." in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
        folder = tmp_path_factory.mktemp("adapter")
        save_adapter(model, f"a{seed}", folder, "tiny")
        folders.append(str(folder))
    return folders
