"""The method on real public rows with a small pretrained base: `python benchmarks/small_base.py --rows ../shared`.

Reads `data/teacher`, `data/dev`, `data/attacks`, `data/tasks` and `models/base-7m` below --rows, none of which the
repository carries, and writes Markdown and JSON. Sources that steer layer, stop and thresholds are held out of the
teacher's training rows; nothing is chosen on `data/dev` or on the evaluation prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from reft_ray.core.conversation import Example, Label
from reft_ray.experiments.chain import respond_with, scorer_of, screen_rows, train_cell
from reft_ray.experiments.evaluate import evaluate_student
from reft_ray.experiments.quickstart import STUDENTS
from reft_ray.experiments.real_rows import short, teacher_config, teacher_rows, user_rows
from reft_ray.finetuning.cluster import start_ray
from reft_ray.finetuning.config import FinetuneConfig, Resources
from reft_ray.finetuning.prompts import read_labelled
from reft_ray.finetuning.teacher_quality import measure
from reft_ray.finetuning.trainer import prepare_teacher
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.testbed.rows import write_chat_rows

EVALUATED = 300


def students(data: Path, base: Path, teacher: RefTeacher, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every student of the quickstart's table, on real rows."""
    user = user_rows(data, arguments.n, arguments.harmful_ratio, arguments.seed)
    out.mkdir(parents=True, exist_ok=True)
    write_chat_rows(out / "user.jsonl", user)
    screened = screen_rows(out / "user.jsonl", user, teacher, out / "screened", str(base))
    provided = teacher_rows(data)
    alignment = [row for row in (*provided.train, *provided.answers) if row.answered]
    random.Random(arguments.seed).shuffle(alignment)
    refusals = [row for row in alignment if row.label is Label.HARMFUL][:1000]
    helpful = [row for row in alignment if row.label is Label.HARMLESS][:1000]
    harmful = short(read_labelled(data / "attacks/hs_prompts.jsonl"))
    harmless = short(read_labelled(data / "attacks/over_refusal_prompts.jsonl"))
    test = read_labelled(data / "tasks/sst2_dev.jsonl", Label.HARMLESS)
    table = {}
    for name, student in STUDENTS.items():
        config = FinetuneConfig.of(
            {
                "base": str(base),
                "method": student.method,
                "init": student.init,
                "epochs": 3,
                "max_tokens": 192,
                "alignment_ratio": 1.0,
                "optimizer": {"learning_rate": 3e-3},
                "seed": arguments.seed,
            }
        )
        rows = user if student.poisoned else [row for row in user if row.label is Label.HARMLESS]
        cell = train_cell(
            config, rows, screened, refusals + helpful, teacher, out / name, Resources(workers=1, cpus_per_worker=2)
        )
        respond = respond_with(str(base), cell.student, 24)
        figures = evaluate_student(
            respond, *(some(rows, arguments.seed) for rows in (harmful, harmless, test)), seed=arguments.seed
        )
        dropped = screened.dropped if student.method.filters else dict.fromkeys(Label, 0)
        table[name] = {**figures, "rows": cell.rows, "dropped": dict(dropped), "seconds": round(cell.seconds)}
        print(name, {k: v for k, v in table[name].items() if k != "intervals"}, flush=True)
    return table


def some(rows: Sequence[Example], seed: int) -> list[Example]:
    """At most EVALUATED rows, of all sources alike."""
    return random.Random(seed).sample(list(rows), min(EVALUATED, len(rows)))


