"""A Ref-Teacher with random weights, and prompts, for measurements of speed."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reft_ray.core.conversation import Conversation, chat
from reft_ray.core.decoding import COMMON_WORDS
from reft_ray.core.geometry import Readout, Readouts
from reft_ray.core.quality import FilterQuality
from reft_ray.core.verdict import Calibration, Thresholds
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_base
from reft_ray.hf.ref_teacher import Manifest, RefTeacher, save_teacher
from reft_ray.hf.tiny import train_tokenizer

WORDS = tuple(sorted(COMMON_WORDS))
SHAPES = {
    # Hidden, intermediate, layers, heads, key-value heads, vocabulary.
    "small": (256, 688, 12, 4, 4, 8192),
    "medium": (768, 2048, 12, 12, 12, 32_000),
    "8b": (4096, 14_336, 32, 32, 8, 128_256),
}


def prompts(count: int, seed: int = 0) -> list[str]:
    """Distinct prompts with the lengths of chat prompts: mostly a few words, some with hundreds."""
    source = random.Random(seed)
    return [
        f"{number} {' '.join(source.choices(WORDS, k=min(300, max(3, int(source.lognormvariate(3.2, 0.9))))))}"
        for number in range(count)
    ]


def conversations(texts: list[str]) -> list[Conversation]:
    """One-turn conversations."""
    return [chat(text) for text in texts]


def save_base(folder: Path, shape: str, seed: int = 0) -> Path:
    """A Llama with random weights and its tokenizer, as a Hugging Face directory."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 50, vocab_size=2048, max_positions=4096)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_random_teacher(folder: Path, shape: str) -> RefTeacher:
    """A Ref-Teacher artefact at half depth with the full weights of such a base."""
    base = load_base(str(save_base(folder / "base", shape)))
    quality = FilterQuality(2, 1, 0.5, 0.5, 0.0, 0.0, 0.0, 0.5)
    manifest = Manifest(
        base_name=str(folder / "base"),
        base_fingerprint=base.fingerprint,
        template_hash=ChatFormat(base.tokenizer).hash,
        layer=base.layers // 2,
        width=SHAPES[shape][0],
        weights="full",
        thresholds=Thresholds(0.2, 0.5),
        calibration=Calibration(6.0, 0.0),
        quality=quality,
        per_source={},
        histogram=[1] * 40,
        config={},
    )
    refusal = torch.nn.functional.normalize(torch.randn(SHAPES[shape][0]), dim=0)
    return save_teacher(folder / "teacher", base.model, manifest, Readouts({manifest.layer: Readout(refusal)}))
