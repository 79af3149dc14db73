"""`reft-ray keys`: API keys of the service."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from reft_ray.cli.common import DEFAULT_DATABASE, DatabaseOption, JsonOption, open_database, print_json, user_errors
from reft_ray.core.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="Create, list and revoke API keys of the service.")

_UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}


@app.command()
def create(
    organization: Annotated[str, typer.Option("--org", help="The organisation; created if it is new.")] = "default",
    project: Annotated[str, typer.Option(help="The project; created if it is new.")] = "default",
    name: Annotated[str, typer.Option(help="A description of the key.")] = "key",
    scope: Annotated[list[str] | None, typer.Option(help="Can be repeated; default: all scopes of the role.")] = None,
    role: Annotated[
        str,
        typer.Option(help="owner, curator, lead, operator or auditor; all but owner see every project."),
    ] = "owner",
    expires: Annotated[str | None, typer.Option(help="Lifetime such as 12h, 90d or 8w; default: unlimited.")] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="A limit of the project, e.g. requests_per_minute=60; can be repeated. Other limits stay."),
    ] = None,
    database: DatabaseOption = DEFAULT_DATABASE,
    as_json: JsonOption = False,
) -> None:
    """Create a key and print its secret once; only its hash is stored."""
    with user_errors(), open_database(database) as records:
        from reft_ray.jobs.tenants import Tenants

        lifetime, limits = _seconds(expires), _limits(limit or [])
        key, secret = Tenants(records).create_key(organization, project, name, scope or None, lifetime, limits, role)
        if as_json:
            print_json({"id": key.id, "project_id": key.project_id, "secret": secret, "expires_at": key.expires_at})
        else:
            print(f"{key.id} for project {key.project_id} in {records.name}; the secret is shown only once:\n{secret}")


@app.command("list")
def list_keys(database: DatabaseOption = DEFAULT_DATABASE, as_json: JsonOption = False) -> None:
    """List all keys, without their secrets."""
    with user_errors(), open_database(database) as records:
        from dataclasses import asdict

        from reft_ray.jobs.tenants import Tenants

        tenants = Tenants(records)
        found = tenants.list_keys()
        if as_json:
            print_json([{"organization": org, "project": project, **asdict(key)} for org, project, key in found])
            return
        now = tenants.database.now()
        for org, project, key in found:
            ended = key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now)
            until = "" if key.expires_at is None else f" until {_date(key.expires_at)}"
            state = "revoked" if key.revoked_at is not None else "expired" if ended else f"valid{until}"
            print(f"{key.id}  {key.hint}  {org}/{project}  {key.name}  {key.role}  {state}")
        print(f"{len(found)} keys in {records.name}", file=sys.stderr)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id, key_...")], database: DatabaseOption = DEFAULT_DATABASE
) -> None:
    """Revoke a key with immediate effect."""
    with user_errors(), open_database(database) as records:
        from reft_ray.jobs.tenants import Tenants

        print(f"{Tenants(records).revoke(key).id} is revoked in {records.name}")


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)([hdw])", text)
    if match is None:
        raise UsageError(f"--expires {text!r}: write hours, days or weeks, e.g. 12h, 90d, 8w")
    return float(match[1]) * _UNITS[match[2]]


def _limits(items: list[str]) -> dict[str, int]:
    limits = {}
    for item in items:
        name, _, value = item.partition("=")
        if not value.isdecimal():
            raise UsageError(f"--limit {item!r}: write NAME=NUMBER, e.g. requests_per_minute=60")
        limits[name] = int(value)
    return limits


def _date(seconds: float) -> str:
    # Older versions created keys that expire after the year 9999, which datetime cannot represent.
    last = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
    return datetime.fromtimestamp(min(seconds, last), UTC).strftime("%Y-%m-%d %H:%M UTC")
