"""The text of `--dry-run`: what the daemon would do about a request, by its own rules, one sentence an event."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from opt_ops import playbook_loader
from opt_ops.config import Config
from opt_ops.core import events as e
from opt_ops.core.state.model import State
from opt_ops.core.text import printable
from opt_ops.core.values import Action, Driver
from opt_ops.supervise import supervisor


def preview(state: State, event: e.Event, now: float, config: Config) -> Iterator[str]:
    """What would follow from an event until the world answers: the real decisions, made on a copy of the state.

    Raises:
        PlaybookError: a playbook page is malformed.
    """
    policy, _ = playbook_loader.load(config.playbooks or playbook_loader.folder(), expected_gpus=config.expected_gpus)
    for coming in supervisor.preview(state, event, now, policy):
        yield printable(f"Would {_sentence(coming)}.")


def _sentence(event: e.Event) -> str:
    known = _SENTENCES.get(type(event), "journal " + e.kind_of(event))
    return known.format(event=event) if isinstance(known, str) else known(event)


def _pause(event: e.PauseRequested) -> str:
    return f"pause after one more checkpoint and {'keep' if event.keep_nodes else 'release'} the nodes"


def _change(event: e.ChangeRequested) -> str:
    where = "after one more checkpoint" if event.to_step is None else f"from step {event.to_step:,} or before"
    return f"start the next run {where}{_changes(event.lr_factor, event.settings, event.skip_batches, event.lr)}"


def _recovery(event: e.RecoveryDecided) -> str:
    step = f" to step {event.checkpoint.step:,}" if event.checkpoint and event.action is Action.ROLLBACK else ""
    exclude = f", exclude {', '.join(event.exclude)}" if event.exclude else ""
    changes = _changes(event.lr_factor, event.settings, event.skip_batches)
    return f"decide for incident {event.incident}: {event.action}{step}{exclude}{changes} ({event.why})"


def _changes(
    factor: float | None, settings: tuple[str, ...], skip_batches: int, learning_rate: float | None = None
) -> str:
    parts = [
        *([f"learning rate × {factor:g}"] if factor is not None else []),
        *([f"learning rate {learning_rate:g}"] if learning_rate is not None else []),
        *settings,
        *([f"{skip_batches} batches skipped"] if skip_batches else []),
    ]
    return "".join(f", {part}" for part in parts)


def _attempt(event: e.AttemptIntended) -> str:
    start = f"step {event.checkpoint.step:,}" if event.checkpoint else "step 0"
    return f"start attempt {event.attempt} at {start} on {', '.join(event.nodes)}"


def _drill(event: e.DrillRequested) -> str:
    arguments = ", ".join(f"{name} {value}" for name, value in event.arguments.items())
    where = f" into attempt {event.attempt}" if event.attempt else ""
    return f"inject the fault {event.fault}{where}{f' ({arguments})' if arguments else ''}"


def _driver(event: e.DriverChanged) -> str:
    if event.driver is Driver.OPERATOR:
        return "switch to advisory mode: the daemon acts on requests only"
    return "return control to the daemon"


_SENTENCES: Mapping[type[e.Event], str | Callable[[Any], str]] = {
    e.StopRequested: "stop the lineage for good",
    e.PauseRequested: _pause,
    e.ResumeRequested: "resume from the newest good checkpoint",
    e.ChangeRequested: _change,
    e.DriverChanged: _driver,
    e.NodeAllowed: "allow attempts on {event.node} again",
    e.NodeExcluded: "exclude {event.node}: no attempt starts there",
    e.DrainIntended: "ask the scheduler to drain {event.node}",
    e.DrillRequested: _drill,
    e.IncidentOpened: "open incident {event.incident}: {event.cause}",
    e.RecoveryDecided: _recovery,
    e.IncidentClosed: "close incident {event.incident}",
    e.RunPlanned: "plan run {event.run}: {event.cause}",
    e.SizeDecided: "train on {event.nodes} nodes: {event.why}",
    e.AllocationIntended: "request nodes from the scheduler ({event.nodes})",
    e.ReleaseIntended: "release the nodes of allocation {event.allocation}",
    e.AttemptIntended: _attempt,
    e.LeaveIntended: "save a checkpoint, then stop attempt {event.attempt}",
    e.StopIntended: "stop attempt {event.attempt}",
    e.LineagePaused: "mark the lineage PAUSED",
    e.LineageHalted: "halt the lineage: {event.why}",
    e.LineageCancelled: "mark the lineage CANCELLED",
    e.LineageCompleted: "mark the lineage COMPLETED at step {event.step}",
    e.AlertIntended: "send an alert ({event.severity}): {event.title}",
}
