"""What all commands have in common that ask the daemon for something: say what would follow, ask back, wait, answer."""

from __future__ import annotations

import getpass
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_ops.cli import views
from opt_ops.cli.options import daemon_alive, lineage_folder, settings
from opt_ops.cli.output import Column, Format, say, show
from opt_ops.core.events import RequestRefused
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.errors import OptOpsError, Refused, Unavailable
from opt_ops.runfolder import lineages

_ANSWER_SECONDS = 10.0  # a tick is a second
_LOOK_SECONDS = 1.0

YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]
AuthorOption = Annotated[str, typer.Option("--author", help="Who asks, for the logbook.", show_default="your login")]
WaitOption = Annotated[
    bool | None,
    typer.Option(
        "--wait/--no-wait",
        help="Wait until it is done, or for nothing. [default: until the daemon has taken it, at most 10 s]",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and how it is to be made."""

    verb: str
    arguments: Mapping[str, Any]
    question: str
    yes: bool
    dry_run: bool
    output: Format
    quiet: bool
    by: str
    wait: bool | None

    def send(
        self, identifier: str, *, look: str = "run show", remark: str = "", needs_daemon: str = "", retype: str = ""
    ) -> None:
        """Ask for it, or with `dry_run` print what would follow.

        Args:
            identifier: of the lineage, or of a run or attempt of it.
            look: the command that shows what came of it.
            remark: the last line of a dry run.
            needs_daemon: why this cannot wait for a daemon, if it cannot.
            retype: what a person must type to confirm, where it cannot be undone.

        Raises:
            Refused: it cannot be done, was not confirmed, or must not wait.
        """
        # Most of the core comes with these, which those who only look do not need.
        from opt_ops.ports import Request
        from opt_ops.supervise.operator_requests import event_of

        path, who = lineage_folder(identifier), author(self.by)
        state = lineages.state(path)
        request = Request(request="dry-run", author=who, verb=self.verb, arguments=self.arguments)
        event = event_of(state, request)
        if isinstance(event, RequestRefused):
            raise Refused(f"lineage {path.name}: {event.why}", f"opt-ops run show {path.name}")
        if self.dry_run:
            for line in views.foresee(state, event, time.time(), settings.config):
                print(line)
            if remark:
                print(remark)
            return
        if needs_daemon and not daemon_alive(settings.config.runs):
            raise Refused(f"no daemon is watching: {needs_daemon}", "opt-ops daemon run")
        confirm(self.question, self.yes, retype)
        answer = ask_daemon(path, who, self.verb, self.arguments, quiet=self.quiet, wait=self.wait)
        show_answer(answer, self.output)
        say(f"  next: opt-ops {look} {path.name}", self.quiet)


def author(given: str) -> str:
    """The name that the logbook gets."""
    return given or getpass.getuser()


def confirm(what: str, yes: bool, retype: str = "") -> None:
    """Ask before the world changes; No unless it is said, and where it cannot be undone, No unless `retype` is typed.

    Raises:
        Refused: the answer is no, or there is nobody to ask.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused(f"not done without confirmation: {what}", "add --yes")
    if retype:
        agreed = typer.prompt(f"{what} Type {retype} to go on", default="", show_default=False, err=True) == retype
    else:
        agreed = typer.confirm(f"{what} Proceed?", default=False, err=True)
    if not agreed:
        raise Refused("not done")


def ask_daemon(
    path: Path, who: str, verb: str, arguments: Mapping[str, Any], *, quiet: bool, wait: bool | None
) -> dict[str, Any]:
    """Put a request into the lineage's inbox and wait a moment until a living daemon has journaled it.

    Args:
        path: The lineage's folder.
        who: asks.
        verb: What for.
        arguments: Of the verb.
        quiet: Say nothing.
        wait: Until it is done; False: for nothing at all.

    Returns:
        What `-o json` prints of it: the request's id, the lineage, and whether it is done, journaled or waits for a
        daemon.

    Raises:
        Refused: the daemon journaled why it cannot be done.
        Unavailable: it is to be waited for, and nobody watches.
        OptOpsError: it is to be waited for, and the lineage has ended otherwise.
    """
    runs, before = settings.config.runs, lineages.state(path)
    request = lineages.ask(path, who, verb, arguments, time.time())
    answer = {"request": request.request, "lineage": path.name, "verb": verb, "status": "waiting"}
    if wait is False:
        return answer
    deadline = time.monotonic() + _ANSWER_SECONDS
    while (path / "inbox" / f"{request.request}.json").exists():
        alive = daemon_alive(runs)
        if not alive and wait:
            raise Unavailable(f"nobody watches; the request waits in {path / 'inbox'}", "opt-ops daemon ensure")
        if not alive or (time.monotonic() > deadline and not wait):
            say(f"the request waits in {path / 'inbox'} for a daemon", quiet)
            if not alive:
                say("  next: opt-ops daemon run", quiet)
            return answer
        time.sleep(0.1)
    for entry in reversed(lineages.entries(path)):
        if isinstance(entry.event, RequestRefused) and entry.event.request == request.request:
            raise Refused(f"the daemon refused: {entry.event.why}", f"opt-ops run show {path.name}")
    if wait:
        _await(path, verb, before, quiet)
    return answer | {"status": "done" if wait else "journaled"}


def _await(path: Path, verb: str, before: State, quiet: bool) -> None:
    """Until what was asked for is reached; at once where the journal's entry is all of it."""
    reached, told = _REACHED.get(verb, _at_once), before.status
    while not reached(state := lineages.state(path), before):
        if state.ended and verb != "stop":
            raise OptOpsError(f"lineage {path.name} is {state.status}: {state.why}", f"opt-ops run explain {path.name}")
        if not daemon_alive(settings.config.runs):
            raise Unavailable("nobody watches any more; it goes on when a daemon does", "opt-ops daemon ensure")
        if state.status is not told:
            told = state.status
            say(f"{told} …", quiet)
        time.sleep(_LOOK_SECONDS)


def _at_once(state: State, before: State) -> bool:
    return True


def _trains(state: State, before: State) -> bool:
    attempt = state.attempt
    steps_come = attempt is not None and attempt.live and attempt.leave_at is None and state.status is Status.TRAINING
    return steps_come or state.status is Status.COMPLETED


def _trains_anew(state: State, before: State) -> bool:
    return len(state.runs) > len(before.runs) and _trains(state, before)


def _rests(state: State, before: State) -> bool:
    return state.status is Status.PAUSED and not (state.attempt and state.attempt.live)


def _has_ended(state: State, before: State) -> bool:
    return state.ended and not (state.attempt and state.attempt.live) and not state.live_allocations


def _is_recovered(state: State, before: State) -> bool:
    new = set(state.drills) - set(before.drills)
    return any(each.drill in new and each.closed_at is not None for each in state.incidents.values())


_REACHED: Mapping[str, Callable[[State, State], bool]] = {
    "start": _trains,
    "resume": _trains,
    "change": _trains_anew,
    "pause": _rests,
    "stop": _has_ended,
    "drill": _is_recovered,
}


def show_answer(answer: Mapping[str, Any], form: Format) -> None:
    """Print what became of a request to programs; people have the exit code and the hint."""
    if form not in (Format.TABLE, Format.WIDE):
        show("opt-ops/request/1", [answer], [Column("REQUEST", "request")], form)
