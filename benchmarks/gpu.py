"""What one GPU does with this code: right numbers, tokens a second, memory, and the filter's share of both.

    PYTHONPATH=. python benchmarks/gpu.py --minutes 4 --out gpu.json     one H100 or H200, no network, nothing to load
    PYTHONPATH=. python benchmarks/gpu.py --smoke                        the same on a CPU, with tiny models

Models have random weights and the shapes of Llama 3.1 8B and of a model of 0.6 billion parameters; rows are random
tokens with lengths as in chat data. The steps are the product's: `core.guided`, `core.optimization`, `hf.training`,
`hf.scorer`. It needs torch, transformers and peft alone. A section that no longer fits the minutes is left out and named.

MFU counts the arithmetic that a LoRA step needs: 2 operations per weight forward and 2 backward (frozen weights have no
gradient), attention within rows, and the head where a token is learned. Recomputed activations do not count.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_models import SHAPES, Setting, Sizes, Trainee, build, restore, rows
from torch import Tensor
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from reft_ray.core import losses
from reft_ray.core.batch import Batch, TokenizedExample, micro_batches
from reft_ray.core.decoding import COMMON_WORDS
from reft_ray.core.geometry import Readout, Readouts
from reft_ray.core.guided import Distillation, guided_step, live_teacher
from reft_ray.core.targets import SoftTargets
from reft_ray.core.verdict import Calibration, Thresholds
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.machine import free_memory, token_bytes
from reft_ray.hf.packing import is_fast
from reft_ray.hf.scorer import TeacherScorer
from reft_ray.hf.tiny import train_tokenizer

DATASHEET_TFLOPS = 989.4
K = 64
GIB = 1 << 30


FULL = Sizes(("8b", "0.6b"), "check", 8192, 16_384, 4, 8192, 4 * GIB, 2048, 128)
SMOKE = Sizes(("tiny",), "tiny", 256, 512, 1, 128, 1 << 20, 16, 4)


class Report:
    """Sections within a budget of time; what is found is printed and written at once."""

    def __init__(self, minutes: float, out: Path | None) -> None:
        self.end, self.out = time.monotonic() + 60 * minutes, out
        self.found: dict[str, Any] = {"skipped": {}}

    def run(self, name: str, seconds: float, measure: Callable[[], Any]) -> Any:
        """Measure, if about `seconds` are left; an error is noted and the next section still runs."""
        left = self.end - time.monotonic()
        if left < seconds:
            self.found["skipped"][name] = f"{left:.0f} s were left"
            return None
        try:
            result = measure()
        except Exception as error:
            self.found["skipped"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            traceback.print_exc()
            result = None
        else:
            self.found[name] = result if isinstance(result, dict) else str(result)
        print(f"{name:44} {describe(result or self.found['skipped'].get(name, ''))}", flush=True)
        if self.out:
            self.out.write_text(json.dumps(self.found, indent=1))
        release()
        return result


def describe(result: Any) -> str:
    """A section's result in one line."""
    if not isinstance(result, dict):
        return str(result)
    return "  ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())


def release() -> None:
    """Give cached memory back, so that the next section's peak is its own."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, run: Callable[[], Any], repeats: int, warm: int = 1) -> list[float]:
    """Seconds of each run, after `warm` others."""
    seconds = []
    for number in range(warm + repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        if number >= warm:
            seconds.append(time.perf_counter() - started)
    return seconds


@contextmanager
def peak(device: torch.device, found: dict[str, Any]) -> Iterator[None]:
    """Note the most memory that tensors took meanwhile."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if device.type == "cuda":
        found["peak GiB"] = torch.cuda.max_memory_allocated(device) / GIB


def cached_labels(vocabulary: int, device: torch.device) -> Callable[[Batch], SoftTargets]:
    """Soft labels as from a file: read on the CPU, moved for the step."""

    def labels(batch: Batch) -> SoftTargets:
        ids_NK = torch.randint(0, vocabulary, (batch.labelled, K), dtype=torch.int32)
        logprobs_NK = torch.full((batch.labelled, K), -float(torch.tensor(K * 1.25).log()))
        return SoftTargets(ids_NK, logprobs_NK, torch.full((batch.labelled,), 0.2)).to(device)

    return labels


