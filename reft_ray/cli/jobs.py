"""`reft-ray jobs`: finetuning jobs of a running service, with a cost estimate before the start."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_ray.cli.common import DEFAULT_URL, JsonOption, KeyOption, UrlOption, print_json, running_service

if TYPE_CHECKING:
    from reft_ray.api.remote import Remote

app = typer.Typer(no_args_is_help=True, help="Create, watch and control finetuning jobs of a running service.")

JobArgument = Annotated[str, typer.Argument(help="The job's id, ftjob-...")]
ModelOption = Annotated[str, typer.Option(help="The base model.")]
FileOption = Annotated[str, typer.Option("--file", help="The training file's id, file-...")]
EpochsOption = Annotated[
    int | None, typer.Option(min=1, max=50, help="Passes over the rows; default: chosen by the service.")
]
BatchOption = Annotated[int | None, typer.Option(min=1, max=256, help="Rows per step; default: chosen by the service.")]

ENDED = ("succeeded", "failed", "cancelled")


def estimate(
    model: ModelOption,
    file: FileOption,
    epochs: EpochsOption = None,
    batch_size: BatchOption = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
    as_json: JsonOption = False,
) -> None:
    """Estimate a job's tokens, steps, time and device hours from the measured speed of the service's devices."""
    with running_service(url, key) as service:
        found = service.post("/fine_tuning/jobs/estimate", json=_body(model, file, epochs, batch_size))
        print_json(found) if as_json else print(_cost(found))


@app.command()
def create(
    model: ModelOption,
    file: FileOption,
    validation_file: Annotated[str | None, typer.Option(help="The validation file's id.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the new model's name.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of a reproducible run.")] = None,
    epochs: EpochsOption = None,
    batch_size: BatchOption = None,
    policy: Annotated[str, typer.Option(help="Handling of flagged rows: filter, review or fail.")] = "filter",
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Create the job without showing the cost and asking.")
    ] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
    as_json: JsonOption = False,
) -> None:
    """Show a job's estimated cost, ask for confirmation, and create it."""
    body = _body(model, file, epochs, batch_size)
    optional = {"validation_file": validation_file, "suffix": suffix, "seed": seed}
    body |= {name: value for name, value in optional.items() if value is not None}
    with running_service(url, key) as service:
        if not yes:
            print(_cost(service.post("/fine_tuning/jobs/estimate", json=body)))
            typer.confirm("Create the job?", abort=True)
        job = service.post("/fine_tuning/jobs", json=body | {"reft": {"policy": policy}})
        print_json(job) if as_json else print(job["id"])


@app.command("list")
def list_jobs(url: UrlOption = DEFAULT_URL, key: KeyOption = "none", as_json: JsonOption = False) -> None:
    """List the project's jobs, newest first."""
    with running_service(url, key) as service:
        jobs = list(service.pages("/fine_tuning/jobs", limit=100))
        if as_json:
            print_json(jobs)
            return
        for job in jobs:
            print(f"{job['id']}  {job['status']:<16}  {job['model']}  {job['fine_tuned_model'] or ''}")


@app.command()
def show(job: JobArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = "none") -> None:
    """Print a job as JSON."""
    with running_service(url, key) as service:
        print_json(service.get(f"/fine_tuning/jobs/{job}"))


@app.command()
def watch(
    job: JobArgument,
    seconds: Annotated[float, typer.Option(min=0.1, help="Polling interval.")] = 2.0,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
) -> None:
    """Print a job's events until it ends. Exit codes: 3 for unsafe data, 4 for the gate, 1 for any other failure."""
    with running_service(url, key) as service:
        record = _follow(service, job, seconds)
        if record["status"] != "succeeded":
            code = record["error"]["code"] if record["error"] else ""
            raise typer.Exit({"unsafe_training_data": 3, "unsafe_model": 4}.get(code, 1))


@app.command()
def cancel(job: JobArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = "none") -> None:
    """Cancel a job; it cannot be resumed."""
    _verb(job, "cancel", url, key)


@app.command()
def pause(job: JobArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = "none") -> None:
    """Save a job's state and release its devices."""
    _verb(job, "pause", url, key)


@app.command()
def resume(job: JobArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = "none") -> None:
    """Resume a paused job."""
    _verb(job, "resume", url, key)


def _verb(job: str, verb: str, url: str, key: str) -> None:
    with running_service(url, key) as service:
        print(f"{job} is {service.post(f'/fine_tuning/jobs/{job}/{verb}')['status']}")


def _follow(service: Remote, job: str, seconds: float) -> Any:
    """Print events until the job has ended; returns the ended job."""
    seen: set[str] = set()
    while True:
        record = service.get(f"/fine_tuning/jobs/{job}")
        for event in _unseen(service, job, seen):
            print(f"{event['level']:<5} {event['message']}", flush=True)
        if record["status"] in ENDED:
            return record
        time.sleep(seconds)


def _unseen(service: Remote, job: str, seen: set[str]) -> list[dict[str, Any]]:
    fresh = []
    for event in service.pages(f"/fine_tuning/jobs/{job}/events", limit=100):
        if event["id"] in seen:
            break
        fresh.append(event)
    seen.update(event["id"] for event in fresh)
    return fresh[::-1]


def _body(model: str, file: str, epochs: int | None, batch_size: int | None) -> dict[str, Any]:
    hyperparameters = {
        name: value for name, value in (("n_epochs", epochs), ("batch_size", batch_size)) if value is not None
    }
    return {
        "model": model,
        "training_file": file,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    }


def _cost(found: dict[str, Any]) -> str:
    about = "" if found["exact_tokens"] else "about "
    text = f"{found['rows']:,} rows, {about}{found['trained_tokens']:,} tokens to train, {found['steps']:,} steps"
    cost = found.get("cost")
    price = f"; {cost['amount']:,.2f} {cost['currency']}" if cost else ""
    if found["seconds"] is None:
        return f"{text}; no speed was measured for this model{price}"
    time = f"{found['seconds'] / 60:,.1f} minutes, {found['device_hours']:.2f} device hours, without the queue"
    return f"{text}; {time}{price}"
