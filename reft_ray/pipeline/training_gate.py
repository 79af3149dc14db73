"""The release gate of the training API: an adapter of the worker's own bank against the base model's figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from reft_ray.evaluation.gate import Gate, GateResult
from reft_ray.evaluation.judge_settings import judges_from
from reft_ray.evaluation.suite import Evaluation, Suite, evaluate
from reft_ray.hf.adapter_bank import AdapterBank
from reft_ray.hf.generate import Responder
from reft_ray.pipeline.base_figures import BaseFigures
from reft_ray.pipeline.measure import MeasureRequest
from reft_ray.pipeline.model_context import ModelContext


class TrainingGate:
    """Measures adapters on the gate prompts; the base model is asked them once."""

    def __init__(self, context: ModelContext, bank: AdapterBank, folder: Path) -> None:
        self._context, self._bank = context, bank
        self._figures = BaseFigures(folder / "base_figures")

    def check(self, adapter: str) -> GateResult:
        """Whether this adapter may leave."""
        args, harmful = self._context.args.gate, self._context.harmful()
        suite = Suite(
            [row.prompt for row in harmful],
            [row.prompt for row in self._context.harmless()],
            categories=[row.category for row in harmful],
        )
        request = MeasureRequest(suite, (), args.max_new_tokens, args.batch_tokens, args.judges)
        base = self._figures.of(self._bank.base.fingerprint, request, lambda: self._measure(None, request))
        return Gate(args.bounds({}, validated=False)).check(self._measure(adapter, request), base)

    def _measure(self, adapter: str | None, request: MeasureRequest) -> Evaluation:
        judges = judges_from(request.judges, str(self._bank.device), request.batch_tokens)
        respond = Responder(self._bank.model, self._bank.chat, request.max_new_tokens, request.batch_tokens)
        with self._bank.using(adapter):
            return evaluate(respond, replace(request.suite, judges=judges))
