"""`opt-ops node check`: tests whether nodes are fit to train. A health check for Slurm, Nagios and similar monitors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from opt_ops.cli.shared.extras import require_trainer
from opt_ops.cli.shared.mistakes import for_programs, is_usage_error, say_error, usage_error
from opt_ops.cli.shared.options import FormatOption, Lineage, complete_id, complete_node, find_lineage, settings
from opt_ops.cli.shared.output import Column, Format, say, show, signs_of_life
from opt_ops.config import TrainerCommand
from opt_ops.core.health import HEALTH_TABLE, Heartbeat, Judgement, differing, judge_all, rank
from opt_ops.core.health.burn_in_findings import BurnIn, burned
from opt_ops.core.text import printable
from opt_ops.core.values import Verdict
from opt_ops.errors import NotFound, OptOpsError, Refused

_CODES = {Verdict.HEALTHY: 0, Verdict.SUSPECT: 1, Verdict.BAD: 2, Verdict.UNKNOWN: 3}
_WORDS = {Verdict.HEALTHY: "OK", Verdict.SUSPECT: "WARNING", Verdict.BAD: "CRITICAL", Verdict.UNKNOWN: "UNKNOWN"}
_READ_SECONDS = 20.0  # for a reading; Slurm kills a health check after 60
_RETEST_SECONDS = 90.0  # only the operator who asked waits for it


class Plugin(TyperCommand):
    """A command whose usage errors are UNKNOWN (3): the usual code, 2, would mean that the node is CRITICAL."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """Read the command line. Typer's usage errors have no public class, so the exit code tells them."""
        try:
            return super().make_context(*arguments, **settings)
        except Exception as error:
            if getattr(error, "exit_code", None) != 2:
                raise
            said, hint = usage_error(error) if is_usage_error(error) else (str(error), getattr(error, "hint", ""))
            _say_unknown(said, hint, programs=for_programs(sys.argv[1:]))
            raise SystemExit(3) from error


def _say_unknown(what: str, hint: str, *, programs: bool) -> None:
    """Report that nothing was checked: to Nagios in the first line of stdout, to programs as every error."""
    if programs:
        say_error(what, hint, 3, programs=True)
        return
    print(f"UNKNOWN - opt-ops node check: {printable(what)}")
    if hint:
        say(f"  next: {hint}")


@dataclass(frozen=True)
class _Place:
    """Nodes, and the Slurm job that holds them. Without a job, this machine is all of the nodes."""

    nodes: tuple[str, ...]
    job: str | None = None


def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NODE",
            help="Nodes of the job that this command runs in. [default: this machine]",
            autocompletion=complete_node,
        ),
    ] = None,
    lineage: Annotated[
        str,
        typer.Option("--lineage", help="Nodes that this lineage holds, or NODE… of them.", autocompletion=complete_id),
    ] = "",
    burn: Annotated[
        bool, typer.Option("--burn-in", help="Also compute and transfer on the GPUs, which must be idle.")
    ] = False,
    seconds: Annotated[
        float, typer.Option("--seconds", min=20, help="Time limit of the check; Slurm allows 60.")
    ] = 30.0,
    xid_minutes: Annotated[
        float, typer.Option("--xid-minutes", min=0, help="Xids in the kernel log count up to this age.")
    ] = 120.0,
    drill: Annotated[str, typer.Option(metavar="NODE:FAULT", help="Let the burn-in find a fault on a node.")] = "",
    output: FormatOption = Format.TABLE,
) -> None:
    """Check the health of nodes now.

    docs/health.md has the table. No daemon and no lineage is needed.

    The first line is a summary. Exit codes are those of Nagios: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.
    docs/node-check.md shows how to use it in Slurm.

    Examples:
      opt-ops node check
      opt-ops node check --burn-in
      opt-ops node check --lineage 12 --burn-in -o json
    """
    try:
        until = time.monotonic() + seconds
        places = _places(names or [], find_lineage(lineage) if lineage else None, burn)
        by_node = _judged(places, xid_minutes, until)
        found = _burned(places, by_node, drill, until) if burn else None
    except (OptOpsError, OSError, ValueError) as error:
        _say_unknown(str(error), getattr(error, "hint", ""), programs=output in (Format.JSON, Format.JSONL))
        raise typer.Exit(3) from error
    rows = [_row(name, gpus, judged) for name, (gpus, judged) in by_node.items()]
    worst = min((judged[0] for _, judged in by_node.values()), key=rank)
    if output in (Format.TABLE, Format.WIDE):
        print(_summary(worst, by_node, found))
        for name, (_, judged) in by_node.items():
            for each in judged if any(len(own) > 1 for _, own in by_node.values()) or output is Format.WIDE else ():
                print(f"{name}\t{each.verdict}\t{each.reason}\t{printable(json.dumps(dict(each.evidence)))}")
    else:
        told = [{**row, "burn_in": None if found is None else asdict(found)} for row in rows]
        show("opt-ops/node-check/1", told, [Column("NODE", "node")], output)
    raise typer.Exit(_CODES[worst.verdict])


