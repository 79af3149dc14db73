"""`reft-ray review`: list withheld rows and decide about them."""

from __future__ import annotations

import getpass
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reft_ray.cli.common import JsonOption, print_json, recording, user_errors
from reft_ray.core.errors import UsageError

_SCREENING_OF_A_JOB = re.compile(r"/jobs/[^/]+/scratch/")

app = typer.Typer(no_args_is_help=True, help="Review withheld rows.")

OutArgument = Annotated[str, typer.Argument(help="The output directory of a screening.")]
RowsArgument = Annotated[list[int], typer.Argument(help="Row numbers from the list.")]
ReasonOption = Annotated[str, typer.Option(help="The reason; it is recorded with the decision.")]
ReviewerOption = Annotated[str | None, typer.Option(help="Who decides [default: the user logged in].")]


@app.command("list")
def list_rows(
    out: OutArgument,
    show: Annotated[Literal["pending", "decided", "all"], typer.Option(help="Which rows.")] = "pending",
    limit: Annotated[int, typer.Option(min=1, help="The most rows to print.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List withheld rows with their evidence, without their text."""
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
    as_json: JsonOption = False,
) -> None:
    """Show one withheld row with its text, which may be disturbing."""
    with user_errors():
        from reft_ray.core.conversation import parts
        from reft_ray.rows.text import conversation_from
        from reft_ray.screening.reviews import Reviews

        item = Reviews(out).item(row)
        if as_json:
            print_json(item)
            return
        for name in ("row_number", "source", "line", "decision", "reason", "part", "encoding", "score", "probability"):
            print(f"{name}: {item[name]}")
        for part in parts(conversation_from(item["messages"])):
            print(f"\n{part.name}:\n{_printable(part.text)}")
        if item["review"]:
            print(f"\n{item['review']['action']} by {item['review']['reviewer']}: {item['review']['reason']}")


@app.command()
def approve(out: OutArgument, rows: RowsArgument, reason: ReasonOption, reviewer: ReviewerOption = None) -> None:
    """Overturn the filter's decision: the rows are added to the kept ones, with their provenance."""
    _decide(out, rows, "approve", reason, reviewer)


@app.command()
def reject(out: OutArgument, rows: RowsArgument, reason: ReasonOption, reviewer: ReviewerOption = None) -> None:
    """Confirm that rows stay withheld."""
    _decide(out, rows, "reject", reason, reviewer)


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

        # A job counts the decisions about its rows itself when it resumes.
        with nullcontext() if _SCREENING_OF_A_JOB.search(out) else recording() as recorder:
            made = Reviews(out, recorder).decide(rows, Action(action), reviewer or getpass.getuser(), reason)
        print(f"{len(made)} rows: {action} by {made[0].reviewer}")


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
