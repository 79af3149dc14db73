"""`reft-ray gateway`: screen training files and chat in front of a service with OpenAI's API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from reft_ray.cli.common import user_errors
from reft_ray.cli.screen import CombineName

FILTER = "Filter"


def gateway(
    upstream: Annotated[str, typer.Option(help="The other service, with /v1, e.g. https://api.together.xyz/v1.")],
    state: Annotated[Path, typer.Option(help="A directory for the evidence of screened files.")],
    teacher: Annotated[
        str, typer.Option(help="The Ref-Teacher's directory, or `builtin`.", rich_help_panel=FILTER)
    ] = "builtin",
    base: Annotated[
        str | None,
        typer.Option(help="The base model, if it is not at the path that the teacher records.", rich_help_panel=FILTER),
    ] = None,
    guard: Annotated[
        list[str] | None, typer.Option(help="As for `reft-ray screen`; repeatable.", rich_help_panel=FILTER)
    ] = None,
    guard_combine: Annotated[
        CombineName,
        typer.Option(help="How the verdicts are combined.", rich_help_panel=FILTER),
    ] = "any",
    policy: Annotated[
        Literal["filter", "fail"],
        typer.Option(help="Forward the kept rows of a file, or refuse a file with others.", rich_help_panel=FILTER),
    ] = "filter",
    max_reject_ratio: Annotated[
        float, typer.Option(help="Refuse a file above this share of withheld rows.", rich_help_panel=FILTER)
    ] = 0.5,
    upstream_key: Annotated[
        str | None, typer.Option(help="Use this key upstream instead of the client's, as env:NAME.")
    ] = None,
    client_key: Annotated[str | None, typer.Option(help="The key that clients then need, as env:NAME.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
) -> None:
    """Forward OpenAI's finetuning and chat calls to another service, screened.

    Training files are forwarded without the withheld rows, chat is judged before and after the model. What is not
    judged is not forwarded.
    """
    with user_errors():
        import uvicorn

        from reft_ray.api.auth import check_bind
        from reft_ray.api.filter_app import freeze_startup
        from reft_ray.api.guarded import GuardedModerator, LocalGuard
        from reft_ray.api.moderator import LocalModerator
        from reft_ray.evaluation.endpoint import key_of
        from reft_ray.guards.settings import CascadeSettings, guard_from, load_guards
        from reft_ray.hf.ref_teacher import RefTeacher
        from reft_ray.proxy.app import create_proxy, gate_of
        from reft_ray.proxy.upstream import ProxySettings
        from reft_ray.teachers import teacher_folder

        settings = ProxySettings.of(
            {
                "upstream": upstream,
                "state": str(state),
                "policy": policy,
                "max_reject_ratio": max_reject_ratio,
                "upstream_key": upstream_key and key_of(upstream_key, "upstream"),
                "client_key": client_key and key_of(client_key, "client"),
            },
            "gateway",
        )
        gate = gate_of(settings)
        check_bind(host, gate is not None and not gate.keyless(), "name the key of your clients with --client-key")
        cascade = CascadeSettings.of({"guards": [guard_from(text) for text in guard or []], "combine": guard_combine})
        moderator = GuardedModerator(
            LocalModerator(RefTeacher.load(teacher_folder(teacher)).scorer(base)),
            [LocalGuard(found) for found in load_guards(cascade.guards)],
            cascade.combine,
        )
        app = create_proxy(moderator, settings, gate=gate)
        freeze_startup()
        typer.echo(f"Screening for {upstream} on http://{host}:{port}/v1 (Ctrl-C stops it)")
        uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)
