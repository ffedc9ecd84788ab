"""`opt-ops ckpt …`: a lineage's checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli.options import FormatOption, HeaderOption, IdArgument, QuietOption, complete_step, lineage_folder
from opt_ops.cli.output import Column, Format, say, show
from opt_ops.cli.requests import DryRunOption, YesOption, confirm
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import reachable_checkpoints
from opt_ops.errors import NotFound
from opt_ops.runfolder import lineages

app = typer.Typer(no_args_is_help=True, help="Checkpoints: which there are, whether they are sound, which can go.")

_COLUMNS = [
    Column("STEP", "step", right=True),
    Column("RUN", "run"),
    Column("SOUND", "sound"),
    Column("HEALTHY", "healthy"),
    Column("COUNTS", "counts"),
    Column("GIB", "gib", right=True),
    Column("WHY", "why"),
    Column("PATH", "path", wide=True),
]


@app.command("list")
def list_(identifier: IdArgument, output: FormatOption = Format.TABLE, header: HeaderOption = True) -> None:
    """All checkpoints that the supervisor knows of: read back and sound, healthy, on the way to the present weights.

    Example: opt-ops ckpt list 12
    """
    state = lineages.state(lineage_folder(identifier))
    show("opt-ops/ckpt-list/1", _rows(state), _COLUMNS, output, header=header)


def _rows(state: State) -> list[dict[str, Any]]:
    counts = _reachable(state)
    return [
        {
            "step": known.checkpoint.step,
            "run": known.checkpoint.run,
            "sound": known.verified,
            "healthy": known.healthy if known.verified else None,
            "counts": path in counts,
            "gib": _gib(Path(path)),
            "why": known.why or None,
            "path": path,
        }
        for path, known in sorted(state.checkpoints.items(), key=lambda item: item[1].checkpoint.step)
    ]


def _reachable(state: State) -> set[str]:
    """Paths of those that training could still go back to."""
    known = reachable_checkpoints(state, state.run.name) if state.run else ()
    return {each.checkpoint.path for each in known}


def _gib(folder: Path) -> float | None:
    if not folder.is_dir():
        return None
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**30


@app.command()
def verify(
    identifier: IdArgument,
    step: Annotated[
        int | None, typer.Argument(help="Of which step. [default: the newest]", autocompletion=complete_step)
    ] = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Read every byte of a checkpoint now, and compare it with its manifest. Leaves with 5 when it is damaged.

    Example: opt-ops ckpt verify 12 61000
    """
    from opt_ops.runfolder.checkpoints import problem

    path = lineage_folder(identifier)
    known = [k.checkpoint for k in lineages.state(path).checkpoints.values() if step in (None, k.checkpoint.step)]
    if not known:
        raise NotFound(
            f"lineage {path.name} has no checkpoint{f' of step {step}' if step else ''}", "opt-ops ckpt list"
        )
    chosen = known if step is not None else [max(known, key=lambda checkpoint: checkpoint.step)]
    rows = [{"step": c.step, "run": c.run, "path": c.path, "why": problem(c) or None} for c in chosen]
    rows = [{**row, "sound": row["why"] is None} for row in rows]
    columns = [Column("STEP", "step", right=True), Column("RUN", "run"), Column("SOUND", "sound"), Column("WHY", "why")]
    show("opt-ops/ckpt-verify/1", rows, columns, output)
    if not all(row["sound"] for row in rows):
        say("  next: nothing; the supervisor never resumes from it", quiet)
        raise typer.Exit(5)


@app.command()
def prune(
    identifier: IdArgument,
    keep: Annotated[int, typer.Option(min=2, help="The newest good ones that stay.")] = 3,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Delete checkpoints that nothing will go back to: damaged ones, those that were taken back, and old ones.

    The newest good ones stay, as well as the first good one of every tenth of the steps. It cannot be undone.

    Examples:
      opt-ops ckpt prune 12 --dry-run
      opt-ops ckpt prune 12 --keep 5
    """
    path = lineage_folder(identifier)
    state = lineages.state(path)
    rows = [row for row in _rows(state) if row["gib"] is not None and row["path"] not in _kept(state, keep)]
    gone = [row for row in rows if Path(row["path"]).resolve().is_relative_to(path.resolve())]
    total = sum(row["gib"] for row in gone)
    if dry_run or not gone:
        show("opt-ops/ckpt-prune/1", gone, _COLUMNS, output)
        say(f"{len(gone)} checkpoints, {total:.1f} GiB; nothing was deleted", quiet)
        return
    question = f"Delete {len(gone)} of {len(state.checkpoints)} checkpoints of lineage {path.name}, {total:.1f} GiB?"
    confirm(question, yes, retype=path.name)
    for row in gone:
        folder = Path(row["path"])
        (folder / "COMMITTED").unlink(missing_ok=True)  # first: a folder that is half gone must not count
        shutil.rmtree(folder)
    show("opt-ops/ckpt-prune/1", gone, _COLUMNS, output)
    say(f"{len(gone)} checkpoints deleted, {total:.1f} GiB\n  next: opt-ops ckpt list {path.name}", quiet)


def _kept(state: State, keep: int) -> set[str]:
    """The newest good ones, the first of every tenth, those not examined yet, and whatever an attempt goes on from."""
    way = _reachable(state)
    there = (k for p, k in state.checkpoints.items() if p in way and k.good and Path(p).is_dir())
    good = sorted(there, key=lambda known: known.checkpoint.step)
    steps = next((a.steps for a in reversed(list(state.attempts.values())) if a.steps), None) or 1
    firsts: dict[int, str] = {}
    for known in good:
        firsts.setdefault(10 * known.checkpoint.step // steps, known.checkpoint.path)
    pending = {path for path, known in state.checkpoints.items() if known.verified is None}
    used = {a.checkpoint.path for a in state.attempts.values() if a.live and a.checkpoint}
    return {known.checkpoint.path for known in good[-keep:]} | set(firsts.values()) | pending | used
