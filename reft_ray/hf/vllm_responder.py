"""Greedy answers through vLLM where it is installed, for evaluations of many prompts on a GPU.

Prompts and stop tokens are those of `hf.chat`, so that a model is asked as it was trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import ReftError
from reft_ray.hf.adapter_files import ADAPTER_CONFIG
from reft_ray.hf.adapter_tools import tokenizer_folder
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import context_of, load_tokenizer
from reft_ray.hf.lora import ADAPTER_WEIGHTS
from reft_ray.hf.model_store import local_name

ENGINES = ("auto", "transformers", "vllm")
_MEMORY = 0.85
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def uses_vllm(engine: str, device: str) -> bool:
    """Whether answers come from vLLM: if asked for, or under `auto` on a GPU where it is installed.

    Raises ReftError for an unknown engine, and where vLLM is asked for and not installed.
    """
    if engine not in ENGINES:
        raise ReftError(f"--engine {engine}: one of {', '.join(ENGINES)}")
    installed = find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise ReftError('--engine vllm: vLLM is not installed: pip install "reft-ray[vllm]"')
    return engine == "vllm" or (engine == "auto" and installed and device.startswith("cuda"))


class VllmResponder:
    """Answers conversations greedily with a base model and, if given, a student: an `evaluation.judges.Respond`."""

    def __init__(self, base: str, student: Path | None = None, max_new_tokens: int = 256) -> None:
        from vllm import LLM, SamplingParams

        adapted = student is not None and (student / ADAPTER_WEIGHTS).is_file()
        name = str(student) if student is not None and not adapted else base
        tokens = tokenizer_folder(student, base) if adapted and student is not None else name
        self.chat = ChatFormat(load_tokenizer(tokens))
        self._lora: Any = None
        options: dict[str, Any] = {}
        if adapted and student is not None:
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest("student", 1, str(student.absolute()))
            rank = int(json.loads((student / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"])
            options = {"enable_lora": True, "max_lora_rank": next((r for r in _RANKS if r >= rank), rank)}
        self._context = context_of(name)
        self._llm = LLM(
            model=local_name(name),
            dtype="bfloat16" if torch.cuda.is_available() else "float32",
            gpu_memory_utilization=_MEMORY,
            max_model_len=min(self._context, 8192),
            trust_remote_code=False,
            **options,
        )
        self._sampling = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=sorted(self.chat.stop_ids)
        )

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        """One answer per conversation, in order, without special tokens."""
        prompts = [{"prompt_token_ids": self.chat.prompt(conversation)} for conversation in conversations]
        found = self._llm.generate(prompts, self._sampling, use_tqdm=False, lora_request=self._lora)
        return [answer.outputs[0].text.strip() for answer in found]
