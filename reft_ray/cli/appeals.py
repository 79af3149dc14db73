"""`reft-ray appeals` and `reft-ray releases`: what owners ask again, and models that wait for signatures."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from reft_ray.cli.common import DEFAULT_URL, JsonOption, KeyOption, UrlOption, print_json
from reft_ray.cli.remote_review import review_client

app = typer.Typer(no_args_is_help=True, help="Appeal withheld rows and models, and answer appeals.")
releases = typer.Typer(no_args_is_help=True, help="Sign or refuse models that failed the release gate.")

NoteOption = Annotated[str, typer.Option(help="Why; it is recorded.")]
JobArgument = Annotated[str, typer.Argument(help="The job's id, ftjob-...")]


@app.command()
def create(
    note: NoteOption,
    review: Annotated[str | None, typer.Option(help="The withheld row's id, review_...")] = None,
    job: Annotated[str | None, typer.Option(help="The job whose model was withheld, ftjob-...")] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
) -> None:
    """Appeal a withheld row, or the release gate of a job, as its owner."""
    with review_client(url, key) as client:
        print(client.appeal(note, review, job)["id"])


@app.command("list")
def list_appeals(
    state: Annotated[Literal["open", "granted", "denied"] | None, typer.Option(help="Which appeals.")] = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
    as_json: JsonOption = False,
) -> None:
    """List appeals, newest first."""
    with review_client(url, key) as client:
        found = list(client.appeals(state=state))
        if as_json:
            print_json(found)
            return
        for appeal in found:
            print(
                f"{appeal['id']}  {appeal['state']:<8}  {appeal['review'] or appeal['job']}  {appeal['answer'] or ''}"
            )


@app.command()
def answer(
    appeal: Annotated[str, typer.Argument(help="The appeal's id, appeal_...")],
    text: Annotated[str, typer.Option("--answer", help="The answer to the owner.")],
    grant: Annotated[bool, typer.Option("--grant/--deny", help="Grant or deny it.")],
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = "none",
) -> None:
    """Answer an appeal; granting one of a row approves the row."""
    with review_client(url, key) as client:
        print(f"{appeal} is {client.answer(appeal, grant, text)['state']}")


@releases.command("list")
def list_releases(url: UrlOption = DEFAULT_URL, key: KeyOption = "none", as_json: JsonOption = False) -> None:
    """List models that failed the gate and were put before people."""
    with review_client(url, key) as client:
        found = client.releases()
        if as_json:
            print_json(found)
            return
        for item in found:
            print(f"{item['job']}  {item['state']}  {item['signed_by'] or ''}  {item['decided_by'] or ''}")


@releases.command()
def sign(job: JobArgument, note: NoteOption, url: UrlOption = DEFAULT_URL, key: KeyOption = "none") -> None:
    """Sign a release; the second person's signature lets the job continue."""
    with review_client(url, key) as client:
        _print(client.sign(job, note))


@releases.command()
def refuse(job: JobArgument, note: NoteOption, url: UrlOption = DEFAULT_URL, key: KeyOption = "none") -> None:
    """Refuse a release; the job then fails."""
    with review_client(url, key) as client:
        _print(client.refuse(job, note))


def _print(release: dict[str, Any]) -> None:
    print(f"{release['job']} is {release['state']}")
