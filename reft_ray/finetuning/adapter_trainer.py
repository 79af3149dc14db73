"""Training loops that a client drives, on one base: gradients, guided optimiser steps and samples of each adapter.

    g_step = g_client + M * alpha * T^2 * d/dw sum KL(p_teacher || p_student) / N_align

M is the mass of the client's loss since the last step (`core.token_losses`): the sum of |d loss / d logp| over tokens.
With a cross entropy of weight 1 it is the number of learned tokens, so that the step is that of `core.guided` but for
a factor; and a client that scales its weights or advantages scales the alignment term with them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from reft_ray.core.batch import TokenizedExample, answered, collate_targets, micro_batches
from reft_ray.core.completion import Sampling
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.core.guided import Distillation
from reft_ray.core.loss_inputs import LossName
from reft_ray.core.losses import divergence_sum
from reft_ray.core.token_losses import per_token, token_loss
from reft_ray.finetuning.adapter_passes import Array, Rows, Work, run_passes
from reft_ray.finetuning.rows import CyclingSampler, SamplerState
from reft_ray.hf.adapter_bank import AdapterBank
from reft_ray.hf.adapter_files import read_tensors, write_tensors
from reft_ray.hf.decoding import DecodingBatch
from reft_ray.hf.lora import LoraSettings, read_adapter
from reft_ray.hf.sampling import DecodingRow

LOOP, MOMENTS = "loop.json", "optimizer.safetensors"


@dataclass(frozen=True, slots=True)
class Guidance:
    """The alignment rows and their labels; `ratio` is alignment tokens per token of the client."""

    rows: Sequence[TokenizedExample]
    distillation: Distillation
    ratio: float = 0.25


@dataclass(frozen=True, slots=True)
class StepParameters:
    """AdamW's parameters of one step; `grad_clip_norm` of 0 clips nothing."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        """Raises ReftError."""
        for name, value in asdict(self).items():
            if not math.isfinite(value) or value < 0:
                raise ReftError(f"adam_params.{name} must be a number from 0, not {value}")
        if self.beta1 >= 1 or self.beta2 >= 1:
            raise ReftError("adam_params.beta1 and beta2 must be below 1")


@dataclass
class Loop:
    """An adapter in training: its optimiser, its place among the alignment rows, and what waits for the next step."""

    settings: LoraSettings
    optimizer: torch.optim.AdamW
    steps: int = 0
    sampler: SamplerState = field(default_factory=SamplerState)
    mass: float = 0.0
    tokens: int = 0

    @property
    def waits(self) -> bool:
        """Whether there is a gradient that no step has used."""
        return self.tokens > 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled sequence; `stopped` unless it has the most tokens that were asked for."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool


