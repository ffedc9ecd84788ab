"""`opt-ops run watch-job`: watch a job that somebody else started, by its log alone."""

from __future__ import annotations

import getpass
import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_ops.cli.run.commands import app
from opt_ops.cli.shared.options import QuietOption, settings
from opt_ops.cli.shared.output import Format, say, show
from opt_ops.core.text import clock, printable, safe_json, to_iso
from opt_ops.errors import NotFound, OptOpsError, Unavailable, UsageError

if TYPE_CHECKING:
    from opt_ops.core.decide.policy import Policy
    from opt_ops.core.events import SignalRaised
    from opt_ops.supervise.projections import Projection
    from opt_ops.watch_job.job_poll import JobPoll
    from opt_ops.watch_job.lineage import ShadowLineage
    from opt_ops.watch_job.watch import JobWatch, Subject

_LOOK_SECONDS = 1.0  # between two looks at the log
_ALERT_SECONDS = 20.0  # that alerts get at the end: twice the time of one delivery
_BLIND = "blind"  # the kind of a line about what the watch cannot see
_FOUND = 5  # the exit code


@app.command("watch-job")
def watch_job(
    job: Annotated[str, typer.Argument(metavar="JOBID", help="Slurm's number of the job; 812_3 is a task.")] = "",
    log: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Read this log, not the job's stdout and stderr. May be given several times."
        ),
    ] = None,
    from_file: Annotated[
        Path | None, typer.Option(metavar="LOG", help="Read a log alone, to its end. No Slurm is needed.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="With --from-file: wait for more lines until Ctrl-C.")
    ] = False,
    pattern: Annotated[
        str,
        typer.Option(
            metavar="REGEX",
            help="How a line tells an update: named groups step, loss, and if there are any lr, gnorm, step_seconds, "
            "tokens. [default: all known formats are tried]",
        ),
    ] = "",
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Updates between two lines (logging_steps), where lines have no step. [default: 1]"),
    ] = None,
    output: Annotated[Format, typer.Option("-o", "--output", help="Output format of findings.")] = Format.TABLE,
    quiet: QuietOption = False,
) -> None:
    r"""Watch a Slurm job that somebody else started, by its log. Read only: the job is never touched.

    It reads the job's log from the beginning, follows it, and prints a line for each finding. It writes one lineage
    into the runs folder, with a logbook of its own, and nothing else. Decisions there are advice. It ends when the job
    ends. docs/watch-job.md has the formats, and says which rules need which field.

    Exit codes: 0 nothing was found, 5 something was, 75 no line could be read.

    Examples:
      opt-ops run watch-job 812
      opt-ops run watch-job 812 --log train.log --every 10 -o jsonl
      opt-ops run watch-job --from-file slurm-812.out
      opt-ops run watch-job --from-file train.log --pattern 'it (?P<step>\d+) nll (?P<loss>\S+)'
    """
    subject = _subject(job, log or [], from_file, follow, pattern, every)
    told = _Told(output, quiet)
    with _interrupts() as interrupted:
        code = _watch(subject, job, told, interrupted, quiet)
    if output is Format.JSON:
        show("opt-ops/job-findings/1", told.rows, [], output)
    if code:
        raise typer.Exit(code)


def _subject(
    job: str, logs: list[Path], from_file: Path | None, follow: bool, pattern: str, every: int | None
) -> Subject:
    """What is to be watched.

    Raises:
        UsageError: the options do not go together.
        NotFound: there is no such file or job.
        SchedulerUnavailable: Slurm does not answer, and nothing else says where the log is.
    """
    from opt_ops.watch_job.line_formats import FORMATS
    from opt_ops.watch_job.watch import Subject

    if bool(job) == (from_file is not None):
        raise UsageError("give the number of a job, or --from-file LOG", "for example opt-ops run watch-job 812")
    if from_file is not None and logs:
        raise UsageError("--log is for a job", "give the log with --from-file alone")
    if follow and from_file is None:
        raise UsageError("--follow is for --from-file", "a job's log is followed until the job ends")
    formats = (_by_pattern(pattern),) if pattern else FORMATS
    if from_file is not None:
        if not from_file.is_file() and not (follow and not from_file.exists()):
            raise NotFound(f"there is no file {from_file}", "name the log of a training")
        return Subject(logs=[from_file.absolute()], follow=follow, formats=formats, every=every)
    poll = _poll(job, has_logs=bool(logs))
    found = [path.absolute() for path in logs] or (list(poll.record.logs) if poll.record else [])
    if not found:
        raise UsageError(f"Slurm does not say where job {job} writes its output", "name the file: --log FILE")
    return Subject(logs=found, poll=poll, formats=formats, every=every)


