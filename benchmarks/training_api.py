"""Processor seconds of a step of the training API: bare, screened, and screened and guided, side by side.

    python benchmarks/training_api.py [--sessions 1 4] [--steps 3] [--rows 8] [--rounds 2] [--json FILE]
    python benchmarks/training_api.py --ways bare "bare, batched" --rows 1

The base is SmolLM2-135M-Instruct with the packaged teacher (`--base` and `--teacher` for others). Each session is a model
of rank `--rank` in its own project; a step is one forward_backward on `--rows` dialogues and one optim_step, run by one
worker from the records, without HTTP. `bare` judges nothing and has no guidance: what a training API without this method
costs. The `batched` ways compute the data of up to four sessions in one pass. The ways take turns in every round. Seconds are those of the processor, which other work on the machine hardly
changes. Soft labels of `--alignment` rows are made before anything is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from training_servers import ANSWER, TEXT

from reft_ray.api.settings import TrainingSettings
from reft_ray.api.training_wire import _CLASSES
from reft_ray.core.conversation import Conversation, Example, chat
from reft_ray.core.scoring import judge
from reft_ray.core.verdict import Decision, Verdict
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_tokenizer
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.database import Database
from reft_ray.jobs.tenants import LOCAL
from reft_ray.jobs.training import TrainingStore
from reft_ray.jobs.training_queue import DONE, Outcome, TrainingQueue
from reft_ray.pipeline.builtin import local_base
from reft_ray.pipeline.config import BaseArgs
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.training_worker import TrainingWorker, WorkerParts
from reft_ray.testbed.synthetic import SyntheticRows

WAYS = {
    "bare": (False, 0.0, 1),
    "screened": (True, 0.0, 1),
    "screened + guided 1:4": (True, 0.25, 1),
    "screened + guided 1:1": (True, 1.0, 1),
    "bare, batched": (False, 0.0, 4),
    "screened + guided, batched": (True, 0.25, 4),
}
"""Whether a way screens, its guidance ratio, and how many sessions have their data in one pass."""


def allow(conversations: Sequence[Conversation]) -> list[Verdict]:
    """No screening."""
    return [Verdict(Decision.ALLOW, -1.0, 0.0, 1.0, "")] * len(conversations)


def context_of(options: argparse.Namespace, folder: Path, screened: bool) -> ModelContext:
    """The base model with a few alignment rows; what is not screened has no findings either."""
    rows = SyntheticRows.make(0).alignment[: options.alignment]
    path = folder / "alignment.jsonl"
    records = [{"prompt": row.prompt[-1].content, "response": row.response, "label": str(row.label)} for row in rows]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    args = local_base(options.teacher, options.base).model_dump(mode="json")
    args["alignment"] = {"default": {"labelled": [str(path)]}}
    args["screening"]["findings"] = screened
    return ModelContext(BaseArgs.of(args))


class Bench:
    """One worker with its own records."""

    def __init__(self, folder: Path, context: ModelContext, way: str, shared: Path, alignment: int = 512) -> None:
        folder.mkdir()
        screened, ratio, sessions = WAYS[way]
        settings = TrainingSettings(
            guidance_ratio=ratio,
            alignment_rows=alignment,
            max_models=64,
            max_loaded=16,
            checkpoint_every=1_000_000,
            batch_sessions=sessions,
        )
        self.database = Database.open(f"sqlite:///{folder / 'jobs.db'}")
        self.queue = TrainingQueue(TrainingStore(self.database, 1 << 40, 64))
        scorer = context.teacher.scorer(base_name=context.base) if screened else None
        self.worker = TrainingWorker(
            WorkerParts(
                "base",
                context,
                settings,
                self.queue,
                ContentStore(str(folder / "files")),
                allow if scorer is None else lambda conversations: judge(scorer, conversations),
                shared,
            )
        )

    def drain(self) -> None:
        """Run all that waits."""
        while self.worker.tick():
            pass
        found = self.queue.get(self.last.id, self.last.project_id)
        if found.status != DONE:
            raise SystemExit(f"a step failed: {found.error}")

    def model(self, number: int, rank: int) -> str:
        """A new model in a project of its own."""
        caller = replace(LOCAL, project_id=f"proj_{number}")
        session = self.queue.store.open_session(caller, {}, None)
        model = f"{session.id}:train:0"
        lora = {"rank": rank, "seed": number, "train_attn": True, "train_mlp": True, "train_unembed": False}
        self.queue.submit(
            model, 0, "create_model", caller.project_id, "base", b"",
            lambda connection: self.queue.store.create_model_in(
                connection, session, 0, "base", lora, {}, LOCAL.actor, 0
            ),
            Outcome(b"{}"),
        )  # fmt: skip
        return model

    def step(self, model: str, project: str, number: int, rows: Sequence[Any], rate: float = 1e-4) -> None:
        """Log one step."""
        self.last = self.queue.submit(model, number, "forward_backward", project, "base", request(model, number, rows))
        body = {"model_id": model, "seq_id": number + 1, "adam_params": {"learning_rate": rate, "eps": 1e-8}}
        self.queue.submit(model, number + 1, "optim_step", project, "base", json.dumps(body).encode())


def request(model: str, number: int, rows: Sequence[Any]) -> bytes:
    """A forward_backward on encoded rows."""
    message = _CLASSES["ForwardBackwardRequest"](model_id=model, seq_id=number, loss_fn="cross_entropy")
    for row in rows:
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.array(row.ids[:-1], np.int32).tobytes()
        for name, values, dtype in (
            ("target_tokens", np.array(row.ids[1:], np.int64), 2),
            ("weights", np.array(row.loss_mask[1:], np.float32), 1),
        ):
            tensor = datum.loss_fn_inputs[name]
            tensor.dense, tensor.dtype = values.tobytes(), dtype
            tensor.shape.append(len(values))
    found: bytes = message.SerializeToString()
    return found


def main() -> None:
    """Measure, print a table, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=None)
    parser.add_argument("--teacher", default="builtin")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alignment", type=int, default=64)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:3])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds: dict[tuple[str, int], list[float]] = {}
    rates: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        contexts = {screened: context_of(options, folder, screened) for screened in (False, True)}
        words = ChatFormat(load_tokenizer(contexts[True].base))
        benches = {
            way: Bench(folder / str(number), contexts[WAYS[way][0]], way, folder / "shared")
            for number, way in enumerate(options.ways)
        }
        tokens = 0
        for bench in benches.values():
            bench.worker.engine  # noqa: B018 - loads the base
        for round_ in range(options.rounds):
            for sessions in options.sessions:
                for way, bench in benches.items():
                    models = [bench.model(number, options.rank) for number in range(sessions)]
                    for step in range(options.steps + 1):
                        for at, model in enumerate(models):
                            first = 1000 * round_ + 100 * step + 10 * at
                            rows = [
                                words.encode(Example(chat(TEXT.format(first + n), ANSWER.format(first + n))))
                                for n in range(options.rows)
                            ]
                            tokens = sum(map(len, rows))
                            bench.step(model, f"proj_{at}", 1 + 2 * step, rows)
                        if step == 0:  # the first step makes the adapters and the optimiser's state
                            bench.drain()
                            started, clock = time.process_time(), time.perf_counter()
                    bench.drain()
                    steps = options.steps * sessions
                    seconds.setdefault((way, sessions), []).append((time.process_time() - started) / steps)
                    rates.setdefault((way, sessions), []).append(steps / (time.perf_counter() - clock))
                    for model in models:
                        bench.queue.store.set_state(model, "unloaded")
                        bench.worker.engine.forget(model)
        for bench in benches.values():
            bench.database.close()
    print(f"{options.rows} rows, {tokens} tokens in a step; rank {options.rank}; processor seconds of a step, median\n")
    print("| sessions | " + " | ".join(options.ways) + " |\n|---|" + "---|" * len(options.ways))
    for sessions in options.sessions:
        cells = [statistics.median(seconds[way, sessions]) for way in options.ways]
        shown = [f"{cells[0]:.2f}", *(f"{cell:.2f} ({100 * (cell / cells[0] - 1):+.0f} %)" for cell in cells[1:])]
        print(f"| {sessions} | " + " | ".join(shown) + " |")
    print(
        "\nSteps a second, median\n\n| sessions | "
        + " | ".join(options.ways)
        + " |\n|---|"
        + "---|" * len(options.ways)
    )
    for sessions in options.sessions:
        shown = [f"{statistics.median(rates[way, sessions]):.2f}" for way in options.ways]
        print(f"| {sessions} | " + " | ".join(shown) + " |")
    if options.json:
        found = {f"{way}, {sessions}": values for (way, sessions), values in seconds.items()}
        options.json.write_text(json.dumps({"tokens": tokens, "seconds": found}, indent=2))


if __name__ == "__main__":
    main()
