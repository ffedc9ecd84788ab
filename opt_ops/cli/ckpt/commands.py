"""`opt-ops ckpt …`: the checkpoints of a lineage."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli.shared.foreseen import NOTHING, Foreseen, show_foreseen, thing
from opt_ops.cli.shared.options import (
    ChangedIdArgument,
    DryRunOption,
    FormatOption,
    HeaderOption,
    IdArgument,
    QuietOption,
    YesOption,
    complete_step,
    find_lineage,
)
from opt_ops.cli.shared.output import Column, Format, say, show, signs_of_life
from opt_ops.cli.shared.requests import confirm
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import counting, total_steps
from opt_ops.errors import NotFound

app = typer.Typer(no_args_is_help=True, help="List, verify, evaluate, serve, release, delete checkpoints.")


class Engine(StrEnum):
    """A program that answers requests to a model."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"


class Dtype(StrEnum):
    """A number format of weights."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


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
    """List the checkpoints in the journal.

    SOUND: every byte was read and agrees with the manifest. HEALTHY: loss and gradient norm were in their bands.
    COUNTS: its steps are part of the present weights.

    Example: opt-ops ckpt list 12
    """
    show("opt-ops/ckpt-list/1", _rows(find_lineage(identifier).state), _COLUMNS, output, header=header)


def _rows(state: State) -> list[dict[str, Any]]:
    counts = counting(state)
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


def _gib(folder: Path) -> float | None:
    try:
        return (
            sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()) / 2**30
            if folder.is_dir()
            else None
        )
    except FileNotFoundError:  # it is being removed
        return None


@app.command()
def scores(
    identifier: IdArgument,
    every: Annotated[bool, typer.Option("--all", help="Every score, not the newest of each alone.")] = False,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
) -> None:
    """List what was measured on the checkpoints.

    BEFORE is the settled score before it. WORSE: by more than three standard errors of the difference. SETTLED: its
    steps are part of the present weights. The logbook has the curves.

    Examples:
      opt-ops ckpt scores 12
      opt-ops ckpt scores 12 --all -o json
    """
    from opt_ops.cli.ckpt.scores import show_scores

    show_scores(find_lineage(identifier), output, every=every, header=header)


@app.command()
def verify(
    identifier: IdArgument,
    step: Annotated[
        int | None, typer.Argument(help="Step of the checkpoint. [default: the newest]", autocompletion=complete_step)
    ] = None,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Compare every byte of a checkpoint with its manifest. The exit code is 5 if it is damaged.

    Example: opt-ops ckpt verify 12 61000
    """
    from opt_ops.runfolder.checkpoints import problem

    lineage = find_lineage(identifier)
    known = [k.checkpoint for k in lineage.state.checkpoints.values() if step in (None, k.checkpoint.step)]
    if not known:
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise NotFound(f"lineage {lineage.name} has {wanted}", f"opt-ops ckpt list {lineage.name}")
    chosen = known if step is not None else [max(known, key=lambda checkpoint: checkpoint.step)]
    with signs_of_life(f"reading {sum(_gib(Path(c.path)) or 0.0 for c in chosen):.1f} GiB", quiet=quiet):
        rows = [{"step": c.step, "run": c.run, "path": c.path, "why": problem(c) or None} for c in chosen]
    rows = [{**row, "sound": row["why"] is None} for row in rows]
    columns = [Column("STEP", "step", right=True), Column("RUN", "run"), Column("SOUND", "sound"), Column("WHY", "why")]
    show("opt-ops/ckpt-verify/1", rows, columns, output)
    if not all(row["sound"] for row in rows):
        say(f"The daemon never resumes from a damaged checkpoint.\n  next: opt-ops ckpt list {lineage.name}", quiet)
        raise typer.Exit(5)


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="ID/STEP", help="A checkpoint such as 12/61000.")],
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="NAME[,NAME...]|DIR",
            help="Tasks of lm-eval, opt-16, opt-bias, or a folder with YAML files. [default: [evaluate] tasks]",
            show_default=False,
        ),
    ] = "",
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, max=1000, help="Examples before each question. [default: 0]")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N documents of a task.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Complete these prompts, one a line.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, max=2048, help="Of a completion, at most. [default: 60]")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Score what was scored before, too.")] = False,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """Score a checkpoint by tasks, and complete fixed prompts.

    lm-evaluation-harness scores it in a process of its own, offline, and the daemon journals the results.

    Each result is measured once: a second call prints it again, and RAN is no. The exit code is 65 if the checkpoint
    is damaged, 2 if the harness is not installed, 1 if it failed.

    Examples:
      opt-ops ckpt evaluate 12/61000 --tasks hellaswag,piqa
      opt-ops ckpt evaluate 12/61000 --tasks opt-16 --limit 200
      opt-ops ckpt evaluate 12/61000 --prompts prompts.txt
    """
    from opt_ops.cli.ckpt import evaluate as ckpt_evaluate

    wishes = ckpt_evaluate.Wishes(
        tasks=[each for each in tasks.split(",") if each],
        shots=shots,
        limit=limit,
        prompts=prompts,
        tokens=tokens,
        again=again,
        quiet=quiet,
    )
    found = ckpt_evaluate.evaluate(checkpoint, wishes)
    ckpt_evaluate.show_outcome(found, output, header=header)
    if found.failure is not None:
        raise found.failure


@app.command()
def release(
    checkpoint: Annotated[str, typer.Argument(metavar="ID/STEP", help="A checkpoint such as 12/61000.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; it must not exist.")],
    licence: Annotated[
        str, typer.Option("--licence", metavar="NAME|FILE", help="apache-2.0, or a file with the text.")
    ],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Number format of the weights.")] = Dtype.FP16,
    name: Annotated[str, typer.Option("--name", help="Of the model. [default: that of DIR]", show_default=False)] = "",
    with_notes: Annotated[bool, typer.Option("--with-notes", help="Publish what people wrote.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Release a checkpoint that a rollback discarded.")] = False,
    yes: YesOption = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Write a folder with weights and model card, to give away.

    In it: weights for transformers, model card, data statement, logbook, sums.

    The model card is drawn from the journal: settings, changes of the learning rate, incidents, cost, and what is not
    known. Names of nodes, people, paths and addresses are replaced. DIR appears when it is complete. The exit code is 4
    if a rollback discarded the checkpoint, 65 if it is damaged.

    Examples:
      opt-ops ckpt release 12/143051 --out opt-175b --licence apache-2.0
      opt-ops ckpt release 12.03/61000 --out early --licence LICENSE.txt --dtype bf16
    """
    from opt_ops.cli.ckpt import release as ckpt_release

    if with_notes:
        confirm(f"Publish the notes and reasons of people in {out}?", yes)
    item = ckpt_release.release(
        checkpoint, out, licence, dtype.value, name, with_notes=with_notes, anyway=anyway, quiet=quiet
    )
    columns = [Column("OUT", "out"), Column("FILES", "files", right=True), Column("BYTES", "bytes", right=True)]
    columns += [Column("LICENCE", "licence"), Column("DIGEST", "digest", wide=True)]
    show("opt-ops/ckpt-release/1", [item], columns, output)


