"""Steps a second of servers of the training API, through the `tinker` client over HTTP, in turns.

    python benchmarks/training_servers.py --server NAME,BASE,URL,PID --server NAME,BASE,URL,PID,PYTHON [--sessions 1 4]

The servers run on this machine already, each with all its processes below PID; BASE is the name of SmolLM2-135M-Instruct at
each, and PYTHON an interpreter with the version of the client that a server needs. A step is one forward_backward on `--rows`
dialogues and one optim_step, with LoRA of rank `--rank`; every session has one step in flight. One step before each figure is
not measured: servers make adapters and compile in it. The table has steps a second and, in brackets, processor seconds a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

TEXT = (
    "Please explain in a few plain sentences how the number {} is written in Roman numerals, and where they are used."
)
ANSWER = (
    "The number {} is written with letters that stand for values. Such numerals are on clocks, in books and on stones."
)


def datum(tokenizer: Any, number: int) -> Any:
    """A dialogue whose answer is learned."""
    from tinker import types

    turns = [
        {"role": "user", "content": TEXT.format(number)},
        {"role": "assistant", "content": ANSWER.format(number)},
    ]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    weights = [float(at >= start) for at in range(1, len(ids))]
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": ids[1:], "weights": weights},
    )


def processor(pid: int) -> float:
    """Processor seconds so far of a process and all below it that live."""
    found = psutil.Process(pid)
    return sum(sum(process.cpu_times()[:2]) for process in (found, *found.children(recursive=True)))


class Loops:
    """Sessions of one server."""

    def __init__(self, url: str, base: str, pid: int, sessions: int, rank: int, rows: int) -> None:
        import tinker

        service = tinker.ServiceClient(base_url=url, api_key="tml-none")
        made = [
            service.create_lora_training_client(base_model=base, rank=rank, train_unembed=False)
            for _ in range(sessions)
        ]
        # Newer clients return a future.
        self._models = [model.result() if hasattr(model, "result") else model for model in made]
        self._tokenizer = self._models[0].get_tokenizer()
        self._pid, self._rows, self._done = pid, rows, 0

    def step(self, sessions: int) -> None:
        """One step of each of the first sessions, at once."""
        from tinker import types

        waiting: list[Any] = []
        for model in self._models[:sessions]:
            data = [datum(self._tokenizer, self._done + row) for row in range(self._rows)]
            self._done += self._rows
            waiting.append(model.forward_backward(data, "cross_entropy"))
            waiting.append(model.optim_step(types.AdamParams(learning_rate=1e-4)))
        for answer in waiting:
            answer.result()

    def measured(self, sessions: int, steps: int) -> tuple[float, float]:
        """Steps a second, and processor seconds a step."""
        self.step(sessions)
        begun, before = time.perf_counter(), processor(self._pid)
        for _ in range(steps):
            self.step(sessions)
        done = sessions * steps
        return done / (time.perf_counter() - begun), (processor(self._pid) - before) / done


class Client:
    """Loops in a process of their own."""

    def __init__(self, server: str, options: argparse.Namespace) -> None:
        self.name, base, url, pid, *python = server.split(",")
        command = [*(python or [sys.executable]), __file__, "--loops", base, url, pid]
        command += [str(max(options.sessions)), str(options.rank), str(options.rows)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measured(self, sessions: int, steps: int) -> tuple[float, float]:
        """As `Loops.measured`."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{sessions} {steps}\n")
        self._process.stdin.flush()
        rate, seconds = json.loads(self._process.stdout.readline())
        return rate, seconds


def main() -> None:
    """Measure, print a table, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="append", default=[], metavar="NAME,BASE,URL,PID[,PYTHON]")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--loops", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loops:
        base, url, *numbers = options.loops
        loops = Loops(url, base, *map(int, numbers))
        for line in sys.stdin:
            print(json.dumps(loops.measured(*map(int, line.split()))), flush=True)
        return
    clients = [Client(server, options) for server in options.server]
    found: dict[str, dict[int, list[tuple[float, float]]]] = {
        client.name: {sessions: [] for sessions in options.sessions} for client in clients
    }
    for _ in range(options.rounds):
        for sessions in options.sessions:
            for client in clients:
                rate, seconds = client.measured(sessions, options.steps)
                found[client.name][sessions].append((rate, seconds))
                print(f"{client.name}, {sessions}: {rate:.2f} steps/s, {seconds:.2f} processor seconds", flush=True)
    print("\n| sessions | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for sessions in options.sessions:
        cells = []
        for figures in found.values():
            rates, seconds = zip(*figures[sessions], strict=True)
            cells.append(f"{statistics.median(rates):.2f} ({statistics.median(seconds):.2f})")
        print(f"| {sessions} | " + " | ".join(cells) + " |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