def training(
    model: PreTrainedModel, shape: str, sizes: Sizes, setting: Setting, share: float, kind: str, peak_tflops: float
) -> dict[str, Any]:
    """Tokens a second, MFU and memory of one way to train."""
    limits = dict(losses._PART_LOGITS)
    if setting.whole_logits:
        losses._PART_LOGITS.update(dict.fromkeys(limits, 1 << 62))
    try:
        trainee = Trainee(model, shape, sizes, setting)
        labels = live_teacher(trainee.forward) if kind == "live" else cached_labels(SHAPES[shape][5], model.device)
        found: dict[str, Any] = {}
        with peak(model.device, found):
            step = partial(trainee.step, share, Distillation(labels))
            seconds = statistics.median(timed(model.device, step, sizes.steps, warm=3 if setting.compiled else 1))
        tokens = sum(map(len, trainee.user)) * (1 + share)
        rate = trainee.flops(share) / seconds / 1e12
        return {
            "seconds": seconds,
            "tokens/s": tokens / seconds,
            "MFU %": 100 * rate / DATASHEET_TFLOPS,
            "of matmul %": 100 * rate / peak_tflops,
            "packed": trainee.packed,
            **found,
        }
    finally:
        losses._PART_LOGITS.update(limits)
        restore(model)


def check(shape: str, device: torch.device) -> dict[str, Any]:
    """How far gradients and loss are from float32 on padded rows with whole logits."""
    some = rows(700, SHAPES[shape][5], 3, 150)

    def gradient(
        dtype: torch.dtype, packed: bool, part: int | None = None, master: bool = True, recompute: bool = False
    ) -> Tensor:
        limits = dict(losses._PART_LOGITS)
        losses._PART_LOGITS.update(dict.fromkeys(limits, part or 1 << 62))
        try:
            model = build(shape, device, torch.float32, seed=5).to(dtype)
            sizes = Sizes((), "", 256, 700, 1, 0, 0, 0, 0)
            trainee = Trainee(model, shape, sizes, Setting(master, packed, recompute))
            if packed and not trainee.packed:
                raise RuntimeError("the model reads no packed rows")
            torch.manual_seed(9)
            for parameter in trainee.learned:
                if not bool(parameter.detach().any()):
                    parameter.data = (0.02 * torch.randn(parameter.shape)).to(device, parameter.dtype)
            batches, aligned = trainee.batches(some), trainee.batches(some[:2])
            guided_step(trainee.forward, batches, aligned, Distillation(live_teacher(trainee.forward)))
            return torch.cat([p.grad.float().flatten() for p in trainee.learned if p.grad is not None])
        finally:
            losses._PART_LOGITS.update(limits)

    exact = gradient(torch.float32, packed=False)
    narrow = torch.bfloat16
    ways = {
        "float32 packed": gradient(torch.float32, packed=True),
        "float32 in parts": gradient(torch.float32, packed=False, part=50 * SHAPES[shape][5]),
        "float32 recomputed": gradient(torch.float32, packed=False, recompute=True),
        "bf16, float32 adapters, packed": gradient(narrow, packed=True),
        "bf16, float32 adapters, padded": gradient(narrow, packed=False),
        "bf16 adapters, packed": gradient(narrow, packed=True, master=False),
    }
    return {name: float((found - exact).norm() / exact.norm()) for name, found in ways.items()}


