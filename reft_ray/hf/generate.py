"""Greedy answers from a model, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from reft_ray.core.batch import token_batches
from reft_ray.core.conversation import Conversation
from reft_ray.hf.chat import ChatFormat


class Responder:
    """Answers conversations greedily: the `respond` that evaluation asks for."""

    def __init__(self, model: nn.Module, chat: ChatFormat, max_new_tokens: int = 64, batch_tokens: int = 8192) -> None:
        self.model = model
        self.chat = chat
        self.max_new_tokens = max_new_tokens
        self.batch_tokens = batch_tokens

    @torch.inference_mode()
    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        """One answer per conversation, in order, without special tokens."""
        prompts = [self.chat.prompt(conversation) for conversation in conversations]
        answers = [""] * len(prompts)
        training = self.model.training
        self.model.eval()
        try:
            # Each row grows by max_new_tokens, so that much counts against the budget from the start.
            lengths = [len(prompt) + self.max_new_tokens for prompt in prompts]
            for indices in token_batches(lengths, self.batch_tokens):
                for index, answer in zip(indices, self._batch([prompts[i] for i in indices]), strict=True):
                    answers[index] = answer
        finally:
            self.model.train(training)
        return answers

    def _batch(self, prompts: list[list[int]]) -> list[str]:
        device = next(self.model.parameters()).device
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[self.chat.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        out_BT = self.model.generate(  # type: ignore[operator]
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.chat.pad_id,
            eos_token_id=sorted(self.chat.stop_ids),
        )
        texts = self.chat.tokenizer.batch_decode(out_BT[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]