class AdapterTrainer:
    """The loops on one base. Not thread-safe."""

    def __init__(self, bank: AdapterBank, batch_tokens: int, guidance: Guidance | None = None, seed: int = 0) -> None:
        self.bank = bank
        self.guidance = guidance
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._loops: dict[str, Loop] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._loops

    def loop(self, name: str) -> Loop:
        """The loop of this adapter."""
        return self._loops[name]

    def create(self, name: str, settings: LoraSettings, seed: int, start: Path | None = None) -> None:
        """Start a loop from a new adapter, with the update of a saved one if given."""
        self.bank.add(name, settings, seed)
        if start is not None:
            self.bank.start_from(name, start)
        self._loops[name] = Loop(settings, self._optimizer(name))

    def restore(self, name: str, settings: LoraSettings, folder: Path, moments: bool = True) -> None:
        """Start a loop from a saved one, with its optimiser or with a new one. Raises ReftError where it differs."""
        saved = json.loads((folder / LOOP).read_text(encoding="utf-8"))
        if LoraSettings(**saved["lora"]) != settings:
            raise ReftError("the saved weights have another rank or other layers than this model")
        state = read_adapter(folder)
        if name in self._loops:
            self.bank.load(name, state)
        else:
            self.bank.add(name, settings, 0, state)
        loop = Loop(settings, self._optimizer(name))
        if moments:
            loop.steps, loop.sampler = saved["steps"], SamplerState(**saved["sampler"])
            self._load_moments(name, loop, read_tensors(folder / MOMENTS))
        self._clear(name)
        self._loops[name] = loop

    def save(self, name: str, folder: Path, base_name: str) -> None:
        """Write adapter, optimiser and counters. A gradient that waits is not part of it."""
        loop = self._loops[name]
        self.bank.save(name, folder, base_name)
        write_tensors(folder / MOMENTS, self._moments(name, loop))
        saved = {"lora": asdict(loop.settings), "steps": loop.steps, "sampler": asdict(loop.sampler)}
        (folder / LOOP).write_text(json.dumps(saved), encoding="utf-8")

    def drop(self, name: str) -> None:
        """Forget a loop."""
        self._loops.pop(name, None)
        if name in self.bank.names:
            self.bank.remove(name)

    def forward(
        self, name: str, rows: Rows, loss: LossName, config: Mapping[str, float], backward: bool
    ) -> tuple[list[dict[str, Array]], dict[str, float]]:
        """The loss of a request; with `backward` its gradient is added to what waits for the next step.

        Returns log-probabilities and losses [T] per row, and metrics. Raises ReftError for a loss that is not finite:
        then nothing of the request counts.
        """
        (found,) = self.forward_together([Work(name, rows, loss, config)], backward)
        if isinstance(found, ReftError):
            raise found
        return found

    def forward_together(
        self, works: Sequence[Work], backward: bool
    ) -> list[tuple[list[dict[str, Array]], dict[str, float]] | ReftError]:
        """`forward` of requests of different adapters in the same passes; an error has no effect on the others.

        Raises what a pass raises: then nothing of any request counts.
        """
        before = {work.adapter: self._gradients(work.adapter) for work in works} if backward else {}
        try:
            passed = run_passes(self.bank, works, self._batch_tokens, backward)
        except BaseException:
            for name, gradients in before.items():
                self._put_back(name, gradients)
            raise
        found: list[tuple[list[dict[str, Array]], dict[str, float]] | ReftError] = []
        for work, each in zip(works, passed, strict=True):
            if backward and not (math.isfinite(each.total) and math.isfinite(each.mass)):
                self._put_back(work.adapter, before[work.adapter])
                found.append(ReftError(f"the loss is {each.total}: nothing of this request was learned"))
                continue
            if backward:
                loop = self._loops[work.adapter]
                loop.mass += each.mass
                loop.tokens += sum(len(tokens) for tokens in work.rows.tokens)
            found.append((each.outputs, {"loss:sum": each.total}))
        return found

    def step(self, name: str, parameters: StepParameters) -> dict[str, float]:
        """One optimiser step on what waits, guided by the teacher; returns its metrics.

        Raises ReftError for a gradient that is not finite: then nothing is changed but that it is forgotten.
        """
        loop = self._loops[name]
        metrics = self._guide(name, loop)
        trained = [p for p in self.bank.parameters(name).values() if p.grad is not None]
        try:
            if trained:
                clip = parameters.grad_clip_norm or math.inf
                norm = float(torch.nn.utils.clip_grad_norm_(trained, clip))
                if not math.isfinite(norm):
                    raise ReftError(f"the gradient's norm is {norm}: the step was not made")
                metrics["gradient_norm"] = norm
                for group in loop.optimizer.param_groups:
                    group |= {
                        "lr": parameters.learning_rate,
                        "betas": (parameters.beta1, parameters.beta2),
                        "eps": parameters.eps,
                        "weight_decay": parameters.weight_decay,
                    }
                loop.optimizer.step()
            loop.steps += 1
        finally:
            self._clear(name)
            loop.mass, loop.tokens = 0.0, 0
        return metrics

    def sample(
        self, name: str | None, prompt: Sequence[int], count: int, sampling: Sampling, stops: Stops
    ) -> list[Completion]:
        """`count` completions of a prompt, with this adapter or with the base alone; a seed repeats them."""
        seeds = random.Random(sampling.seed)  # noqa: S311 - not a secret
        rows = [
            DecodingRow(_seeded(sampling, seeds.getrandbits(48)), list(prompt))
            for _ in range(count)
        ]  # fmt: skip
        found = {id(row): Completion([], [], False) for row in rows}
        with self.bank.using(name):
            batch = DecodingBatch(self.bank)  # type: ignore[arg-type]
            tokens = batch.add(rows)
            while batch.rows:
                ended = []
                for row, token in zip(batch.rows, tokens, strict=True):
                    completion = found[id(row)]
                    if token is None or row.score is None:
                        raise ReftError("the model's logits are not numbers")
                    completion.tokens.append(token)
                    completion.logprobs.append(row.score.logprob)
                    stopped = stops.ends(completion.tokens, self.bank.chat.tokenizer)
                    if stopped or len(completion.tokens) >= sampling.max_tokens:
                        found[id(row)] = Completion(completion.tokens, completion.logprobs, stopped)
                        ended.append(row)
                batch.remove(ended)
                tokens = batch.step() if batch.rows else []
        return [found[id(row)] for row in rows]

    @torch.no_grad()
    def prompt_logprobs(self, name: str | None, prompt: Sequence[int]) -> list[float]:
        """The log-probability of each token of a prompt; NaN for the first."""
        if len(prompt) < 2:
            return [math.nan] * len(prompt)
        batch = collate_targets([(prompt[:-1], prompt[1:])], self.bank.chat.pad_id, self.bank.device)
        ones = torch.ones(batch.labelled, device=self.bank.device)
        with self.bank.using(name):
            loss = per_token("cross_entropy", {"weights": ones}, {})
            found = token_loss(self.bank.forward.predictions(batch), batch.labels_N, loss, ones)
        return [math.nan, *found.logprob_N.tolist()]

    def _guide(self, name: str, loop: Loop) -> dict[str, float]:
        """Add the alignment term to the gradient of a step that has data of the client."""
        guidance = self.guidance
        if guidance is None or not loop.waits:
            return {}
        # The same order for every adapter: its name differs after a restart.
        sampler = CyclingSampler(guidance.rows, f"{self._seed}/guidance", loop.sampler)
        rows = answered(sampler.take_tokens(loop.tokens * guidance.ratio))
        batches = micro_batches(rows, self._batch_tokens, self.bank.chat.pad_id, self.bank.device)
        labelled = max(sum(batch.labelled for batch in batches), 1)
        chosen, total = guidance.distillation, 0.0
        # With all data withheld the step is the teacher's alone.
        scale = (loop.mass or 1.0) * chosen.alpha * chosen.temperature**2 / labelled
        with self.bank.training(name):
            for batch in batches:
                divergence = divergence_sum(
                    chosen.labels(batch), self.bank.forward.predictions(batch), chosen.temperature
                )
                (scale * divergence).backward()
                total += float(divergence.detach())
        return {"guidance_loss": total / labelled, "guidance_tokens": float(sum(map(len, rows)))}

    def _gradients(self, name: str) -> dict[str, torch.Tensor | None]:
        parameters = self.bank.parameters(name)
        return {key: None if p.grad is None else p.grad.clone() for key, p in parameters.items()}

    def _put_back(self, name: str, gradients: Mapping[str, torch.Tensor | None]) -> None:
        for key, parameter in self.bank.parameters(name).items():
            parameter.grad = gradients[key]

    def _optimizer(self, name: str) -> torch.optim.AdamW:
        return torch.optim.AdamW(list(self.bank.parameters(name).values()), lr=0.0)

    def _clear(self, name: str) -> None:
        for parameter in self.bank.parameters(name).values():
            parameter.grad = None

    def _moments(self, name: str, loop: Loop) -> dict[str, torch.Tensor]:
        states = loop.optimizer.state
        return {
            f"{key.replace(f'.{name}.', '.')}#{part}": value.detach().cpu().clone()
            for key, parameter in self.bank.parameters(name).items()
            for part, value in states.get(parameter, {}).items()
        }

    def _load_moments(self, name: str, loop: Loop, tensors: Mapping[str, torch.Tensor]) -> None:
        for key, parameter in self.bank.parameters(name).items():
            prefix = f"{key.replace(f'.{name}.', '.')}#"
            found = {part.removeprefix(prefix): value for part, value in tensors.items() if part.startswith(prefix)}
            if found:
                loop.optimizer.state[parameter] = {
                    part: value.clone() if part == "step" else value.to(parameter.device, copy=True)
                    for part, value in found.items()
                }