def _by_pattern(pattern: str) -> Any:
    """The format of `--pattern`.

    Raises:
        UsageError: it is no regular expression, or has no group `loss`.
    """
    from opt_ops.watch_job.given_pattern import GROUPS, pattern_format

    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--pattern is no regular expression: {error}", "see Python's re") from error
    groups = set(compiled.groupindex)
    if "loss" not in groups or not groups <= set(GROUPS):
        named = ", ".join(sorted(groups)) or "none"
        raise UsageError(
            f"--pattern has the named groups {named}; it needs loss and step, and may have {', '.join(GROUPS[2:])}",
            "for example 'it (?P<step>\\d+) nll (?P<loss>\\S+)'",
        )
    return pattern_format(compiled)


def _poll(job: str, *, has_logs: bool) -> JobPoll:
    """The first answer about the job. A controller that does not answer is tried again where the log is known.

    Raises:
        UsageError, NotFound, SchedulerUnavailable: as `job_of`.
    """
    from opt_ops.errors import SchedulerUnavailable
    from opt_ops.watch_job.job import job_of
    from opt_ops.watch_job.job_poll import JobPoll

    began = time.monotonic()
    try:
        return JobPoll(job, job_of(job), began)
    except SchedulerUnavailable as error:
        if not has_logs:
            raise SchedulerUnavailable(
                f"{error}; so it is not known where job {job} writes its log", "try again, or name it: --log FILE"
            ) from error
        poll = JobPoll(job, None, began)
        poll.why = str(error)
        return poll