def ceilings(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The rates that nothing on this machine exceeds."""
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=dtype) for _ in range(2))
    seconds = statistics.median(timed(device, lambda: [a @ b for _ in range(10)], 5)) / 10
    block = torch.empty(sizes.copy_bytes // 4, device=device)
    copy = statistics.median(timed(device, lambda: block.clone(), 5))
    return {"matmul TFLOP/s": 2 * sizes.matrix**3 / seconds / 1e12, "copy GB/s": 2 * sizes.copy_bytes / copy / 1e9}


def filter_rates(model: PreTrainedModel, shape: str, sizes: Sizes) -> dict[str, Any]:
    """Prompt tokens a second: a whole forward pass, a guard that writes its verdict, and the scorer."""
    device, words = model.device, sorted(COMMON_WORDS)
    tokenizer = train_tokenizer([" ".join(words)] * 50, vocab_size=min(2048, SHAPES[shape][5]), max_positions=4096)
    source = random.Random(0)
    texts = [
        f"{n} {' '.join(source.choices(words, k=min(300, max(3, int(source.lognormvariate(3.2, 0.9))))))}"
        for n in range(sizes.prompts)
    ]
    chat = ChatFormat(tokenizer)
    model.eval()
    found: dict[str, Any] = {}
    layer = max(1, model.config.num_hidden_layers // 2)
    readouts = Readouts({layer: Readout(torch.randn(model.config.hidden_size))})
    fixed = (chat, readouts, "random", Thresholds(0.1, 0.2), Calibration(1.0, 0.0))
    budget = 16_384 if device.type == "cuda" else 1024
    lengths = None

    def whole() -> None:
        for batch in micro_batches(encoded, budget, chat.pad_id, device):
            model.model(input_ids=batch.ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)

    def guard() -> None:
        ids_BT, mask_BT = chat.pad_left([row.ids for row in encoded[: sizes.guard_prompts]], device)
        model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )

    from reft_ray.core.conversation import chat as conversation

    encoded = [
        TokenizedExample(ids, [False] * len(ids), len(ids) - 1) for ids in (chat.prompt(conversation(t)) for t in texts)
    ]
    tokens = sum(map(len, encoded))
    with torch.inference_mode():
        found["forward tokens/s"] = tokens / statistics.median(timed(device, whole, 3))
        lengths = sum(len(row) for row in encoded[: sizes.guard_prompts])
        found["guard of 8 tokens, tokens/s"] = lengths / statistics.median(timed(device, guard, 2))
    scorer = TeacherScorer(model, *fixed, batch_tokens=budget, packed=is_fast(device, model.dtype))
    found["scorer packed"] = float(scorer.packed)
    seconds = statistics.median(timed(device, lambda: scorer.score(texts), 3))
    found["scorer tokens/s"] = tokens / seconds
    found["scorer texts/s"] = len(texts) / seconds
    ids = scorer.prompt_ids(texts)
    found["scorer without tokeniser, tokens/s"] = tokens / statistics.median(
        timed(device, lambda: scorer.score_tokens(ids), 3)
    )
    found["scorer padding %"] = 100 * scorer.padding_share
    found["scorer / forward"] = found["scorer without tokeniser, tokens/s"] / found["forward tokens/s"]
    found["scorer / guard"] = found["scorer without tokeniser, tokens/s"] / found["guard of 8 tokens, tokens/s"]
    return found


def ratios(found: dict[str, Any], shape: str) -> dict[str, float]:
    """Time and memory of guided steps against plain ones."""
    plain = found.get(f"{shape} sft")
    out: dict[str, float] = {}
    for name in ("guided cached 1:4", "guided cached 1:1", "guided live 1:4", "guided live 1:1"):
        guided = found.get(f"{shape} {name}")
        if plain and guided:
            out[f"{name} time"] = guided["seconds"] / plain["seconds"]
            if "peak GiB" in plain:
                out[f"{name} memory"] = guided["peak GiB"] / plain["peak GiB"]
    return out


SETTINGS: dict[str, tuple[Setting, float, str]] = {
    "sft": (Setting(), 0.0, ""),
    "guided cached 1:4": (Setting(), 0.25, "cached"),
    "guided cached 1:1": (Setting(), 1.0, "cached"),
    "guided live 1:4": (Setting(), 0.25, "live"),
    "guided live 1:1": (Setting(), 1.0, "live"),
    "sft, bf16 adapters": (Setting(master=False), 0.0, ""),
    "sft, padded": (Setting(packed=False), 0.0, ""),
    "sft, recomputed": (Setting(recompute=True), 0.0, ""),
    "sft, whole logits": (Setting(whole_logits=True), 0.0, ""),
    "sft, compiled": (Setting(compiled=True), 0.0, ""),
}


def main() -> None:
    """Run every section that fits the minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny models, on the CPU")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("no GPU: torch.cuda.is_available() is False; --smoke runs on the CPU")
    sizes = SMOKE if options.smoke else FULL
    device = torch.device("cpu" if options.smoke else "cuda:0")
    dtype = torch.float32 if options.smoke else torch.bfloat16
    report = Report(options.minutes, options.out)
    report.found["machine"] = {
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        "memory GiB": round(free_memory(device) / GIB, 1),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "sizes": asdict(sizes),
    }
    print(describe(report.found["machine"]))
    top = report.run("ceilings", 5, partial(ceilings, sizes, device, dtype)) or {"matmul TFLOP/s": DATASHEET_TFLOPS}
    report.run("gradients against float32", 10, partial(check, sizes.check, device))
    for shape in sizes.models:
        model = report.run(f"{shape} built", 10, lambda shape=shape: Built(build(shape, device, dtype)))
        if model is None:
            continue
        for name, (setting, share, kind) in SETTINGS.items():
            if options.smoke and setting.compiled:
                # A compiler for the CPU may be absent, and takes a minute.
                continue
            estimate = (60 if setting.compiled else 12) if device.type == "cuda" else 1
            what = (model.model, shape, sizes, setting, share, kind, top["matmul TFLOP/s"])
            report.run(f"{shape} {name}", estimate, partial(training, *what))
        report.run(f"{shape} against sft", 0, partial(ratios, report.found, shape))
        report.run(f"{shape} filter", 20, partial(filter_rates, model.model, shape, sizes))
        del model
        release()
    if report.out:
        report.out.write_text(json.dumps(report.found, indent=1))
    if missing := report.found["skipped"]:
        print("left out:", "; ".join(f"{name} ({why})" for name, why in missing.items()))


class Built:
    """A model as a section's result."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __str__(self) -> str:
        billions = sum(p.numel() for p in self.model.parameters()) / 1e9
        return f"{billions:.2f} billion parameters, {token_bytes(self.model) / 2**20:.2f} MiB a token by estimate"


if __name__ == "__main__":
    main()
