"""`reft-ray`: all commands by noun. Heavy imports happen when a command runs."""

from __future__ import annotations

import os
import sys
import warnings

import typer

from reft_ray.cli import (
    adapter,
    appeals,
    audit,
    bench,
    files,
    jobs,
    keys,
    manifests,
    migrate,
    models,
    review,
    teacher,
    telemetry,
)
from reft_ray.cli.audit import evidence
from reft_ray.cli.evaluate import evaluate
from reft_ray.cli.finetune import finetune
from reft_ray.cli.gateway import gateway
from reft_ray.cli.quickstart import quickstart
from reft_ray.cli.screen import screen
from reft_ray.cli.serve import serve
from reft_ray.cli.tune import tune
from reft_ray.cli.validate import validate
from reft_ray.openmp import spin_briefly

app = typer.Typer(
    name="reft-ray",
    help="Finetuning as a service that stays safe: Ref-Teacher filtering and guided finetuning on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("quickstart")(quickstart)
app.command("validate")(validate)
app.command("screen")(screen)
app.command("finetune")(finetune)
app.command("tune")(tune)
app.command("eval")(evaluate)
app.command("serve")(serve)
app.command("gateway")(gateway)
app.command("estimate")(jobs.estimate)
app.command("evidence")(evidence)
app.add_typer(teacher.app, name="teacher")
app.add_typer(models.app, name="models")
app.add_typer(adapter.app, name="adapter")
app.add_typer(bench.app, name="bench")
app.add_typer(review.app, name="review")
app.add_typer(appeals.app, name="appeals")
app.add_typer(appeals.releases, name="releases")
app.add_typer(jobs.app, name="jobs")
app.add_typer(files.app, name="files")
app.add_typer(keys.app, name="keys")
app.add_typer(audit.app, name="audit")
app.add_typer(telemetry.app, name="telemetry")
app.add_typer(manifests.app, name="manifests")
app.add_typer(migrate.app, name="migrate")


def main() -> None:
    """The console script; sets what libraries read on import."""
    # Deprecation warnings of libraries do not concern users of this command and of the processes that it starts.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ["PYTHONWARNINGS"] = "ignore"
    spin_briefly()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Commands start Ray themselves: a late Ray call after an interrupt must not start a second cluster.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    app()
