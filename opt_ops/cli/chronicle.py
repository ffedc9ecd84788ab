"""`opt-ops logbook …` and `opt-ops mlflow …`: what people read, drawn from the journal."""

from __future__ import annotations

import os
import sys
import webbrowser
from typing import Annotated

import typer

from opt_ops import lineages
from opt_ops.cli.common import FormatOption, IdArgument, QuietOption, lineage_folder, settings
from opt_ops.errors import NotFound
from opt_ops.render import Column, Format, say, show

logbook = typer.Typer(no_args_is_help=True, help="The logbook.")
mlflow = typer.Typer(no_args_is_help=True, help="The chronicle in MLflow.")


@logbook.command()
def render(identifier: IdArgument, output: FormatOption = Format.TABLE, quiet: QuietOption = False) -> None:
    """Draw logbook.md, logbook.html and report.json anew from the journal and the telemetry.

    Example: opt-ops logbook render 12
    """
    from chronicles.logbook import render as draw

    rows = [{"path": str(path)} for path in draw(lineage_folder(identifier))]
    if not quiet:
        show("opt-ops/logbook/1", rows, [Column("PATH", "path")], output, header=False)


@logbook.command("open")
def open_(identifier: IdArgument) -> None:
    """Open the logbook in a browser; without a screen, print where it is.

    Example: opt-ops logbook open 12
    """
    path = lineage_folder(identifier) / "chronicle" / "logbook.html"
    if not path.exists():
        raise NotFound(f"no logbook at {path}", f"opt-ops logbook render {identifier}")
    print(path)
    if sys.stdout.isatty() and (os.environ.get("DISPLAY") or sys.platform == "darwin"):
        webbrowser.open(path.as_uri())


@mlflow.command()
def sync(
    identifier: Annotated[str, typer.Argument(metavar="[ID]", help="Lineage. [default: all of them]")] = "",
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Mirror lineages into MLflow: a parent run for each, a child run for each of its runs. Doing it again adds
    only news.

    Example: opt-ops mlflow sync 12
    """
    from chronicles.mlflow_sync import sync as mirror

    config = settings.config
    paths = [lineage_folder(identifier)] if identifier else lineages.folders(config.runs)
    experiment = config.mlflow.experiment
    rows = [{"lineage": p.name, "summary": mirror(p, config.tracking_uri, experiment)} for p in paths]
    if not quiet:
        show("opt-ops/mlflow-sync/1", rows, [Column("LINEAGE", "lineage"), Column("SENT", "summary")], output)
    say("  next: opt-ops mlflow open", quiet)


@mlflow.command("open")
def serve(
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = 5000,
) -> None:
    """Serve MLflow's pages for the configured store, until Ctrl-C.

    Example: opt-ops mlflow open --port 5001
    """
    from chronicles.mlflow_sync import serve_command

    config = settings.config
    command, environment = serve_command(config.tracking_uri, config.runs, port)
    say(f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning  (Ctrl-C ends it)")
    os.execvpe(command[0], command, {**os.environ, **environment})  # noqa: S606  (no shell: a list of arguments)
