"""`opt-ops signals …`: run the detectors over a curve, or over the logs of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ops.cli import curves
from opt_ops.cli.options import FormatOption, HeaderOption, QuietOption, settings
from opt_ops.cli.output import Column, Format, say, show
from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.loss import LossDetector
from opt_ops.core.detect.loss_scale import LossScaleDetector
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classify_exit import blame
from opt_ops.core.values import Tier
from opt_ops.errors import NotFound
from opt_ops.runfolder.log_set import read_log_set

if TYPE_CHECKING:
    from opt_ops.core.decide.policy import Policy, Rung

app = typer.Typer(no_args_is_help=True, help="Run the detectors over a curve or over logs.")


@app.command("replay")
def replay(
    curve: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="telemetry.jsonl, or CSV with columns step and loss; optional grad_norm, loss_scale, lr.",
        ),
    ],
    playbooks: Annotated[
        Path | None, typer.Option("--from", help="Folder of playbook pages. [default: the site's]")
    ] = None,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """Run the loss detectors over a curve: their findings, the onset, and the first action of the playbook.

    Nothing acts on a finding, so the curve stays as it is. An empty cell is unknown; a loss of nan is not finite.

    Examples:
      opt-ops signals replay loss.csv -o wide
      opt-ops signals replay runs/12/12.01/a3/telemetry.jsonl
    """
    from opt_ops import playbook_loader

    policy, _ = playbook_loader.load(playbooks or settings.config.playbooks or playbook_loader.folder())
    if not curve.is_file():
        raise NotFound(
            f"there is no file {curve}", "give telemetry.jsonl, or a CSV file with the columns step and loss"
        )
    points = list(curves.points(curve))
    rows = [_row(finding, policy) for finding in _findings(points, policy)]
    columns = [
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
    show("opt-ops/signals-replay/1", rows, columns, output, header=header)
    span = f"steps {points[0].step} to {points[-1].step}, {len(points)} points"
    say(f"{len(rows) or 'No'} finding{'' if len(rows) == 1 else 's'} in {span}.", quiet)


@app.command("blame")
def blame_logs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Has rank-*.log, and exits.json where it is known how ranks ended.")
    ],
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """Say why an attempt ended, by the logs of its ranks: the failure class, the first rank, the node to blame.

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


def _findings(points: list[Point], policy: Policy) -> Iterator[Finding]:
    detectors = (LossDetector(policy.spike, policy.drift), LossScaleDetector(policy.loss_scale))
    for point in points:
        for detector in detectors:
            yield from detector.observe(point)


def _row(finding: Finding, policy: Policy) -> dict[str, Any]:
    page = policy.playbooks.get(finding.signal)
    acts = finding.tier is Tier.ACT and page is not None
    return {
        "step": finding.step,
        "onset_step": finding.onset_step,
        "signal": finding.signal,
        "tier": str(finding.tier),
        "rule": finding.rule,
        "evidence": {key: _plain(value) for key, value in finding.evidence.items()},
        "playbook": page.name if page else None,
        "would": _would(page.ladder[0], finding.onset_step) if acts and page else "notify only",
    }


def _would(rung: Rung, onset: int) -> str:
    if rung.lr_factor is None:
        return str(rung.action)
    before = max(0, onset - rung.margin_steps)
    return f"{rung.action} to a checkpoint at or before step {before}, learning rate × {rung.lr_factor:g}"


def _evidence_text(evidence: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in evidence.items() if value is not None)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