def retest(lineage: Lineage, name: str, since: float) -> None:
    """Check the health of a node that the lineage holds, and burn it in.

    Args:
        lineage: The lineage.
        name: The node.
        since: Xids after this time count (seconds since the epoch). The node was excluded for the earlier ones.

    Raises:
        Refused: the node is not healthy, or it cannot be tested.
    """
    until = time.monotonic() + _RETEST_SECONDS
    try:
        places = _places([name], lineage, True)
    except NotFound as error:
        hint = f"run opt-ops node check --burn-in on {name}, then allow it without --retest"
        raise Refused(f"{error}; it cannot be tested from here", hint) from error
    judged = _judged(places, (time.time() - since) / 60, until)
    found = _burned(places, judged, "", until)
    _, findings = judged[name]
    line = _summary(findings[0], judged, found)
    if findings[0].verdict is not Verdict.HEALTHY:
        hint = f"opt-ops node explain {findings[0].reason}"
        raise Refused(f"{name} failed the test and stays excluded: {line}", hint)
    say(f"  {line}")


def _places(names: Sequence[str], lineage: Lineage | None, burn: bool) -> list[_Place]:
    """Find the nodes: of a lineage, of the surrounding job, or this machine.

    Raises:
        NotFound: the lineage does not hold such a node.
        Refused: no job is known that holds the nodes, or an attempt runs on them.
    """
    config = settings.config
    if lineage is None:
        if not names:
            return [_Place((socket.gethostname(),))]
        job = os.environ.get("SLURM_JOB_ID")
        if config.scheduler == "slurm" and job is None:
            raise Refused(
                "no job holds these nodes", "opt-ops node check --lineage ID; or run it inside salloc or sbatch"
            )
        return [_Place(tuple(names), job if config.scheduler == "slurm" else None)]
    state, number = lineage.state, lineage.name
    if missing := [name for name in names if name not in state.held]:
        raise NotFound(
            f"lineage {number} does not hold {', '.join(missing)}; it holds {', '.join(state.held) or 'none'}",
            f"opt-ops node list {number}",
        )
    wanted = list(names or state.held)
    if not wanted:
        raise NotFound(f"lineage {number} holds no nodes", f"opt-ops run show {number}")
    attempt = state.attempt
    if burn and attempt is not None and attempt.live and not set(wanted).isdisjoint(attempt.nodes):
        raise Refused(
            f"attempt {attempt.name} runs on these nodes; a burn-in would disturb it",
            f"opt-ops run pause {number} --keep-nodes",
        )
    jobs = [state.held[name].job for name in wanted]
    if config.scheduler == "local":
        return [_Place(tuple(wanted))]
    return [_Place(tuple(n for n, j in zip(wanted, jobs, strict=True) if j == job), job) for job in dict.fromkeys(jobs)]


Judged = dict[str, tuple[int, list[Judgement]]]
"""By node: its number of GPUs, and its findings, the worst first."""


def _judged(places: Sequence[_Place], xid_minutes: float, until: float) -> Judged:
    from opt_ops.runfolder.heartbeat import heartbeat_of

    expected, now = settings.config.expected_gpus, time.time()
    beats: dict[str, Heartbeat] = {}
    for name, reading in _read(places, xid_minutes, until).items():
        beats[name] = heartbeat_of({**reading, "node": name, "host": name, "ts": now, "attempt": None})
    odd = differing(list(beats.values()), expected)
    judged: Judged = {}
    for name, beat in beats.items():
        findings = judge_all(beat, expected)
        if expected == 0 and beat.nvml == "absent":  # the site expects no GPUs, so none is missing
            fine = Judgement(verdict=Verdict.HEALTHY, reason="ok", source="no rule of the table applies; no GPUs here")
            findings = [each for each in findings if each.reason != "nvml_absent"] or [fine]
        if name in odd:
            findings = sorted([*(each for each in findings if each.reason != "ok"), odd[name]], key=rank)
        judged[name] = (len(beat.gpus), findings)
    return judged


