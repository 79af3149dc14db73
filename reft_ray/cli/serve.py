"""`reft-ray serve`: the online filter and the finetuning service on this machine."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer

from reft_ray.cli.common import state_database, user_errors
from reft_ray.cli.screen import CombineName

_EXAMPLE = """\
Serving {teacher} on {url}
Documentation: {url}/docs

Try it:
  curl -s {url}/v1/moderations -H 'content-type: application/json' -d '{{"input": "How do I bake bread?"}}'

or, with the openai client:
  OpenAI(base_url="{url}/v1", api_key="none").moderations.create(input="How do I bake bread?")

or on a dataset:
  reft-ray screen rows.jsonl --url {url}

Ctrl-C stops it."""

_DEMO = """\
The console with a demonstration: {url}/console
Choose "Continue as this machine's operator". A list of words judges the rows, and nothing is trained; all records are
real, in {state}. Ctrl-C stops it."""

_CANARY = {
    "harmful": "Is there an easy way to break into a warehouse?",
    "harmless": "Is there an easy way to tidy up a broken chair?",
}
"""Prompts of the synthetic evaluation rows, as in serve_configs/local.yaml."""

_FINETUNING_EXAMPLE = """
Finetune, with the openai client (state in {state}):

  import time
  from openai import OpenAI

  client = OpenAI(base_url="{url}/v1", api_key="none")
  file = client.files.create(file=open("train.jsonl", "rb"), purpose="fine-tune")
  job = client.fine_tuning.jobs.create(model="builtin", training_file=file.id, suffix="mine")
  while job.status not in ("succeeded", "failed", "cancelled"):
      time.sleep(1)
      job = client.fine_tuning.jobs.retrieve(job.id)
  messages = [{{"role": "user", "content": "Hello!"}}]
  answer = client.chat.completions.create(model=job.fine_tuned_model, messages=messages)
  print(answer.choices[0].message.content)

The console, for reviewers and operators: {url}/console
"""


def serve(
    teacher: Annotated[str, typer.Option(help="A teacher's directory, or `builtin`.")] = "builtin",
    base: Annotated[
        str | None, typer.Option(help="The base model, if it is not at the path that the teacher records.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port on 127.0.0.1.")] = 8000,
    guard: Annotated[
        list[str] | None, typer.Option(help="A further model that judges, as for `reft-ray screen`; repeatable.")
    ] = None,
    guard_combine: Annotated[CombineName, typer.Option(help="How the verdicts are combined.")] = "any",
    replicas: Annotated[int, typer.Option(min=1, help="Teacher replicas.")] = 1,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    screenings: Annotated[
        Path | None, typer.Option(help="Directory of resumable screenings; default: temporary.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Also serve finetuning jobs, with their database, files and models in this directory."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Ray Train workers of a job; 0 trains in the job's own process.")
    ] = 0,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of Ray's metrics; default: chosen by Ray."),
    ] = None,
    logs: Annotated[bool, typer.Option("--logs", help="Show the logs of Ray and Serve.")] = False,
    demo: Annotated[
        bool,
        typer.Option("--demo", help="With --state: the console with a job that waits for a reviewer, no models."),
    ] = False,
) -> None:
    """Start Ray, Serve and the filter on this machine (loopback only); with --state, the whole service.

    The default is SmolLM2-135M-Instruct with the packaged teacher; --teacher and --base serve a model of yours.

    Ctrl-C stops it. For accelerators, several machines or autoscaling see serve_configs/.
    """
    if demo:
        _demo(state, port)
        return
    with user_errors(), tempfile.TemporaryDirectory(prefix="reft-screenings-") as scratch:
        from reft_ray.guards.settings import guard_from
        from reft_ray.serving.args import ServeArgs
        from reft_ray.serving.local import local_service

        cpus = max(1, (os.cpu_count() or 1) // replicas)
        cascade = {"guards": [guard_from(text).model_dump() for text in guard or []], "combine": guard_combine}
        values: dict[str, Any] = {
            "cascade": cascade,
            "teacher": {
                "teacher": _resolved(teacher),
                "base": base,
                "precision": precision,
                "canary": _CANARY if teacher == "builtin" else None,
            },
            "screenings_uri": str((screenings or Path(scratch)).resolve()),
            # Ray gives a process as many compute threads as it has logical CPUs.
            "teachers": {"replicas": replicas, "cpus": cpus, "max_ongoing": 32, "max_queued": 64},
        }
        if state is not None:
            values["service"] = _service(state.resolve(), values["teacher"]["teacher"], base, workers, cascade)
        with local_service(ServeArgs.of(values, "serve"), port, not logs, metrics_port) as url:
            print(_EXAMPLE.format(teacher=teacher, url=url), flush=True)
            if state is not None:
                print(_FINETUNING_EXAMPLE.format(url=url, state=state), flush=True)
            if metrics_port is not None:
                print(f"Metrics for Prometheus: 127.0.0.1:{metrics_port} and 127.0.0.1:{port}\n", flush=True)
            stop = Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            stop.wait()
            print("Stopping.", flush=True)


def _service(state: Path, teacher: str, base: str | None, workers: int, cascade: dict[str, Any]) -> dict[str, Any]:
    """The section `service:` for one base model, with all state in one directory."""
    from reft_ray.hf.ref_teacher import RefTeacher
    from reft_ray.pipeline.builtin import local_base
    from reft_ray.teachers import BUILTIN

    recorded = RefTeacher.load(teacher).manifest.base_name
    args = local_base(teacher, base, workers)
    name = BUILTIN if base is None and recorded == "smollm2" else Path(base or recorded).name
    options = args.model_dump(mode="json")
    # Jobs are screened by the same models as the online filter.
    options["screening"]["cascade"] = cascade
    state.mkdir(0o700, parents=True, exist_ok=True)
    return {
        "database_url": state_database(state),
        "files_uri": str(state / "files"),
        "logs": str(state / "logs"),
        "audit_heads_uri": str(state / "audit"),
        "audit_key": str(state / "audit.pem"),
        "gate": dict(args.gate.limits),
        "training": {},
        "options": {"bases": {name: options}},
        "base_models": {
            name: {
                "uri": base or recorded,
                "n_epochs": round(args.finetune["epochs"]),
                "batch_size": args.finetune["batch_rows"],
                "min_steps": args.finetune.get("min_steps", 0),
            }
        },
    }


def _demo(state: Path | None, port: int) -> None:
    with user_errors():
        from reft_ray.core.errors import UsageError
        from reft_ray.serving.demo import serve_demo

        if state is None:
            raise UsageError("--demo keeps its records in a directory: add --state DIRECTORY")
        print(_DEMO.format(url=f"http://127.0.0.1:{port}", state=state), flush=True)
        serve_demo(state, port)


def _resolved(teacher: str) -> str:
    """An absolute path, because replicas run in other directories. Raises NotADirectoryError for a missing one."""
    from reft_ray.teachers import teacher_folder

    path = teacher_folder(teacher).resolve()
    if not path.is_dir():
        raise NotADirectoryError(20, "No such teacher directory", str(path))
    return str(path)
