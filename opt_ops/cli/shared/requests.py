"""Requests to the daemon, for all commands that make one: preview, confirm, send, wait, print the answer."""

from __future__ import annotations

import getpass
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from opt_ops.cli.shared import views
from opt_ops.cli.shared.foreseen import Loss, show_foreseen
from opt_ops.cli.shared.options import Lineage, RequestOptions, settings, watch_now
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.core.events import RequestRefused
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.core.text import moment
from opt_ops.errors import OptOpsError, Refused, Unavailable
from opt_ops.runfolder import lineages
from opt_ops.runfolder.liveness import Watcher

_ACCEPT_SECONDS = 10.0  # many times `tick_seconds`
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A request that was not sent yet, and the options of the command that makes it."""

    lineage: Lineage
    verb: str
    arguments: Mapping[str, Any]
    options: RequestOptions

    def send(
        self,
        question: str,
        *,
        look: str = "run show",
        loss: Loss | None = None,
        needs_daemon: str = "",
        retype: str = "",
    ) -> None:
        """Confirm and send it, then print the answer; with `dry_run`, print what would happen.

        Args:
            question: What the operator confirms.
            look: The command that shows the result.
            loss: What it would discard, for the last line of a dry run. [default: as what would happen says]
            needs_daemon: Why the request must not be queued for a later daemon, if so.
            retype: What the operator must type to confirm, if the effect cannot be undone.

        Raises:
            Refused: the daemon would refuse it, the operator did not confirm it, or it must not be queued.
        """
        # These import most of the core, which commands that only read do not need.
        from opt_ops.cli.shared.preview import preview
        from opt_ops.ports import Request
        from opt_ops.supervise.operator_requests import event_of

        name, state, options = self.lineage.name, self.lineage.state, self.options
        request = Request(
            request="dry-run",
            author=author(options),
            verb=self.verb,
            arguments=self.arguments,
            asked_at=time.time(),
        )
        event = event_of(state, request)
        if isinstance(event, RequestRefused):
            raise _refused(name, state, self.verb, event.why)
        if options.dry_run:
            coming = preview(state, event, time.time(), settings.config, views.newest_step(self.lineage.path, state))
            show_foreseen(coming, loss or views.loss_of(self.lineage.path, state, coming), options.output)
            return
        if needs_daemon and (nobody := _nobody(name)):
            raise Refused(f"no daemon is running: {needs_daemon}; {nobody.why}", nobody.next)
        confirm(question, options.yes, retype)
        show_answer(send_request(self), options.output)
        say(f"  next: opt-ops {look} {name}", options.quiet)


_OVER = frozenset({Status.COMPLETED, Status.CANCELLED})
_TO_DO = {"change": "change", "plan": "declare", "drive": "take over or hand back", "drill": "inject a fault into"}
"""What a verb does, where its own word does not say it."""


def _refused(name: str, state: State, verb: str, why: str) -> Refused:
    """Why the daemon would refuse it, with what can be done instead."""
    if state.status in _OVER:
        day = f"{moment(state.since):%d %b}".removeprefix("0")
        ended = f"lineage {name} ended on {day} ({state.status}): nothing to {_TO_DO.get(verb, verb)}"
        return Refused(ended, f"opt-ops run fork {name}, or opt-ops logbook open {name}")
    return Refused(f"lineage {name}: {why}", f"opt-ops run show {name}")


def author(options: RequestOptions) -> str:
    """The operator's name for the logbook: as given, or the login."""
    return options.author or getpass.getuser()