def _read(places: Sequence[_Place], xid_minutes: float, until: float) -> dict[str, dict[str, Any]]:
    """A new reading of each node; `hung` where none came in time."""
    folder = settings.config.runs if settings.config.runs.is_dir() else settings.config.runs.parent
    command = [sys.executable, "-m", "opt_ops.node", "readings", "--once", "--xid-minutes", str(xid_minutes)]
    command += ["--folder", str(folder)]
    running: list[tuple[_Place, subprocess.Popen[str]]] = []
    for place in places:
        where = ["--overlap", f"--nodes={len(place.nodes)}", f"--nodelist={','.join(place.nodes)}", "--quiet"]
        srun = ["srun", f"--jobid={place.job}", "--ntasks-per-node=1", *where] if place.job else []
        process = subprocess.Popen([*srun, *command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        running.append((place, process))
    readings: dict[str, dict[str, Any]] = {}
    deadline = min(until, time.monotonic() + _READ_SECONDS)
    for place, process in running:
        try:
            text, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            text = ""
        lines = [reading for line in text.splitlines() if (reading := _parsed(line)) is not None]
        by_name = {line["node"]: line for line in lines} if place.job else {}
        for name in place.nodes:  # without a job, this machine is all of them
            own = by_name.get(name) if place.job else next(iter(lines), None)
            readings[name] = own or {"nvml": "hung", "gpus": []}
    return readings


def _parsed(line: str) -> dict[str, Any] | None:
    """The reading in a line; None for any other output of a task or of srun."""
    try:
        reading = json.loads(line)
    except ValueError:
        return None
    return reading if isinstance(reading, dict) and "nvml" in reading else None


def _burned(places: Sequence[_Place], judged: Judged, drill: str, until: float) -> BurnIn:
    """Burn in the nodes that are not bad, and add the findings to `judged`."""
    from opt_ops.node.burn_in import GROUP_SECONDS, LEAVING_SECONDS, burn_in, by_srun, on_this_machine

    require_trainer(TrainerCommand())  # its package has the ranks of the burn-in
    fit = [name for name, (_, findings) in judged.items() if findings[0].verdict is not Verdict.BAD]
    busy = [name for name in fit if any(each.reason == "left_over" for each in judged[name][1])]
    if busy:
        raise Refused(
            f"processes run on the GPUs of {', '.join(busy)}; a burn-in would disturb them",
            "opt-ops node check, without the burn-in, names them; end them first",
        )
    if not fit:
        return BurnIn(nodes=())
    # Without GPUs, one node alone gets two ranks: an all-reduce needs two.
    ranks = max(judged[name][0] for name in fit) or (2 if len(fit) == 1 else 1)
    left = until - GROUP_SECONDS - LEAVING_SECONDS - time.monotonic()
    options = ["--seconds", str(max(0.2, min(3.0, left / 6)))]
    spoiled, _, fault = drill.partition(":")
    options += ["--drill", fault, "--drill-node", spoiled] if fault else []
    commands: list[list[str]] = []
    for place in places:
        own = [name for name in place.nodes if name in fit]
        if own:
            start = by_srun(place.job, own, ranks, *options) if place.job else on_this_machine(own, ranks, *options)
            commands += start
    with signs_of_life(f"burning in {', '.join(fit)}", left + GROUP_SECONDS):
        found = burn_in(commands, fit, ranks, left)
    for name, judgement in burned(found):
        gpus, before = judged[name]
        marked = replace(judgement, drill=f"node check --drill {drill}") if fault and name == spoiled else judgement
        judged[name] = (gpus, sorted([*(each for each in before if each.reason != "ok"), marked], key=rank))
    return found


def _row(name: str, gpus: int, judged: Sequence[Judgement]) -> dict[str, Any]:
    findings = [_finding(each) for each in judged]
    return {"node": name, **findings[0], "gpus": gpus, "table": HEALTH_TABLE, "findings": findings}


def _finding(judgement: Judgement) -> dict[str, Any]:
    return {
        "verdict": str(judgement.verdict),
        "reason": judgement.reason,
        "source": judgement.source,
        "evidence": dict(judgement.evidence),
        "drill": judgement.drill,
    }


def _summary(worst: Judgement, judged: Mapping[str, tuple[int, list[Judgement]]], found: BurnIn | None) -> str:
    gpus = sum(count for count, _ in judged.values())
    what = f"{len(judged)} nodes, {gpus} GPUs" if len(judged) > 1 else f"{gpus} GPUs"
    named = {name: findings[0].reason for name, (_, findings) in judged.items() if findings[0].verdict is worst.verdict}
    by_reason: dict[str, list[str]] = {}
    for name, reason in named.items():
        by_reason.setdefault(reason, []).append(name)
    reasons = "; ".join(f"{reason} on {', '.join(nodes)}" for reason, nodes in by_reason.items())
    if worst.verdict is Verdict.HEALTHY and set(by_reason) == {"ok"}:
        reasons = worst.source
    word = _WORDS[worst.verdict]
    if worst.verdict is Verdict.HEALTHY and not gpus and found is None:  # on a node for GPUs, this is no good news
        word = "NO GPU - none was found, so none was checked; if there should be some, set health.gpus_per_node"
    return printable(f"{word} - {reasons} - {what}{_figures(found)}")


def _figures(found: BurnIn | None) -> str:
    """The medians of the burn-in's measurements."""
    if found is None:
        return ""
    groups = [*found.alone, *(group for measured in found.rounds for group in measured)]
    figures = (
        ("TFLOP/s", [each.tflops for each in found.devices]),
        ("GB/s to the device", [each.to_gbs for each in found.devices]),
        ("GB/s all-reduce", [each.gbs for each in groups]),
    )
    known = ((unit, [value for value in values if value is not None]) for unit, values in figures)
    texts = [f"{median(values):.3g} {unit}" for unit, values in known if values]
    return f", burnt in: {', '.join(texts)}"
