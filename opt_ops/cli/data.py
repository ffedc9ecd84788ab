"""`opt-ops data …`: the documents that an update was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opt_ops.cli.shared.options import (
    FormatOption,
    HeaderOption,
    IdArgument,
    Lineage,
    QuietOption,
    complete_attempt,
    find_lineage,
    require_known,
    settings,
)
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.cli.trainer import questions as trainer_questions
from opt_ops.contract.manifest import MARKER
from opt_ops.contract.skip_windows import next_sample
from opt_ops.core.detect.point import Point
from opt_ops.core.names import attempt_folder
from opt_ops.core.state.data import data_words
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import reachable_checkpoints
from opt_ops.core.values import Checkpoint
from opt_ops.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from chronicles.kept_curve import AttemptCurve
    from chronicles.record import LineageRecord

app = typer.Typer(no_args_is_help=True, help="Show the documents that an update was trained on.")

_TEXT_CHARACTERS = 80
_SHOWN = 40  # parts of documents in a table; a batch may have thousands

_COLUMNS = [
    Column("SAMPLE", "sample", right=True),
    Column("LOSS", "loss", right=True),
    Column("CORPUS", "corpus"),
    Column("SOURCE", "source", wide=True),
    Column("LINE", "line", right=True),
    Column("OFFSET", "offset", right=True, wide=True),
    Column("BEGINS", "begins", right=True, wide=True),
    Column("TOKENS", "tokens", right=True),
    Column("TEXT", "text"),
]


@app.callback()
def _noun() -> None:
    pass  # one command of its own would lose its name


@app.command("show")
def show_(
    identifier: IdArgument,
    step: Annotated[int, typer.Option("--step", min=1, help="The update, as telemetry counts them.")],
    loss: Annotated[
        bool, typer.Option("--loss", help="Compute the loss of each part under the nearest checkpoint; highest first.")
    ] = False,
    attempt: Annotated[
        str,
        typer.Option(
            "--attempt",
            metavar="ID",
            help="An attempt such as 12.00-a1, for a step that was discarded since. [default: what counts now]",
            show_default=False,
            autocompletion=complete_attempt,
        ),
    ] = "",
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """Show the documents that an update was trained on.

    Of each: file, line, byte, tokens, and the first words.

    An item is a part of a document in one sample of the batch. LINE counts from 1. TEXT is untrusted.
    A table has the first 40 parts; -o wide and -o json have all of them. A corpus that has changed is refused.

    Examples:
      opt-ops data show 12 --step 41231
      opt-ops data show 12 --step 41231 --loss
      opt-ops data show 12 --step 41231 --attempt 12.00-a1 -o json
    """
    from chronicles.record import load

    lineage = find_lineage(identifier)
    require_known(identifier, lineage)
    record = load(lineage.path)
    if not attempt and identifier in record.state.attempts:
        attempt = identifier
    curve, point = _point(record, step, attempt)
    first, count = _batch(record.state, curve, point)
    config = lineage.path / attempt_folder(curve.attempt) / "config.json"
    words = [str(config), "--first", str(first), "--count", str(count)]
    words += data_words(record.state, record.state.runs[curve.run])
    checkpoint = _checkpoint(lineage, curve, step) if loss else None
    if checkpoint is not None:
        words += ["--checkpoint", checkpoint.path]
        ago = step - checkpoint.step
        away = f"{ago} step{'' if ago == 1 else 's'} before step {step}" if ago else f"at step {step} itself"
        say(f"Losses are those under the checkpoint of step {checkpoint.step}, {away}: {checkpoint.path}.", quiet)
    asked = trainer_questions.documents(settings.config.trainer, words, lambda line: say(f"  {line}", quiet))
    rows = [{**row, "text": one_line(str(row.get("text", "")))} for row in asked]
    table = output is Format.TABLE
    columns = [column for column in _COLUMNS if loss or column.key != "loss"]
    show("opt-ops/data-show/1", rows[:_SHOWN] if table else rows, columns, output, header=header)
    say(f"Step {step} of attempt {curve.attempt}: samples {first} to {first + count - 1} of the order of data.", quiet)
    if table and len(rows) > _SHOWN:
        say(f"{_SHOWN} of {len(rows)} parts are shown.\n  next: -o wide or -o json prints all of them", quiet)


def one_line(text: str) -> str:
    """The first words of untrusted text: at most 80 characters, one line, control characters escaped."""
    words = " ".join(text.split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words[:_TEXT_CHARACTERS])
    return shown if len(words) <= _TEXT_CHARACTERS and len(shown) <= _TEXT_CHARACTERS else shown[:79] + "…"


def _point(record: LineageRecord, step: int, attempt: str) -> tuple[AttemptCurve, Point]:
    """The attempt that trained the step, and its line of telemetry.

    Raises:
        NotFound: there is no such attempt, or no such line.
    """
    name = record.lineage
    if attempt and attempt not in record.state.attempts:
        known = ", ".join(record.state.attempts) or "none"
        raise NotFound(f"lineage {name} has no attempt {attempt}; known: {known}", f"opt-ops run show {name}")
    there = [(curve, point) for curve in record.curves for point in curve.points if point.step == step]
    chosen = [
        (curve, point)
        for curve, point in there
        if (curve.attempt == attempt if attempt else curve.discarded_by(step) is None)
    ]
    if chosen:
        return chosen[-1]
    if there:
        others = [curve.attempt for curve, _ in there]
        what = f"attempt {attempt} did not train step {step}" if attempt else f"step {step} was discarded"
        hint = f"opt-ops data show {name} --step {step} --attempt {others[-1]}"
        raise NotFound(f"{what}; it was trained by {', '.join(others)}", hint)
    steps = [point.step for curve in record.curves for point in curve.points]
    span = f"telemetry has steps {min(steps)} to {max(steps)}" if steps else "there is no telemetry yet"
    raise NotFound(f"no attempt of lineage {name} has a line of telemetry for step {step}; {span}", "give another step")


def _batch(state: State, curve: AttemptCurve, point: Point) -> tuple[int, int]:
    """The first sample of the step's batch, and the number of its samples.

    The trainer writes where the data goes on after the batch. A step that it refused uses up no data, because its loss
    was not finite or a checksum was wrong: its line has the position before the batch.

    Raises:
        Unavailable: the telemetry does not tell.
    """
    if point.data_position is None or point.batch is None:
        raise Unavailable(
            f"the telemetry of attempt {curve.attempt} has no data_position and bsz at step {point.step}",
            "only telemetry of `python -m trainer` says which samples a step had",
        )
    refused = not point.finite or (point.checksums is not None and bool(point.checksums.ranks))
    if not refused:
        return max(0, point.data_position - point.batch), point.batch
    skips = [(skip.first, skip.last) for skip in state.runs[curve.run].skips]
    return next_sample(point.data_position, point.batch, skips), point.batch


def _checkpoint(lineage: Lineage, curve: AttemptCurve, step: int) -> Checkpoint:
    """The newest verified durable checkpoint at or before the step, on the way to the attempt's weights.

    Raises:
        NotFound: there is none.
    """
    usable = [
        known.checkpoint
        for known in reachable_checkpoints(lineage.state, curve.run)
        if known.verified and not known.checkpoint.nodes and (Path(known.checkpoint.path) / MARKER).is_file()
    ]
    before = [each for each in usable if each.step <= step]
    if not before:
        first = f"; the first one is of step {min(each.step for each in usable)}" if usable else ""
        raise NotFound(
            f"there is no verified checkpoint at or before step {step}{first}", f"opt-ops ckpt list {lineage.name}"
        )
    return max(before, key=lambda each: each.step)
