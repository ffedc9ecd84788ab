"""`opt-ops logbook …` and `opt-ops mlflow …`: what people read, drawn from the journal."""

from __future__ import annotations

import math
import os
import re
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ops.cli.shared.extras import require
from opt_ops.cli.shared.options import (
    DryRunOption,
    FormatOption,
    IdArgument,
    OptionalIdArgument,
    QuietOption,
    YesOption,
    leave_if_unreadable,
    lineage_folder,
    settings,
    site_lineages,
    watch_now,
)
from opt_ops.cli.shared.output import Column, Format, say, show, signs_of_life
from opt_ops.cli.shared.views import UNREADABLE, by_lineage, lineage_row
from opt_ops.core.state.queries import total_steps
from opt_ops.errors import NotFound, Refused, Unavailable, UsageError
from opt_ops.runfolder import lineages
from opt_ops.runfolder.files import write_text

if TYPE_CHECKING:
    from chronicles.logbook.notes.handover import Live
    from chronicles.mlflow_mirror.pages import Store
    from opt_ops.core.decide.policy import Policy
    from opt_ops.core.state.model import State

PORT = 5000  # of MLflow's pages on this machine

logbook = typer.Typer(no_args_is_help=True, help="Draw and read the logbook.")
mlflow = typer.Typer(no_args_is_help=True, help="Mirror lineages into MLflow, and serve its pages.")


@logbook.command()
def render(identifier: IdArgument, output: FormatOption = Format.TABLE, quiet: QuietOption = False) -> None:
    """Draw the logbook and report.json again.

    They come from the journal and the telemetry.

    Example: opt-ops logbook render 12
    """
    from chronicles.logbook.render import render as draw

    folder = lineage_folder(identifier)
    with signs_of_life(f"drawing the logbook of lineage {folder.name}", quiet=quiet):
        rows = [{"path": str(path)} for path in draw(folder, settings.config.ledger)]
    if not quiet:
        show("opt-ops/logbook/1", rows, [Column("PATH", "path")], output, header=False)


