"""Speed of the online filter, in ratios to contenders that run in turns with it.

    python benchmarks/filter.py [--quick] [--shape small|medium|8b] [--json FILE]

Contenders with the same (random) weights, prompts and number format: the filter's scorer, a plain transformers forward
pass (all layers, LM head, padded batches of 32 in order of arrival), the same model generating five tokens, and the whole
service over HTTP on loopback.
"""

from __future__ import annotations

import os

# Before torch is imported, and for all contenders: the service sets it for its replicas.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import asyncio
import json
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from random_teacher import SHAPES, prompts, save_random_teacher
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_ray.api.context import FilterContext
from reft_ray.api.moderator import LocalModerator
from reft_ray.api.settings import FilterSettings
from reft_ray.api.verdict_stream import VerdictStream
from reft_ray.core.conversation import chat
from reft_ray.core.scoring import Scorer
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.compute import matmul_rate, resolve_dtype
from reft_ray.hf.loading import load_base
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.hf.scorer import TeacherScorer
from reft_ray.serving.args import ServeArgs
from reft_ray.serving.local import local_service
from reft_ray.telemetry.recorder import NullRecorder
from reft_ray.testbed.word_scorer import WordScorer

BATCH = 32
PORT = 8765
Report = dict[str, Any]


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, accelerator work included."""
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def plain_forward(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """A simple implementation: all layers, logits of every position, padded batches in order of arrival."""
    for start in range(0, len(texts), BATCH):
        inputs = encoded(model, tokenizer, texts[start : start + BATCH], "right")
        with torch.inference_mode():
            model(**inputs)


def generating_guard(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """A guard that generates its verdict: five tokens per prompt."""
    for start in range(0, len(texts), BATCH):
        inputs = encoded(model, tokenizer, texts[start : start + BATCH], "left")
        with torch.inference_mode():
            model.generate(**inputs, min_new_tokens=5, max_new_tokens=5, do_sample=False)


def encoded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], side: str) -> Any:
    """A padded batch of templated prompts."""
    tokenizer.padding_side = side
    rendered = [ChatFormat(tokenizer).render(chat(text), generation=True) for text in texts]
    inputs = tokenizer(rendered, add_special_tokens=False, padding=True, return_tensors="pt")
    return {
        "input_ids": inputs["input_ids"].to(model.device),
        "attention_mask": inputs["attention_mask"].to(model.device),
    }


def scorer_against_others(teacher: RefTeacher, rounds: int, rows: int, guard_rows: int) -> tuple[Report, TeacherScorer]:
    """Rows per second of the scorer, a plain forward pass and a generating guard, in turns on new prompts."""
    scorer = teacher.scorer()
    device = scorer.model.device
    base = load_base(teacher.manifest.base_name)
    model = base.model.to(device=device, dtype=resolve_dtype("auto", str(device))).eval()
    # Warm up before measuring.
    scorer.score(prompts(64, seed=99))
    plain_forward(model, base.tokenizer, prompts(32, seed=99))
    generating_guard(model, base.tokenizer, prompts(8, seed=99))
    scorer.tokens_run = scorer.tokens_padded = 0
    rates: dict[str, list[float]] = {"scorer": [], "transformers": [], "generating_guard": []}
    spent = 0.0
    for turn in range(rounds):
        texts = prompts(rows, seed=turn)
        took = seconds(lambda: scorer.score(texts))  # noqa: B023 - called at once
        spent += took
        rates["scorer"].append(rows / took)
        rates["transformers"].append(rows / seconds(lambda: plain_forward(model, base.tokenizer, texts)))  # noqa: B023
        some = texts[:guard_rows]
        rates["generating_guard"].append(
            guard_rows / seconds(lambda: generating_guard(model, base.tokenizer, some))  # noqa: B023
        )
    middle = {name: statistics.median(values) for name, values in rates.items()}
    peak = matmul_rate(scorer.model.dtype, str(device))
    reached = 2 * matmul_weights(scorer) * scorer.tokens_run / spent
    return {
        "device": str(device),
        "dtype": str(scorer.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rows_per_second": {name: round(value, 1) for name, value in middle.items()},
        "ratio_vs_transformers": round(middle["scorer"] / middle["transformers"], 2),
        "ratio_vs_generating_guard": round(middle["scorer"] / middle["generating_guard"], 2),
        "padding_share": round(scorer.padding_share, 4),
        "matmul_share": round(reached / peak, 3),
        "matmul_flops_reached": reached,
        "matmul_flops_peak": peak,
    }, scorer


def matmul_weights(scorer: TeacherScorer) -> int:
    """Weights that multiply every token: the truncated body without its embedding and without attention scores."""
    embedding = scorer.model.get_input_embeddings().weight
    return sum(weight.numel() for weight in scorer.model.parameters() if weight.dim() == 2) - embedding.numel()


def service_args(teacher: Path) -> ServeArgs:
    """One teacher with all of the machine, which computes every score, and one gateway."""
    return ServeArgs.model_validate(
        {
            "teacher": {"teacher": str(teacher), "cache_texts": 0},
            "teachers": {
                "cpus": os.cpu_count(),
                "gpus": torch.cuda.device_count() and 1,
                "max_ongoing": 64,
                "max_queued": 64,
            },
            "gateways": {"cpus": 0.5, "max_ongoing": 128, "max_queued": 128},
        }
    )


def service_against_scorer(teacher: RefTeacher, scorer: TeacherScorer, rows: int, rounds: int, clients: int) -> Report:
    """The service over HTTP and the scorer in this process, in turns; then single requests from many clients."""
    alone, streamed = [], []
    with local_service(service_args(teacher.folder), PORT) as url, httpx.Client(base_url=url, timeout=600) as client:
        stream(client, prompts(256, seed=98))
        for turn in range(rounds):
            texts = prompts(rows, seed=100 + turn)
            alone.append(rows / seconds(lambda: scorer.score(texts)))  # noqa: B023 - called at once
            streamed.append(rows / seconds(lambda: stream(client, texts)))  # noqa: B023
        single = requests(client, prompts(200, seed=200), 1)
        own = [seconds(lambda: scorer.score([text])) for text in prompts(200, seed=200)]  # noqa: B023
        together = requests(client, prompts(40 * clients, seed=201), clients)
    return {
        "scorer_rows_per_second": round(statistics.median(alone), 1),
        "stream_rows_per_second": round(statistics.median(streamed), 1),
        "stream_vs_scorer": round(statistics.median(streamed) / statistics.median(alone), 3),
        "p50_overhead_ms": round(1000 * (statistics.median(single["latencies"]) - statistics.median(own)), 2),
        "single_client": summary(single, own),
        f"{clients}_clients": summary(together, own),
    }


def stream(client: httpx.Client, texts: list[str]) -> None:
    """Screen rows in one request. Raises RuntimeError unless every row has a verdict."""
    body = b"\n".join(json.dumps({"messages": [{"role": "user", "content": text}]}).encode() for text in texts)
    lines = client.post("/v1/screenings", content=body).text.splitlines()
    trailer = json.loads(lines[-1])
    if not trailer.get("done") or len(lines) != len(texts) + 1:
        raise RuntimeError(f"{len(texts)} rows gave {len(lines)} lines, the last is {lines[-1]}")


def requests(client: httpx.Client, texts: list[str], clients: int) -> Report:
    """Moderate texts one by one from several clients."""

    def one(text: str) -> tuple[float, int]:
        started = time.perf_counter()
        response = client.post("/v1/moderations", json={"input": text})
        return time.perf_counter() - started, response.status_code

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(one, texts))
    took = time.perf_counter() - started
    return {
        "latencies": sorted(latency for latency, status in answers if status == 200),
        "refused": sum(status != 200 for _, status in answers),
        "rate": len(texts) / took,
    }


def summary(measured: Report, own: list[float]) -> Report:
    """Percentiles in milliseconds, and the model's own time."""
    latencies = measured["latencies"]
    return {
        "p50_ms": round(1000 * latencies[len(latencies) // 2], 2),
        "p99_ms": round(1000 * latencies[int(0.99 * (len(latencies) - 1))], 2),
        "rows_per_second": round(measured["rate"], 1),
        "refused": measured["refused"],
        "model_p50_ms": round(1000 * statistics.median(own), 2),
    }


def growth(sizes: list[int]) -> list[Report]:
    """Time and peak memory of the streaming path by number of rows; the word scorer costs almost nothing."""

    async def run(rows: int, scorer: Scorer) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, rows, 500):
                yield b"".join(b'{"text": "Good morning %d"}\n' % n for n in range(start, min(rows, start + 500)))

        screening = VerdictStream(FilterContext(LocalModerator(scorer), FilterSettings(), NullRecorder()), None)
        async for _ in screening.records(chunks()):
            pass
        if screening.tally.answered != rows:
            raise RuntimeError(f"{rows} rows, {screening.tally.answered} verdicts")

    found = []
    for rows in sizes:
        took = seconds(lambda: asyncio.run(run(rows, WordScorer())))  # noqa: B023 - called at once
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        found.append({"rows": rows, "seconds": round(took, 2), "peak_memory_mib": peak})
    return found


def main() -> None:
    """Measure, print, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under five minutes")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="the model's shape")
    parser.add_argument("--without-service", action="store_true", help="the scorer alone, where Ray cannot run")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    options = parser.parse_args()
    rounds, rows, guard_rows, clients = (3, 512, 64, 32) if options.quick else (7, 2048, 256, 32)
    started = time.perf_counter()
    report: Report = {"shape": options.shape, "quick": options.quick, "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as scratch:
        report["growth"] = growth([1000, 10_000, 100_000] if options.quick else [1000, 10_000, 100_000, 1_000_000])
        teacher = save_random_teacher(Path(scratch), options.shape)
        figures, scorer = scorer_against_others(teacher, rounds, rows, guard_rows)
        report |= figures
        if not options.without_service:
            report |= service_against_scorer(teacher, scorer, 4 * rows, rounds, clients)
    report["seconds_total"] = round(time.perf_counter() - started, 1)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
