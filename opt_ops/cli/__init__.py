"""The command `opt-ops`. Each module holds one noun; heavy libraries are imported by the commands that need them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from opt_ops import __version__
from opt_ops.cli import (
    alerts,
    check,
    chronicle,
    ckpt,
    doctor,
    drill,
    init,
    ledger,
    live,
    node,
    parts,
    playbook,
    replay,
    run,
    service,
    signals,
    steer,
)
from opt_ops.cli.common import ConfigOption, FormatOption, HeaderOption, settings
from opt_ops.errors import OptOpsError
from opt_ops.render import Format

app = typer.Typer(
    name="opt-ops",
    help="Supervises training runs: sees what goes wrong, recovers by playbooks, proves it, writes the logbook.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
app.add_typer(run.app, name="run")
run.app.command("watch")(live.watch)
run.app.command("logs")(live.logs)
app.add_typer(ckpt.app, name="ckpt")
app.add_typer(node.app, name="node")
app.add_typer(chronicle.logbook, name="logbook")
app.add_typer(chronicle.mlflow, name="mlflow")
app.add_typer(service.daemon, name="daemon")
app.add_typer(drill.app, name="drill")
app.add_typer(alerts.app, name="alerts")
app.add_typer(signals.app, name="signals")
app.add_typer(playbook.app, name="playbook")
app.command("q")(run.queue)
app.command("events")(run.events)
app.command("ledger")(ledger.ledger)
app.command("replay")(replay.replay)
app.command("init")(init.init)
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    config: ConfigOption = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    settings.config_path = config
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        run.queue()


def main() -> None:
    """Run the command; a mistake of the user's or the world's is a message and an exit code, never a traceback."""
    try:
        app()
    except OptOpsError as error:
        print(f"opt-ops: {error}", file=sys.stderr)
        if error.hint:
            print(f"  next: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


__all__ = ["Format", "FormatOption", "HeaderOption", "app", "check", "main", "parts", "steer"]