@app.command()
def serve(
    checkpoint: Annotated[str, typer.Argument(metavar="ID/STEP", help="A checkpoint such as 12/61000.")],
    engine: Annotated[
        Engine | None,
        typer.Option("--engine", help="[default: vllm if [serve] vllm is set, else transformers]", show_default=False),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at. Others than this machine's need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 6010,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Answer completion requests with a checkpoint, until Ctrl-C.

    It prints the address once the engine has answered a request. There is a page at /, and POST /v1/completions. A key
    that the engine would ignore is refused. The exit code is 65 if the checkpoint is damaged, 2 if the engine is not
    installed. With OPT_OPS_SERVE_TOKEN in the environment, requests must show it, and --host may be any address.
    docs/serving.md lists the keys.

    Examples:
      opt-ops ckpt serve 12/61000
      opt-ops ckpt serve 12.03/61000 --engine transformers --port 0 -o json
      OPT_OPS_SERVE_TOKEN=... opt-ops ckpt serve 12 --host 0.0.0.0
    """
    from opt_ops.cli.ckpt import serve as ckpt_serve

    ckpt_serve.serve(checkpoint, engine.value if engine else None, host, port, output, quiet=quiet)


@app.command()
def prune(
    identifier: ChangedIdArgument,
    keep: Annotated[int, typer.Option(min=2, help="Number of newest good checkpoints to keep.")] = 3,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: FormatOption = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Delete damaged, discarded and old checkpoints. This cannot be undone.

    The newest good ones stay, the first good one of each tenth of all steps, and pinned ones.

    Examples:
      opt-ops ckpt prune 12 --dry-run
      opt-ops ckpt prune 12 --keep 5
    """
    from opt_ops.contract.manifest import remove

    lineage = find_lineage(identifier)
    path, state = lineage.path, lineage.state
    rows = [row for row in _rows(state) if row["gib"] is not None and row["path"] not in _kept(state, keep)]
    gone = [row for row in rows if Path(row["path"]).resolve().is_relative_to(path.resolve())]
    total = sum(row["gib"] for row in gone)
    if dry_run and output is not Format.NAME:
        show_foreseen([_foreseen(row) for row in gone], NOTHING, output)
    elif dry_run or not gone:
        show("opt-ops/ckpt-prune/1", gone, _COLUMNS, output)
    if dry_run or not gone:
        say(f"{len(gone)} checkpoints, {total:.1f} GiB. Nothing was deleted.", quiet)
        return
    question = f"Delete {len(gone)} of {len(state.checkpoints)} checkpoints of lineage {path.name}, {total:.1f} GiB?"
    confirm(question, yes, retype=path.name)
    for row in gone:
        remove(Path(row["path"]))
    show("opt-ops/ckpt-prune/1", gone, _COLUMNS, output)
    say(f"Deleted {len(gone)} checkpoints, {total:.1f} GiB.\n  next: opt-ops ckpt list {path.name}", quiet)


def _foreseen(row: Mapping[str, Any]) -> Foreseen:
    why = f": {row['why']}" if row["why"] else ""
    return thing("delete", "delete", f"step {row['step']:,} of {row['run']}, {row['gib']:.1f} GiB{why}", row)


def _kept(state: State, keep: int) -> set[str]:
    """The newest good ones, the first of each tenth, those not verified yet, those in use, and pinned ones."""
    from opt_ops.contract.manifest import pinned

    way = counting(state)
    there = (k for p, k in state.checkpoints.items() if p in way and k.good and Path(p).is_dir())
    good = sorted(there, key=lambda known: known.checkpoint.step)
    steps = total_steps(state) or 1
    firsts: dict[int, str] = {}
    for known in good:
        firsts.setdefault(10 * known.checkpoint.step // steps, known.checkpoint.path)
    pending = {path for path, known in state.checkpoints.items() if known.verified is None}
    used = {a.checkpoint.path for a in state.attempts.values() if a.live and a.checkpoint}
    pins = {path for path in state.checkpoints if pinned(Path(path))}  # by hand, for an incident, or for a fork
    return {known.checkpoint.path for known in good[-keep:]} | set(firsts.values()) | pending | used | pins