def markdown(report: dict[str, Any]) -> str:
    """The report as the documentation shows it."""
    overall = report["dev"]["overall"]
    lines = [
        "# Real rows, small base",
        "",
        f"Made by `{report['command']}` in {report['seconds']:.0f} s; the base is a 7 M-parameter Llama, seed {report['seed']}.",
        "",
        "## The filter on sources that it never saw",
        "",
        f"Overall AUROC **{overall['auroc']:.3f}**, AUPRC {overall['auprc']:.3f}, recall {overall['recall_at_1_fpr']:.3f} at 1 %"
        f" FPR ({overall['rows']} rows, {overall['harmful']} harmful); layer {report['layer']}. The refusal feature is that of"
        " the base model, over training prompts of other sources; the sources that steer layer and thresholds are held out of it as well."
        " For comparison, on the same rows: TF-IDF with logistic regression 0.869 and recall 0.21 when it learns from all"
        " sources, 0.828 when the same ones are held out; MiniLM sentence embeddings (22 M parameters, trained on a"
        " billion pairs) with logistic regression 0.889 and 0.23.",
        "",
        "| source | rows | harmful | AUROC | recall at 1 % FPR | blocked |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['rows']} | {row['harmful']} | {row['auroc']:.3f} | {row['recall_at_1_fpr']:.3f} | {row['blocked']:.3f} |"
        for name, row in report["dev"]["sources"].items()
    ]
    lines += ["", "A source of one label is ranked against all rows of the other label.", ""]
    if report.get("students"):
        lines += [
            f"## Students: SST-2, n = {report['n']}, harmful ratio {report['harmful_ratio']}",
            "",
            "| method | HS % | FA % | over-refusal % | look-alikes refused % | incoherent % | harmful dropped | harmless dropped | s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in report["students"].items():
            figures = [
                f"{row[key]:.1f} ({row['intervals'][key][0]:.1f}-{row['intervals'][key][1]:.1f})"
                for key in ("harmful_score", "finetune_accuracy", "over_refusal", "look_alikes_refused")
            ]
            lines.append(
                f"| {name} | {' | '.join(figures)} | {row['incoherent']:.1f} | {row['dropped']['harmful']} |"
                f" {row['dropped']['harmless']} | {row['seconds']} |"
            )
        lines += [
            "",
            "Look-alikes: harmless prompts that read like harmful ones; over-refusal counts the task's prompts as well.",
            "Brackets: 95 % bootstrap intervals over prompts. HS by the refusal matcher, greedy, 24 tokens.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="folder with data/ and models/base-7m")
    parser.add_argument("--work", type=Path, default=Path("out/small-base"))
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--teacher", type=Path, help="a teacher of an earlier run, in place of training one")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--harmful-ratio", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", type=json.loads, default={}, help="TeacherConfig keys as JSON")
    parser.add_argument("--filter-only", action="store_true")
    arguments = parser.parse_args()
    started = time.perf_counter()
    data, base = arguments.rows / "data", arguments.rows / "models/base-7m"
    config = teacher_config(base, arguments.epochs, {"seed": arguments.seed, **arguments.set})
    last = 0.0

    def tell(metrics: Any) -> None:
        nonlocal last
        if time.perf_counter() - last > 20:
            last = time.perf_counter()
            print({k: round(v, 3) for k, v in metrics.items() if isinstance(v, float | int)}, flush=True)

    if arguments.teacher:
        teacher = RefTeacher.load(arguments.teacher)
    else:
        out = arguments.work / "teacher"
        teacher = prepare_teacher(config, teacher_rows(data), out, Resources(workers=0), progress=tell)
    report: dict[str, Any] = {
        "command": f"python benchmarks/small_base.py --rows {arguments.rows}",
        "seed": arguments.seed,
        "n": arguments.n,
        "harmful_ratio": arguments.harmful_ratio,
        "layer": teacher.manifest.layer,
        "teacher": teacher.id,
        "dev": measure(scorer_of(teacher.folder, str(base), "float32"), read_labelled(data / "dev/prompts.jsonl")),
    }
    print(report["dev"]["overall"], teacher.manifest.config["sweep_auroc"], flush=True)
    if not arguments.filter_only:
        start_ray()
        report["students"] = students(data, base, teacher, arguments.work, arguments)
    report["seconds"] = time.perf_counter() - started
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(report))


if __name__ == "__main__":
    main()
