"""`opt-ops signals …`: run the detectors over a curve, or over the logs of ranks."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ops.cli.curve_files.read import CurveFile
from opt_ops.cli.shared.options import FormatOption, HeaderOption, QuietOption, settings
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.core.failures.classify_exit import blame
from opt_ops.core.values import Action, Tier
from opt_ops.errors import NotFound, UsageError
from opt_ops.laboratory.curve_replay import CurveReplay, Found, TooManyAttempts
from opt_ops.runfolder.log_set import read_log_set

if TYPE_CHECKING:
    from opt_ops.core.decide.policy import Policy, Rung

_PROGRESS_LINES = 100_000

app = typer.Typer(no_args_is_help=True, help="Run the detectors over a curve or over logs.")


@app.command("replay")
def replay(
    curve: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="CSV or JSON with a step and a loss: an export of W&B or TensorBoard, trainer_state.json, "
            "telemetry.jsonl, a log of your own.",
        ),
    ],
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="NAME=COLUMN",
            help="Name a column that is not recognised. NAME is step, loss, grad_norm, lr, loss_scale, skip, attempt, "
            "batch, tokens (of a step) or stage. Repeat it for more.",
        ),
    ] = None,
    planned: Annotated[
        list[int] | None,
        typer.Option(
            "--planned", metavar="STEP", min=0, help="Something was planned from this step on. Repeat it for more."
        ),
    ] = None,
    playbooks: Annotated[
        Path | None, typer.Option("--from", help="Folder of playbook pages. [default: the site's]")
    ] = None,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """Run the loss detectors over a curve.

    It prints their findings, the onset, and the first action of the playbook.

    Nothing acts on a finding, so the curve stays as it is. An empty cell is unknown; a loss of nan is not finite. Where
    steps go back, a new attempt begins. Rows without a loss are passed over.

    Examples:
      opt-ops signals replay loss.csv -o wide
      opt-ops signals replay wandb.csv --column loss=train/ce --column step=trainer/global_step
      opt-ops signals replay loss.csv --planned 40000
      opt-ops signals replay runs/12/12.01/a3/telemetry.jsonl
    """
    from opt_ops import playbook_loader

    policy, _ = playbook_loader.load(playbooks or settings.config.playbooks or playbook_loader.folder())
    if not curve.is_file():
        raise NotFound(f"there is no file {curve}", "give telemetry.jsonl, or a file with the columns step and loss")
    file = CurveFile(curve, columns or ())
    found = _replayed(file, policy, planned or (), curve, quiet)
    rows = [_row(each, policy) for each in found.found]
    several = found.attempts > 1
    shown = [
        *([Column("RUN", "run")] if any(row["run"] for row in rows) else []),
        *([Column("ATTEMPT", "attempt", right=True)] if several else []),
        Column("STEP", "step", right=True),
        Column("ONSET", "onset_step", right=True),
        Column("SIGNAL", "signal"),
        Column("TIER", "tier"),
        Column("RULE", "rule"),
        Column("PLAYBOOK", "playbook"),
        Column("WOULD", "would"),
        Column("EVIDENCE", "evidence_text", wide=True),
    ]
    if output in (Format.TABLE, Format.WIDE):
        rows = [{**row, "evidence_text": _evidence_text(row["evidence"])} for row in rows]
    show("opt-ops/signals-replay/1", rows, shown, output, header=header)
    _remarks(file, found, quiet)


def _replayed(file: CurveFile, policy: Policy, planned: Sequence[int], curve: Path, quiet: bool) -> CurveReplay:
    """The replay of a file, with the progress of a long one on a terminal."""

    def stray(_: str) -> None:
        file.passed.strays += 1

    replayed = CurveReplay(policy, planned, on_stray=stray)
    progress = not quiet and sys.stderr.isatty()
    try:
        for number, line in enumerate(file.lines(), 1):
            replayed.take(*line)
            if progress and number % _PROGRESS_LINES == 0:
                print(f"\r{number:,} lines, step {line.point.step:,} ", end="", file=sys.stderr, flush=True)
        if progress and replayed.points >= _PROGRESS_LINES:
            print("\r", end="", file=sys.stderr)
    except TooManyAttempts as error:
        raise UsageError(f"{curve}: {error}", "give one run only, in the order in which it was logged") from None
    if file.passed.strays > replayed.points:
        raise UsageError(
            f"{curve}: the steps of {file.passed.strays:,} lines do not follow those of the {replayed.points:,} others",
            "sort the lines by step, or give one run only",
        )
    if not replayed.points:
        raise UsageError(f"{curve}: no points", "give at least one line with a step and a loss")
    return replayed


def _remarks(file: CurveFile, found: CurveReplay, quiet: bool) -> None:
    """What was taken for what, what was passed over, and what was found."""
    renamed = [f"{name} is {column}" for name, column in (file.columns or {}).items() if name != column]
    if renamed:
        say(f"Columns: {', '.join(renamed)}.", quiet)
    passed = file.passed
    for count, what in (
        (passed.without_loss, "without a loss"),
        (passed.unreadable, "that could not be read"),
        (passed.strays, "whose step does not follow"),
    ):
        if count:
            say(f"{count:,} line{'' if count == 1 else 's'} {what} passed over.", quiet)
    attempts = f", {found.attempts} attempts" if found.attempts > 1 else ""
    count = len(found.found)
    said = (
        f"{count or 'No'} finding{'' if count == 1 else 's'} in {found.points:,} points, steps {found.span}{attempts}."
    )
    say(said, quiet)


@app.command("blame")
def blame_logs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Has rank-*.log, and exits.json where it is known how ranks ended.")
    ],
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """Say why an attempt ended, by the logs of its ranks.

    It prints the failure class, the first rank, and the node to blame.

    An incident of the same logs says the same. Without exits.json, the order in which ranks ended is not known.

    Example: opt-ops signals blame runs/12/12.01/a3/logs
    """
    try:
        failed = read_log_set(folder)
    except OSError as error:
        raise NotFound(f"{folder} cannot be read: {error.strerror}", "give a folder with files rank-0000.log") from None
    rows: list[dict[str, Any]] = []
    if failed:
        found = blame(failed)
        rows = [
            {
                "class": str(found.kind),
                "first_rank": found.first.rank,
                "node": found.node,
                "line": found.line,
                "fault": str(found.fault),
                "nodes": [node for node in found.nodes if node],
                "ranks": found.ranks,
            }
        ]
    columns = [
        Column("CLASS", "class"),
        Column("RANK", "first_rank", right=True),
        Column("NODE", "node"),
        Column("FAULT", "fault"),
        Column("RANKS", "ranks", right=True, wide=True),
        Column("LINE", "line"),
    ]
    show("opt-ops/signals-blame/1", rows, columns, output, header=header)
    say(f"{len(failed) or 'No'} rank{'' if len(failed) == 1 else 's'} ended badly.", quiet)


def _row(found: Found, policy: Policy) -> dict[str, Any]:
    finding = found.finding
    page = policy.playbooks.get(finding.signal)
    rung = page.first_restart if finding.tier is Tier.ACT and page is not None else None
    rollback = rung is not None and rung.action is Action.ROLLBACK
    margin = max(rung.margin_steps, finding.margin_steps) if rung is not None and rollback else finding.margin_steps
    target = max(0, finding.onset_step - margin) if rollback else None
    return {
        "run": found.run,
        "attempt": found.attempt,
        "step": finding.step,
        "onset_step": finding.onset_step,
        "signal": finding.signal,
        "tier": str(finding.tier),
        "rule": finding.rule,
        "evidence": {key: _plain(value) for key, value in finding.evidence.items()},
        "playbook": page.name if page else None,
        "action": str(rung.action if rung else Action.NOTIFY),
        "target_step": target,
        "margin_steps": margin,
        "would": would(rung, target),
    }


def would(rung: Rung | None, target: int | None) -> str:
    """What a playbook's rung does, for people. `target`: the step that a rollback goes back to at least."""
    if rung is None or rung.action is Action.NOTIFY:
        return "notify only"
    if target is None:
        return str(rung.action)
    rate = "" if rung.lr_factor is None else f", learning rate × {rung.lr_factor:g}"
    return f"{rung.action} to a checkpoint at or before step {target}{rate}"


def _evidence_text(evidence: dict[str, Any]) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in evidence.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
