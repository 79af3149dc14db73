"""Drivers on the head host: `python hosts_kit.py screen IN OUT` or `finetune BASE OUT STORAGE`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ray

SECONDS_PER_ROW = 0.004


def slow_words() -> object:
    """The word scorer at the speed of a small model, so that a host can be lost during the run."""
    from reft_ray.core.scoring import TextScore
    from reft_ray.testbed.word_scorer import WordScorer

    class SlowWords(WordScorer):
        def score(self, texts: Sequence[str]) -> list[TextScore]:
            time.sleep(SECONDS_PER_ROW * len(texts))
            return super().score(texts)

    return SlowWords()


def screen(source: str, out: str) -> None:
    from reft_ray.screening.config import ScreenConfig
    from reft_ray.screening.dataset import screen as run

    config = ScreenConfig(small_rows=0, actors=2, findings=False)
    report = run([source], out, slow_words, config)
    print(json.dumps({name: getattr(report, name) for name in ("rows", "kept", "review", "blocked", "invalid")}))


def finetune(base: str, out: str, storage: str) -> None:
    from reft_ray.core.conversation import Example, Label, chat
    from reft_ray.finetuning.config import FinetuneConfig, Resources
    from reft_ray.finetuning.trainer import FinetuneInputs
    from reft_ray.finetuning.trainer import finetune as run

    words = ["car", "bread", "me", "that", "help", "how", "tell", "please"]
    user = [Example(chat(f"tell me {'no ' * (i % 7)} {i}", "sure here is")) for i in range(8_000)]
    alignment = [Example(chat(f"how to steal a {w}", "sorry i cannot"), Label.HARMFUL, "a") for w in words]
    config = FinetuneConfig.of(
        {
            "base": base,
            "labels": "hard",
            "epochs": 2,
            "batch_rows": 8,
            "lora": {"rank": 4},
            "checkpoint_every": 50,
            "log_every": 20,
        }
    )
    # One host has no capacity for both workers, or for a worker and the other processes.
    resources = Resources.of({"workers": 2, "cpus_per_worker": 2.5, "storage": storage})
    run(config, FinetuneInputs(user, len(user), alignment), Path(out), resources, "hosts")


if __name__ == "__main__":
    ray.init(address="auto", log_to_driver=False)
    {"screen": screen, "finetune": finetune}[sys.argv[1]](*sys.argv[2:])
