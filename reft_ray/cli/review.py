"""`reft-ray review`: list withheld rows and decide about them, in a directory or in a job of a service."""

from __future__ import annotations

import getpass
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reft_ray.cli.common import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    UrlOption,
    print_json,
    recording,
    user_errors,
)
from reft_ray.cli.remote_review import decide, is_job, list_job, review_client, text_of
from reft_ray.core.errors import UsageError

_SCREENING_OF_A_JOB = re.compile(r"/jobs/[^/]+/scratch/")

app = typer.Typer(no_args_is_help=True, help="Review withheld rows.")

OutArgument = Annotated[
    str, typer.Argument(help="The output directory of a screening, or a job of a service, ftjob-...")
]
RowsArgument = Annotated[list[int], typer.Argument(help="Row numbers from the list.")]
ReasonOption = Annotated[str, typer.Option(help="The reason; it is recorded with the decision.")]
ReviewerOption = Annotated[
    str | None, typer.Option(help="Who decides about a directory [default: the user logged in]; a job's key says it.")
]
CodeOption = Annotated[str, typer.Option(help="In a job: the reason's code, see `/v1/reviews/codes`.")]
DuplicatesOption = Annotated[bool, typer.Option("--duplicates", help="In a job: also about near-duplicates.")]


@app.command("list")
def list_rows(
    out: OutArgument,
    show: Annotated[Literal["pending", "decided", "all"], typer.Option(help="Which rows.")] = "pending",
    limit: Annotated[int, typer.Option(min=1, help="The most rows to print.")] = 50,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
    as_json: JsonOption = False,
) -> None:
    """List withheld rows with their evidence, without their text."""
    if is_job(out):
        with review_client(url, key) as client:
            list_job(client, out, show, limit, as_json)
        return
    with user_errors():
        from itertools import islice

        from reft_ray.screening.reviews import Reviews

        reviews = Reviews(out)
        summary = reviews.summary()
        rows = list(islice(reviews.items({"pending": False, "decided": True, "all": None}[show]), limit))
        if as_json:
            print_json({"summary": _summary(summary), "rows": rows})
            return
        _print_rows(rows)
        rate = (
            "" if summary.overturn_rate is None else f"; {summary.overturn_rate:.1%} of the decisions were overturned"
        )
        print(
            f"{summary.withheld} withheld: {summary.pending} pending, {summary.approved} approved, "
            f"{summary.rejected} rejected{rate}"
        )


@app.command()
def show(
    out: OutArgument,
    row: Annotated[int, typer.Argument(help="A row number from the list.")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
    as_json: JsonOption = False,
) -> None:
    """Show one withheld row with its text, which may be disturbing."""
    if is_job(out):
        with review_client(url, key) as client:
            found = text_of(client, out, row)
            if as_json:
                print_json(found)
                return
            for name in ("row", "line", "decision", "reason", "part", "encoding", "score", "state"):
                print(f"{name}: {found[name]}")
            for part in found["text"]["parts"]:
                print(f"\n{part['name']}:\n{_printable(part['text'])}")
                for reading in part["decoded"]:
                    print(f"decoded ({reading['encoding']}):\n{_printable(reading['text'])}")
        return
    with user_errors():
        from reft_ray.core.conversation import parts
        from reft_ray.rows.text import conversation_from
        from reft_ray.screening.reviews import Reviews

        item = Reviews(out).item(row)
        if as_json:
            print_json(item)
            return
        for name in ("row_number", "source", "line", "decision", "reason", "part", "encoding", "score", "probability"):
            print(_printable(f"{name}: {item[name]}"))
        for each in parts(conversation_from(item["messages"])):
            print(f"\n{each.name}:\n{_printable(each.text)}")
        if item["review"]:
            print(f"\n{item['review']['action']} by {item['review']['reviewer']}: {item['review']['reason']}")


@app.command()
def approve(
    out: OutArgument,
    rows: RowsArgument,
    reason: ReasonOption,
    reviewer: ReviewerOption = None,
    code: CodeOption = "other_harmless",
    duplicates: DuplicatesOption = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
) -> None:
    """Overturn the filter's decision: the rows are added to the kept ones, with their provenance."""
    if is_job(out):
        _decide_in_job(out, rows, "approve", code, reason, duplicates, url, key)
    else:
        _decide(out, rows, "approve", reason, reviewer)


@app.command()
def reject(
    out: OutArgument,
    rows: RowsArgument,
    reason: ReasonOption,
    reviewer: ReviewerOption = None,
    code: CodeOption = "other_harmful",
    duplicates: DuplicatesOption = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
) -> None:
    """Confirm that rows stay withheld."""
    if is_job(out):
        _decide_in_job(out, rows, "reject", code, reason, duplicates, url, key)
    else:
        _decide(out, rows, "reject", reason, reviewer)


@app.command("next")
def next_row(
    job: Annotated[str, typer.Argument(help="A job of a service, ftjob-...")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
    as_json: JsonOption = False,
) -> None:
    """Reserve the row of a job that is nearest to its limit, for ten minutes, and print it without its text."""
    with review_client(url, key) as client:
        found = client.claim(job=job)
        if as_json:
            print_json(found)
        elif found is None:
            print("no row is free")
        else:
            print(
                f"row {found['row']}: {found['decision']}, {found['reason']}; show it with "
                f"`reft-ray review show {job} {found['row']}`"
            )


@app.command()
def export(out: OutArgument, to: Annotated[Path, typer.Option(help="A new JSONL file.")]) -> None:
    """Write reviewed rows with text and label, as training data for the next teacher."""
    with user_errors():
        from reft_ray.screening.reviews import Reviews

        if to.exists():
            raise UsageError(f"{to} exists; name a new file")
        rows = list(Reviews(out).export())
        to.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{len(rows)} decided rows written to {to}")


def _decide(out: str, rows: list[int], action: str, reason: str, reviewer: str | None) -> None:
    with user_errors():
        from reft_ray.screening.reviews import Action, Reviews

        if _SCREENING_OF_A_JOB.search(out):
            raise UsageError(f"{out}: rows of a job are decided through the service: name the job, ftjob-...")
        with recording() as recorder:
            made = Reviews(out, recorder).decide(rows, Action(action), reviewer or getpass.getuser(), reason)
        print(f"{len(made)} rows: {action} by {made[0].reviewer}")


def _decide_in_job(
    job: str, rows: list[int], action: str, code: str, reason: str, duplicates: bool, url: str, key: str
) -> None:
    with review_client(url, key) as client:
        for row in decide(client, job, rows, action, code, reason, duplicates):
            print(f"row {row['row']}: {row['state']}")


def _summary(summary: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(summary)


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("row", "decision", "score", "part", "reason", "decided by", "review"):
        table.add_column(name, justify="right" if name in ("row", "score") else "left")
    for row in rows:
        review = row["review"]
        outcome = f"{review['action']} by {review['reviewer']}" if review else "pending"
        score = f"{row['score']:.3f}"
        table.add_row(
            str(row["row_number"]), row["decision"], score, row["part"], row["reason"], row["decided_by"], outcome
        )
    Console().print(table)


def _printable(text: str) -> str:
    """Text without control characters, which could drive the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