@logbook.command()
def update(
    identifier: IdArgument,
    at: Annotated[str, typer.Option(help="Share of all steps, such as 27%. [default: what is trained]")] = "",
    since: Annotated[str, typer.Option(help="Share of the previous note. [default: the last one written]")] = "",
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Write a progress note: what happened since the last one. OPT-175B had notes at 10, 27 and 56 %.

    The note is printed, and kept beside the logbook as update-27.md. A note for an earlier share uses only what was
    known then.

    Examples:
      opt-ops logbook update 12 --at 27%
      opt-ops logbook update 12 --at 56% --since 27%
    """
    from chronicles.kept_curve import kept_points
    from chronicles.logbook.notes import update as note
    from chronicles.logbook.render import FOLDER
    from chronicles.record import load

    path = lineage_folder(identifier)
    record = load(path)
    steps = total_steps(record.state)
    trained = max((point.step for _, point in kept_points(record.curves)), default=0)
    share = _share(at) if at else math.floor(100 * trained / steps) / 100 if steps else 0.0
    kept = [float(found[1]) / 100 for p in (path / FOLDER).glob("update-*.md") if (found := _UPDATE.fullmatch(p.name))]
    before = _share(since) if since else max((each for each in kept if each < share), default=0.0)
    if before >= share:
        raise UsageError(f"--since {100 * before:g}% is not before --at {100 * share:g}%", "give an earlier --since")
    try:
        found = note.update(record, share, before, settings.config.ledger)
    except ValueError as error:
        raise Refused(str(error), f"opt-ops run show {path.name}") from error
    file = path / FOLDER / f"update-{100 * share:g}.md"
    text = note.update_text(found)
    write_text(file, text)
    if output in (Format.JSON, Format.JSONL):
        show("opt-ops/update/1", [note.row(found)], [Column("LINEAGE", "lineage")], output)
    else:
        print(text, end="")
    say(f"Kept as {file}.", quiet)


_UPDATE = re.compile(r"update-([\d.]+)\.md")


def _share(text: str) -> float:
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?) ?%?", text)
    if match is None or not 0 <= float(match[1]) <= 100:
        raise UsageError(f"{text}: not a share of all steps, from 0 to 100 %", "for example 27%")
    return float(match[1]) / 100


@logbook.command()
def handover(
    identifier: IdArgument,
    hours: Annotated[float, typer.Option(min=0.1, help="Hours to report, up to now.")] = 12.0,
    output: FormatOption = Format.TABLE,
) -> None:
    """Print a note for the next shift.

    It says what needs the next shift, what comes tonight, and what was done in the last hours.

    Notes and reasons are quoted. Whatever a drill caused says DRILL.

    Example: opt-ops logbook handover 12 --hours 8
    """
    from chronicles.logbook.notes import handover as note
    from chronicles.logbook.notes.handover_text import handover_text
    from chronicles.record import load

    path = lineage_folder(identifier)
    record = load(path)
    found = note.handover(record, hours, settings.config.ledger, _live(path, record.state), _policy())
    if output in (Format.JSON, Format.JSONL):
        show("opt-ops/handover/1", [note.row(found)], [Column("LINEAGE", "lineage")], output)
    else:
        print(handover_text(found), end="")


def _live(path: Path, state: State) -> Live:
    """What is known of a lineage beyond its journal and telemetry."""
    from chronicles.logbook.notes.handover import Live

    watch = watch_now()
    row = lineage_row(path, state, watch)
    sign = watch.over(path.name).sign
    return Live(
        now=watch.now,
        status=row["shown"],
        why=row["reason"],
        watched=row["watched"],
        watcher=sign.name if sign else "",
    )


def _policy() -> Policy:
    from opt_ops import playbook_loader

    return playbook_loader.load(settings.config.playbooks or playbook_loader.folder())[0]


@logbook.command("publish")
def publish(
    identifier: IdArgument,
    to: Annotated[Path, typer.Option(help="Folder for logbook.md, logbook.html and report.json.")],
    redact: Annotated[bool, typer.Option("--redact", help="Replace names, addresses, paths; leave out notes.")] = False,
    keep: Annotated[str, typer.Option(help="What is not replaced: nodes, people, jobs, with commas.")] = "",
    with_notes: Annotated[
        bool, typer.Option("--with-notes", help="Keep notes, reasons and log lines; names in them are replaced.")
    ] = False,
    replace: Annotated[
        list[str] | None, typer.Option(metavar="REGEX=TEXT", help="Replace this, too. May be given several times.")
    ] = None,
    shift_days: Annotated[int, typer.Option(help="Move all times by so many days.", show_default=False)] = 0,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Write a logbook without names, and check it.

    What was replaced is kept in the run's chronicle folder, for its owner alone. Publishing again uses the same names.
    If anything that should have been replaced is still in a file, nothing is kept and the exit code is 1.

    Examples:
      opt-ops logbook publish 12 --redact --to public --dry-run
      opt-ops logbook publish 12 --redact --to public --keep jobs
    """
    from opt_ops.cli.logbook.publish import Options, publish_logbook

    options = Options(
        redact=redact, keep=keep, with_notes=with_notes, replace=tuple(replace or ()), shift_days=shift_days
    )
    publish_logbook(lineage_folder(identifier), to, options, yes=yes, dry_run=dry_run, output=output, quiet=quiet)


@logbook.command("open")
def open_(identifier: IdArgument) -> None:
    """Open the logbook in a browser, and print its path.

    Example: opt-ops logbook open 12
    """
    path = lineage_folder(identifier) / "chronicle" / "logbook.html"
    if not path.exists():
        raise NotFound(f"there is no logbook at {path}", f"opt-ops logbook render {identifier}")
    print(path)
    if sys.stdout.isatty() and (os.environ.get("DISPLAY") or sys.platform == "darwin"):
        webbrowser.open(path.as_uri())


@mlflow.command()
def sync(
    identifier: OptionalIdArgument = "",
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Mirror lineages into MLflow.

    A lineage is a parent run, each of its runs a child run.

    A second sync adds only what is new. It prints the pages of the lineages, and last the page of the experiment.
    Without ID, the exit code is 5 if a lineage cannot be read.

    Example: opt-ops mlflow sync 12
    """
    require("mlflow", "MLflow", "mlflow")
    from chronicles.mlflow_mirror.store import is_server
    from chronicles.mlflow_mirror.sync import sync as mirror

    config = settings.config
    paths = [lineage_folder(identifier)] if identifier else site_lineages()
    experiment = config.mlflow.experiment
    unavailable: list[Unavailable] = []

    def send(path: Path) -> dict[str, Any]:
        try:
            with signs_of_life(f"mirroring lineage {path.name}", quiet=quiet):
                sent = {"lineage": path.name, "summary": mirror(path, config.tracking_uri, experiment, config.ledger)}
        except Unavailable as error:  # MLflow does not answer: that is no fault of this lineage
            unavailable.append(error)
            raise
        return sent

    unreadable: dict[str, str] = {}
    if identifier:
        rows = [send(paths[0])]
    else:
        rows, unreadable = by_lineage(paths, send)
        if unavailable:
            raise unavailable[0]
    rows += [{"lineage": name, "summary": f"{UNREADABLE}: {why}"} for name, why in unreadable.items()]
    if output in (Format.TABLE, Format.WIDE):
        for row in rows:
            say(f"{row['lineage']}: {row['summary']}", quiet)
        if not quiet:
            _print_pages(_sent(paths))
        if not is_server(config.tracking_uri):
            say("  next: opt-ops mlflow open", quiet)
    elif not quiet:
        show("opt-ops/mlflow-sync/1", rows, [Column("LINEAGE", "lineage"), Column("SENT", "summary")], output)
    leave_if_unreadable(unreadable)


@mlflow.command()
def link(identifier: IdArgument) -> None:
    """Print the addresses of a lineage's pages in MLflow.

    The first is the lineage's run, the second the saved view of all lineages of the experiment. A
    store that is no server is served by `opt-ops mlflow open`.
    The lineage must have been sent before: `opt-ops mlflow sync`.

    Example: opt-ops mlflow link 12
    """
    _print_pages([lineage_folder(identifier)])


def store() -> Store:
    """The site's store of MLflow."""
    from chronicles.mlflow_mirror.pages import Store

    return Store(uri=settings.config.tracking_uri, experiment=settings.config.mlflow.experiment)


def _sent(paths: Sequence[Path]) -> list[Path]:
    """Those that are in MLflow: a lineage without a journal is not."""
    from chronicles.mlflow_mirror.pages import was_sent

    mirrored = store()
    return [path for path in paths if was_sent(path, mirrored)]


def _print_pages(paths: Sequence[Path], port: int = PORT) -> None:
    """Print the pages of the lineages, and last that of their experiment."""
    from chronicles.mlflow_mirror.pages import experiment_page, lineage_page

    mirrored = store()
    for path in paths:
        print(lineage_page(path, mirrored, port))
    for path in paths[-1:]:
        print(experiment_page(path, mirrored, port))


@mlflow.command("open")
def serve(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = PORT,
) -> None:
    """Serve MLflow's pages for the configured store, until Ctrl-C.

    It prints the page of the newest lineage first, and that of its experiment.

    Example: opt-ops mlflow open --port 5001
    """
    require("mlflow", "MLflow", "mlflow")
    from chronicles.mlflow_mirror.store import serve_command

    config = settings.config
    command, environment = serve_command(config.tracking_uri, config.runs, port)
    _print_pages(_sent(lineages.folders(config.runs))[-1:], port)
    sys.stdout.flush()
    say(f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning  (Ctrl-C ends it)")
    os.execvpe(command[0], command, {**os.environ, **environment})  # noqa: S606  (no shell: a list of arguments)
