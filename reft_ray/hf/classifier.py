"""A sequence classifier as a judge of harm: prompt and answer in, probability of harm out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reft_ray.core.batch import token_batches
from reft_ray.core.errors import ReftError
from reft_ray.hf.loading import load_classifier


class HarmClassifier:
    """A model by Hugging Face id or path, with the labels that mean harm.

    One-of-many models give the summed probability of these labels; multi-label models (`problem_type` says so) the
    highest of them. Raises ReftError for a path without such a model, or for unknown labels.
    """

    def __init__(
        self, name: str, harmful_labels: Sequence[str], device: torch.device | str = "cpu", batch_tokens: int = 8192
    ) -> None:
        self.model, self.tokenizer = load_classifier(name, device)
        known: dict[str, int] = self.model.config.label2id or {}  # type: ignore[assignment]
        if not harmful_labels:
            raise ReftError(f"name the harmful labels of {name}; its labels are {', '.join(sorted(known))}")
        for label in harmful_labels:
            if label not in known:
                raise ReftError(f"{name} has no label {label!r}; its labels are {', '.join(sorted(known))}")
        self.harmful_ids = sorted({int(known[label]) for label in harmful_labels})
        self.multi_label = self.model.config.problem_type == "multi_label_classification"
        self.batch_tokens = batch_tokens
        limit = int(getattr(self.model.config, "max_position_embeddings", 512))
        self.max_tokens = min(limit, int(self.tokenizer.model_max_length))

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """One probability per pair, in order; a pair too long for the model loses the end of its longer text."""
        lengths = [
            min(len(self.tokenizer(prompt, answer)["input_ids"]), self.max_tokens)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        scores = [0.0] * len(lengths)
        for indices in token_batches(lengths, self.batch_tokens):
            inputs = self.tokenizer(
                [prompts[i] for i in indices],
                [answers[i] for i in indices],
                truncation=True,
                max_length=self.max_tokens,
                padding=True,
                return_tensors="pt",
            ).to(self.model.device)
            logits_BL = self.model(**inputs).logits.float()
            if self.multi_label:
                harm_B = logits_BL.sigmoid()[:, self.harmful_ids].amax(-1)
            else:
                harm_B = logits_BL.softmax(-1)[:, self.harmful_ids].sum(-1)
            for index, harm in zip(indices, harm_B.tolist(), strict=True):
                scores[index] = harm
        return scores