class _Told:
    """Prints findings as they come."""

    def __init__(self, output: Format, quiet: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self._output = output
        self._quiet = quiet
        self.policy: Policy | None = None

    def finding(self, raised: SignalRaised) -> None:
        """Print a finding, with the advice of its playbook."""
        from opt_ops.core.failures.classes import cause

        severity, advice = _advice(raised, self.policy) if self.policy is not None else ("warning", "")
        self._tell(raised.at, raised.signal, severity, raised.step, cause(raised) + advice)

    def blind(self, why: str) -> None:
        """Print what the watch cannot see."""
        self._tell(time.time(), _BLIND, "page", None, why.replace("\n", " "))

    def _tell(self, at: float, kind: str, severity: str, step: int | None, text: str) -> None:
        row = {"ts": to_iso(at), "kind": str(kind), "severity": severity, "step": step, "text": printable(text)}
        self.rows.append(row)
        if self._output is Format.JSONL:
            print(safe_json(json.dumps(row, ensure_ascii=True)), flush=True)
        elif self._output is Format.NAME:
            print(kind, flush=True)
        elif self._output is not Format.JSON:
            where = "" if step is None else f"step {step:,}  "
            print(f"{clock(at)}  {severity:7}  {kind}  {where}{printable(text)}", flush=True)

    def say(self, remark: str) -> None:
        """A remark on stderr."""
        say(remark, self._quiet)


def _advice(raised: SignalRaised, policy: Policy) -> tuple[str, str]:
    """The severity of a finding, as in the alert about it, and what its playbook would do."""
    from opt_ops.cli.signals import would
    from opt_ops.core.failures.classes import row
    from opt_ops.core.values import Action, Severity, Tier

    page = policy.playbooks.get(raised.signal)
    if raised.tier is not Tier.ACT or page is None:
        return str(Severity.WARNING), ""
    rung = page.first_restart
    quiet = row(raised.signal).quiet
    loud = Severity.PAGE if rung.action in (Action.NOTIFY, Action.HALT) else Severity.WARNING
    onset = raised.onset_step if raised.onset_step is not None else raised.step
    margin = max(rung.margin_steps, raised.margin_steps)
    target = max(0, onset - margin) if rung.action is Action.ROLLBACK and onset is not None else None
    return str(Severity.INFO if quiet else loud), f"; advice of playbook {page.name}: {would(rung, target)}"


@contextmanager
def _interrupts() -> Iterator[list[str]]:
    """SIGINT and SIGTERM end the watch and not its journal: what came is in the list."""
    came: list[str] = []

    def note(number: int, _: object) -> None:
        came.append(signal.Signals(number).name)

    before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _watch(subject: Subject, job: str, told: _Told, interrupted: list[str], quiet: bool) -> int:
    """Watch until nothing more can come. Returns the exit code.

    Raises:
        Unavailable: no line could be read.
    """
    from opt_ops import playbook_loader
    from opt_ops.adapters.notify import UrlNotifier
    from opt_ops.adapters.outbox import Outbox
    from opt_ops.core.values import Severity
    from opt_ops.runfolder.permissions import keep_private
    from opt_ops.supervise.site import SystemClock
    from opt_ops.watch_job.lineage import ShadowLineage, Watched
    from opt_ops.watch_job.watch import JobWatch

    config = settings.config
    alerts = config.alerts
    policy, _ = playbook_loader.load(
        config.playbooks or playbook_loader.folder(), least_alert=Severity(alerts.least) if alerts.urls else None
    )
    told.policy = policy
    keep_private(config.group)
    name = subject.poll.record.name if subject.poll is not None and subject.poll.record is not None else ""
    watched = Watched(
        recipe=f"job {job}{f' ({name})' if name else ''}" if job else f"log {subject.logs[0].name}",
        settings=tuple(f"log={path}" for path in subject.logs),
        author=getpass.getuser(),
        job=job,
    )
    outbox = Outbox(UrlNotifier(alerts.urls, alerts.least).send)
    lineage = ShadowLineage(config.runs, config.group, watched, policy, SystemClock(), outbox, told.finding)
    told.say(f"Lineage {lineage.path.name} watches {watched.recipe}: {', '.join(map(str, subject.logs))}.")
    told.say("  read only: the job is not touched, and decisions are advice")
    watch = JobWatch(subject, lineage, policy.hang, told.say, told.blind)
    projection = _projection(lineage.path.name)
    try:
        _loop(watch, lineage, projection, interrupted)
        watch.end(f"{watched.author} ({interrupted[0]})" if interrupted else "")
        _deliver(lineage, interrupted)
    finally:
        projection.close()
        lineage.close()
    _draw(lineage.path, told)
    say(f"  next: opt-ops run explain {lineage.path.name}, or opt-ops logbook open {lineage.path.name}", quiet)
    if not watch.readings:
        raise Unavailable(f"no line could be read: {watch.tried}", "say how a line tells an update: --pattern REGEX")
    return _FOUND if watch.blind or any(row["kind"] != _BLIND for row in told.rows) else 0


def _projection(lineage: str) -> Projection:
    from opt_ops.supervise.projections import Projection

    option = ("-c", str(settings.config_path)) if settings.config_path else ()
    return Projection((*option, "logbook", "render", lineage, "-q"), settings.config.chronicle.every_seconds)


def _loop(watch: JobWatch, lineage: ShadowLineage, projection: Projection, interrupted: list[str]) -> None:
    """Look, conclude, tell, until nothing more can come or somebody ends the watch."""
    drawn = lineage.state.seq
    while not interrupted:
        began = time.monotonic()
        watch.step()
        lineage.deliver_alerts()
        if watch.over:
            return
        if lineage.state.seq != drawn:
            drawn, projection.stale = lineage.state.seq, True
        projection.step(now=False)
        time.sleep(max(0.0, _LOOK_SECONDS - (time.monotonic() - began)) if not watch.behind else 0.0)


def _deliver(lineage: ShadowLineage, interrupted: list[str]) -> None:
    """Give the last alerts their time. What is not delivered then stays open in the journal."""
    deadline, asked = time.monotonic() + _ALERT_SECONDS, len(interrupted)
    while lineage.deliver_alerts() and time.monotonic() < deadline and len(interrupted) == asked:
        time.sleep(0.1)


def _draw(path: Path, told: _Told) -> None:
    """Draw the logbook. A logbook that cannot be drawn is said, and changes nothing of what was found."""
    from chronicles.logbook.render import render

    try:
        render(path, settings.config.ledger)
    except (OptOpsError, OSError, ValueError) as error:
        told.say(f"The logbook could not be drawn: {error}\n  next: opt-ops logbook render {path.name}")