@dataclass(frozen=True, slots=True)
class Stops:
    """What ends a completion: one of these tokens, or one of these texts at its end."""

    ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()

    def ends(self, tokens: Sequence[int], tokenizer: Any) -> bool:
        """Whether these tokens are a completion; the last ones are decoded where texts are asked for."""
        if tokens[-1] in self.ids:
            return True
        if not self.texts:
            return False
        longest = max(map(len, self.texts))
        text = tokenizer.decode(tokens[-(longest + 8) :])
        return any(stop in text for stop in self.texts)


def _seeded(sampling: Sampling, seed: int) -> Sampling:
    return Sampling(sampling.max_tokens, sampling.temperature, sampling.top_p, seed=seed, logprobs=0)


def lora_settings(lora: Mapping[str, Any]) -> LoraSettings:
    """The client's choice of layers as settings. Raises UsageError where none is left."""
    attention, mlp, head = (bool(lora.get(name, True)) for name in ("train_attn", "train_mlp", "train_unembed"))
    if not (attention or mlp or head):
        raise UsageError("lora_config trains no layer")
    targets = "all-linear" if attention and mlp else "attention" if attention else "mlp" if mlp else "none"
    # As the method's own students: alpha is twice the rank.
    return LoraSettings(rank=int(lora["rank"]), targets=targets, head=head)
