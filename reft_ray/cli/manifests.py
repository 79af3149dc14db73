"""`reft-ray manifests`: Kubernetes manifests that embed other files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_ray.cli.common import user_errors

app = typer.Typer(help="Render and check Kubernetes manifests.", no_args_is_help=True)

RootOption = Annotated[Path, typer.Option(help="A checkout of the project.")]


@app.command()
def render(root: RootOption = Path()) -> None:
    """Write the manifests that embed pods, a Serve config, dashboards or rules."""
    with user_errors():
        from reft_ray.serving import manifests

        for path in manifests.write(root):
            print(path)


@app.command()
def chart(root: RootOption = Path()) -> None:
    """Write the documents of the Helm chart from the overlays; needs kubectl."""
    with user_errors():
        from reft_ray.serving import chart

        for path in chart.write(root):
            print(path)


@app.command()
def config(file: Annotated[Path, typer.Argument(help="A Serve config, such as serve_configs/service.yaml.")]) -> None:
    """Validate a Serve config strictly; Serve itself ignores unknown keys."""
    with user_errors():
        import yaml

        from reft_ray.core.errors import UsageError
        from reft_ray.serving.strict import check_serve_config

        try:
            document = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise UsageError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
        if not isinstance(document, dict):
            raise UsageError(f"{file} is not a Serve config: it must be a mapping with keys such as `applications`")
        if found := check_serve_config(document):
            raise UsageError("\n".join(f"{file}: {line}" for line in found))
        print(f"{file} is valid")


@app.command()
def schema() -> None:
    """Print the JSON schema of a Serve config, for editors that complete and check YAML."""
    with user_errors():
        import json

        from reft_ray.pipeline.steps import StepsConfig
        from reft_ray.serving.strict import config_schema

        print(json.dumps(config_schema(StepsConfig), indent=2))


@app.command()
def check(root: RootOption = Path()) -> None:
    """Check that manifests match their sources and that all Serve configs are valid; writes no file."""
    with user_errors():
        import yaml

        from reft_ray.core.errors import ReftError
        from reft_ray.serving import manifests
        from reft_ray.serving.strict import check_serve_config

        found = [
            f"{name} does not match its sources: run `reft-ray manifests render`" for name in manifests.stale(root)
        ]
        for name, text in manifests.rendered(root).items():
            for document in yaml.safe_load_all(text):
                config = document.get("spec", {}).get("serveConfigV2")
                if config is not None:
                    found += [f"cluster/{name}: {line}" for line in check_serve_config(yaml.safe_load(config))]
        if found:
            raise ReftError("\n".join(found))
        print("manifests are up to date")
