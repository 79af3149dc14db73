"""Speed and memory of dataset screening, compared with a plain loop and with reading only, for growing files.

    python benchmarks/screening.py [--quick] [--json FILE]

Rows are short chat rows and the scorer counts words, so that everything but the model is measured. `--cost`
adds a fixed time per text to the scorer, as a model would.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.json as pj

from reft_ray.core.scoring import TextScore, judge
from reft_ray.rows.format import Format
from reft_ray.rows.layout import conversation_of
from reft_ray.rows.reader import validate
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.ranges import Limits
from reft_ray.screening.reading import groups, plan_files, read_units
from reft_ray.screening.sources import find_sources
from reft_ray.testbed.word_scorer import WordScorer

WORDS = ["river", "garden", "window", "market", "teacher", "letter", "engine"]
WORDS += ["bridge", "forest", "kitchen", "castle", "planet", "violin", "harbor"]


class CostlyScorer(WordScorer):
    """A word scorer that is busy for `seconds` per text."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        """One TextScore per text."""
        until = time.perf_counter() + self._seconds * len(texts)
        scores = super().score(texts)
        while time.perf_counter() < until:
            pass
        return scores


def write_rows(path: Path, rows: int, row_bytes: int = 0) -> None:
    """Distinct chat rows of at least `row_bytes`, short if that is 0; every 50th of them is harmful."""
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            words = " ".join(WORDS[(index // 14**place) % 14] for place in range(8))
            prompt = f"{'How do I build a bomb' if index % 50 == 0 else 'Tell me about'} {words} {index}"
            answer = f"It is {words} {index}."
            answer += f" {words}" * -(-max(0, row_bytes - 180) // (len(words) + 1))
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain_loop(path: Path, scorer: WordScorer, decode: Any) -> None:
    """A program without the library: parse, judge in batches, write the allowed lines."""
    out = path.with_suffix(".kept")
    with path.open("rb") as file, out.open("wb") as kept:
        while lines := [line for _, line in zip(range(256), file, strict=False)]:
            rows = [conversation_of(json.loads(line), Format.CHAT) for line in lines]
            for line, verdict in zip(lines, judge(scorer, rows, decode=decode), strict=True):
                if verdict.decision == "allow":
                    kept.write(line)
    out.unlink()


def read_only(path: Path) -> None:
    """Plan and read all units without scoring."""
    for plan in plan_files(find_sources([str(path)]), Limits()):
        for ranges in groups(plan):
            for _ in read_units(plan, ranges):
                pass


@contextmanager
def fresh(folder: Path) -> Iterator[str]:
    """A temporary output directory."""
    out = folder / "out"
    yield str(out)
    shutil.rmtree(out, ignore_errors=True)


def throughput(folder: Path, rows: int, cost: float) -> list[dict[str, Any]]:
    """Rows per second of each way to screen the same file; starting Ray is not measured."""
    from reft_ray.core.decoding import readings
    from reft_ray.local_ray import ensure_ray

    path = folder / "rows.jsonl"
    write_rows(path, rows)
    factory = functools.partial(CostlyScorer, cost)
    results = [
        {"way": "pyarrow.json.read_json", "seconds": seconds_of(lambda: pj.read_json(path))},
        {"way": "our reader alone", "seconds": seconds_of(lambda: read_only(path))},
        {"way": "plain loop", "seconds": seconds_of(lambda: plain_loop(path, factory(), readings))},
    ]
    ways: list[tuple[str, dict[str, Any]]] = [
        ("screen, in process", {"small_rows": rows}),
        ("screen, in process, no findings", {"small_rows": rows, "findings": False}),
        ("screen, Ray, 1 actor, no findings", {"small_rows": 0, "actors": 1, "findings": False}),
        ("screen, Ray, 2 actors, no findings", {"small_rows": 0, "actors": 2, "findings": False}),
        ("screen, Ray, 2 actors", {"small_rows": 0, "actors": 2}),
        ("screen, in process, threshold of the dataset", {"small_rows": rows, "job_threshold": True}),
        ("screen, Ray, 2 actors, threshold of the dataset", {"small_rows": 0, "actors": 2, "job_threshold": True}),
    ]
    ensure_ray()
    for way, options in ways:
        with fresh(folder) as out:
            config = ScreenConfig(**{"job_threshold": False} | options)
            run = functools.partial(screen, [str(path)], out, factory, config)
            results.append({"way": way, "seconds": seconds_of(run)})
    return [
        result | {"rows": rows, "cost_us_per_text": cost * 1e6, "rows_per_second": round(rows / result["seconds"])}
        for result in results
    ]


def validation_speed(folder: Path) -> dict[str, Any]:
    """MB/s of processor time on one core, with and without a search for control tokens."""
    path = folder / "valid.jsonl"
    write_rows(path, 100_000)
    raw = path.read_bytes()
    speeds = {}
    for name, tokens in (("plain", ()), ("control tokens", ("<|im_start|>", "<|im_end|>", "<s>", "</s>"))):
        start = time.process_time()
        problems = validate(raw, control_tokens=tokens)
        speeds[name] = round(len(raw) / 1e6 / (time.process_time() - start), 1)
        if problems:
            raise SystemExit(f"valid rows were refused: {problems[0]}")
    return {"mb": round(len(raw) / 1e6, 1), "mb_per_second": speeds}


class PeakMemory(threading.Thread):
    """Samples a process and its children: the highest sum of private memory, and the highest shared memory."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._stopped = threading.Event()
        self.private = self.shared = self.largest = 0

    def run(self) -> None:
        """Sample until stopped."""
        while not self._stopped.wait(0.5):
            private, shared, largest = 0, 0, 0
            try:
                for process in (self._process, *self._process.children(recursive=True)):
                    try:
                        memory = process.memory_full_info()
                    except psutil.Error:
                        continue
                    private += memory.uss
                    largest = max(largest, memory.uss)
                    shared = max(shared, memory.shared)
            except psutil.Error:
                return
            self.private, self.shared = max(self.private, private), max(self.shared, shared)
            self.largest = max(self.largest, largest)

    def stop(self) -> None:
        """Stop sampling."""
        self._stopped.set()
        self.join()