def confirm(question: str, yes: bool, retype: str = "") -> None:
    """Ask the operator before anything changes. The default answer is no.

    Args:
        question: What would be done.
        yes: Do not ask.
        retype: The word that must be typed, if the effect cannot be undone.

    Raises:
        Refused: the answer is no, or stdin is no terminal.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused(f"not done without confirmation: {question}", shlex.join(["opt-ops", *sys.argv[1:], "--yes"]))
    if retype:
        agreed = typer.prompt(f"{question} Type {retype} to go on", default="", show_default=False, err=True) == retype
    else:
        agreed = typer.confirm(f"{question} Proceed?", default=False, err=True)
    if not agreed:
        raise Refused("not done: you did not confirm")


def send_request(pending: PendingRequest) -> dict[str, Any]:
    """Put a request into the lineage's inbox, and wait as its options say.

    Returns:
        The answer for `-o json`: id of the request, lineage, verb, and status: `done`, `journaled` or `waiting`.

    Raises:
        Refused: the daemon refused it; the reason is in the journal.
        Unavailable: `--wait` was given, and no daemon is running.
        OptOpsError: `--wait` was given, and the lineage ended before the request was done.
    """
    path, verb = pending.lineage.path, pending.verb
    request = lineages.ask(path, author(pending.options), verb, pending.arguments, time.time())
    answer = {"request": request.request, "lineage": path.name, "verb": verb, "status": "waiting"}
    if not is_taken(path, request.request, pending.options, lambda: _nobody(path.name)):
        return answer
    for entry in lineages.entries_after(path, pending.lineage.state.seq):
        if isinstance(entry.event, RequestRefused) and entry.event.request == request.request:
            raise Refused(f"the daemon refused: {entry.event.why}", f"opt-ops run show {path.name}")
    if pending.options.wait:
        _wait_until_done(pending)
    return answer | {"status": "done" if pending.options.wait else "journaled"}


def is_taken(folder: Path, request: str, options: RequestOptions, nobody: Callable[[], Watcher | None]) -> bool:
    """Wait until the daemon has taken a request out of the inbox, as the options say. False: it waits there.

    Args:
        folder: Of the lineage or the campaign.
        request: Its id.
        options: Of the command.
        nobody: Why nobody would read it now; None: a daemon does.

    Raises:
        Unavailable: `--wait` was given, and no daemon is running.
    """
    wait, quiet = options.wait, options.quiet
    if wait is False:
        return False
    inbox, deadline = folder / "inbox", time.monotonic() + _ACCEPT_SECONDS
    while (inbox / f"{request}.json").exists():
        if found := nobody():
            if wait:
                raise Unavailable(f"no daemon is running; the request is queued in {inbox}; {found.why}", found.next)
            say(f"No daemon is running. The request is queued in {inbox}.", quiet)
            say(f"  {found.why}\n  next: {found.next}", quiet)
            return False
        if time.monotonic() > deadline and not wait:
            say(f"The daemon has not accepted the request yet. It is queued in {inbox}.", quiet)
            return False
        time.sleep(0.1)
    return True


def send_note(pending: PendingRequest) -> dict[str, Any]:
    """Send a note to the daemon; if none reads it, write it into the journal.

    Returns:
        As `send_request`.

    Raises:
        Unavailable: no daemon is running, and this process must not write the journal. The note waits in the inbox.
    """
    path, options = pending.lineage.path, pending.options
    nobody = _nobody(path.name)
    if nobody is None or options.wait is False:
        return send_request(pending)
    from opt_ops.supervise.note_alone import write_note

    request = write_note(path, pending.lineage.state, author(options), pending.arguments)
    if request is None:
        lineages.ask(path, author(options), pending.verb, pending.arguments, time.time())
        raise Unavailable(f"the note waits in {path / 'inbox'} for a daemon; {nobody.why}", nobody.next)
    say(f"The note is in the journal; {nobody.why}\n  next: {nobody.next}", options.quiet)
    return {"request": request, "lineage": path.name, "verb": pending.verb, "status": "journaled"}


def _nobody(lineage: str) -> Watcher | None:
    """Why nobody would read a request now; None: a daemon reads it within a few seconds."""
    watch = watch_now()
    return None if watch.takes_requests(lineage) else watch.over(lineage)


def _wait_until_done(pending: PendingRequest) -> None:
    """Block until the request has its effect; not at all where the journal entry is the effect."""
    path, before = pending.lineage.path, pending.lineage.state
    done, status = _DONE.get(pending.verb, _at_once), before.status
    while not done(state := lineages.state(path), before):
        if state.ended and pending.verb != "stop":
            raise OptOpsError(f"lineage {path.name} is {state.status}: {state.why}", f"opt-ops run explain {path.name}")
        if nobody := _nobody(path.name):
            raise Unavailable(f"the daemon has ended; the next daemon continues the request; {nobody.why}", nobody.next)
        if state.status is not status:
            status = state.status
            say(f"{status} …", pending.options.quiet)
        time.sleep(_POLL_SECONDS)


def _at_once(state: State, before: State) -> bool:
    return True


def _is_training(state: State, before: State) -> bool:
    attempt = state.attempt
    steps_come = attempt is not None and attempt.live and attempt.leave_at is None and state.status is Status.TRAINING
    return steps_come or state.status is Status.COMPLETED


def _trains_in_a_new_run(state: State, before: State) -> bool:
    return len(state.runs) > len(before.runs) and _is_training(state, before)


def _is_paused(state: State, before: State) -> bool:
    return state.status is Status.PAUSED and not (state.attempt and state.attempt.live)


def _has_ended(state: State, before: State) -> bool:
    return state.ended and not (state.attempt and state.attempt.live) and not state.live_allocations


def _has_recovered(state: State, before: State) -> bool:
    new = set(state.drills) - set(before.drills)
    return any(each.drill in new and each.closed_at is not None for each in state.incidents.values())


_DONE: Mapping[str, Callable[[State, State], bool]] = {
    "start": _is_training,
    "resume": _is_training,
    "change": _trains_in_a_new_run,
    "pause": _is_paused,
    "stop": _has_ended,
    "drill": _has_recovered,
}


def show_answer(answer: Mapping[str, Any], form: Format) -> None:
    """Print the answer to a request for programs; people have the exit code and the hint."""
    if form not in (Format.TABLE, Format.WIDE):
        show("opt-ops/request/1", [answer], [Column("REQUEST", "request")], form)