def memory(folder: Path, rows: int, row_bytes: int) -> dict[str, Any]:
    """Peak memory of a whole run in a separate process tree, Ray included."""
    path = folder / f"rows-{rows}.jsonl"
    write_rows(path, rows, row_bytes)
    command = [sys.executable, __file__, "--one", str(path), str(folder / "out")]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        watch = PeakMemory(psutil.Process(child.pid))
        watch.start()
        code = child.wait()
        watch.stop()
    if code:
        raise SystemExit(f"the run over {rows} rows failed with {code}")
    result = {
        "rows": rows,
        "file_mb": round(path.stat().st_size / 1e6, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_private_mb": round(watch.private / 1e6),
        "peak_largest_process_mb": round(watch.largest / 1e6),
        "peak_shared_mb": round(watch.shared / 1e6),
    }
    shutil.rmtree(folder / "out", ignore_errors=True)
    path.unlink()
    return result


def one(path: str, out: str) -> None:
    """One run on Ray with one actor: the process whose memory is sampled."""
    screen([path], out, WordScorer, ScreenConfig(small_rows=0, actors=1))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, about a minute")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--cost", type=float, default=0.0005, help="seconds of work per text in the throughput part")
    parser.add_argument("--rows", type=int, help="rows of the throughput part")
    parser.add_argument("--memory-rows", type=int, nargs="*", help="file sizes of the memory part")
    parser.add_argument("--row-bytes", type=int, default=0, help="smallest row of the memory part")
    parser.add_argument("--no-throughput", action="store_true", help="the memory part alone")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    if options.one:
        one(*options.one)
        return
    rows = options.rows or (4_000 if options.quick else 40_000)
    sizes = [10_000, 30_000] if options.quick else [10_000, 100_000, 1_000_000]
    if options.memory_rows is not None:
        sizes = options.memory_rows
    results: dict[str, Any] = {"machine": {"cores": os.cpu_count(), "python": platform.python_version()}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["validation"] = validation_speed(folder)
        print("validation", results["validation"], flush=True)
        results["memory"] = []
        for size in sizes:
            results["memory"].append(memory(folder, size, options.row_bytes))
            print("memory", results["memory"][-1], flush=True)
        costs = () if options.no_throughput else (0.0, options.cost)
        results["throughput"] = [result for cost in costs for result in throughput(folder, rows, cost)]
        for result in results["throughput"]:
            print(
                f"{result['way']:36} cost {result['cost_us_per_text']:5.0f} us {result['rows_per_second']:>10,} rows/s"
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
