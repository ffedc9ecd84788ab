"""The explanation of an incident as lines of text, for `opt-ops run explain`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from opt_ops.cli.shared import wording
from opt_ops.core.state import in_place
from opt_ops.core.text import to_iso
from opt_ops.core.told import words
from opt_ops.core.values import Action

if TYPE_CHECKING:
    from chronicles.logbook.story.model import Afterthought
    from chronicles.report.model import IncidentReport, StacksReport

_ADVISORY = "advisory: an operator drives, nothing is done"


def explanation_lines(
    incident: IncidentReport, thoughts: Sequence[Afterthought] = (), *, watched: bool = False
) -> Iterator[str]:
    """An incident with its decision, its proof and what later facts say of it, as lines of text.

    Args:
        incident: The incident.
        thoughts: All afterthoughts of the lineage.
        watched: Another launcher runs the training.
    """
    yield from _explained(incident, watched)
    yield from _later_lines(incident, thoughts)


def _explained(incident: IncidentReport, watched: bool) -> Iterator[str]:
    drill = f"  (drill {incident.drill})" if incident.drill else ""
    yield f"{incident.incident}  {words.failure(incident.kind)}  {to_iso(incident.opened)}{drill}"
    yield f"  cause     {incident.cause_in_words}  [{incident.opened_entry}]"
    yield f"  evidence  {wording.values(incident.evidence)}"
    yield f"            {incident.detector}"
    yield from _cause_lines(incident)
    yield from _probe_lines(incident)
    if incident.documents_command:
        yield f"  data      {incident.documents_command}"
    if incident.stacks:
        yield from _stack_lines(incident.stacks)
    if incident.proposals:
        yield f"  asked     {_asked(incident)}"
    if incident.action is None:
        yield "  action    none decided yet"
        return
    meant = f", for: {words.cause(incident.for_cause)}" if incident.for_cause else ""
    rule = "" if incident.requested else f"({incident.playbook}, rung {incident.rung}{meant})  "  # a wish has no rung
    yield f"  action    {'; '.join(_action(incident, watched))}  {rule}[{incident.decided_entry}]"
    yield f"  why       {incident.why}"
    if incident.what_became:
        yield f"  in place  {incident.what_became}"
    if incident.closed is None:
        yield "  proof     not known yet"
    elif incident.proven is None:
        yield "  proof     nothing to prove"
    else:
        lost = f"{incident.steps_discarded} steps discarded, {incident.seconds_down or 0:.1f} s of downtime"
        yield f"  proof     {'proven' if incident.proven else 'NOT PROVEN'}; {lost}"
        if (read := incident.telling) is not None:
            expected = "" if read.due_lr is None else f", expected {read.due_lr:.6g}"
            base = "" if read.base_lr is None else f" ({read.expected_factor:.6g} × base_lr {read.base_lr:.6g})"
            yield f"            step {read.step}: lr {read.lr:.6g}{expected}{base}"
        if incident.limit_of_proof:
            yield f"            {incident.limit_of_proof}"


def _asked(incident: IncidentReport) -> str:
    from chronicles.logbook.entries.asked import asked

    return asked(incident)


def _later_lines(incident: IncidentReport, thoughts: Sequence[Afterthought]) -> Iterator[str]:
    """What later facts say of it, each once."""
    from chronicles.logbook.story.afterthoughts import journaled_only, on

    for each in journaled_only(incident, thoughts):
        yield f"  later     {each.text}  [{to_iso(each.at)}]"
    for each in on(incident.incident, thoughts):
        because = f"; {', '.join(each.because)}" if each.because else ""
        yield f"  later     {each.verdict.replace('_', ' ')}: {each.text}  [{to_iso(each.at)}{because}]"
        if each.next is not None:
            yield f"            next: {each.next}"


_LIKELY = 3  # causes that are shown; report.json has all of them


def _cause_lines(incident: IncidentReport) -> Iterator[str]:
    """The likeliest causes, each with what speaks for and against it."""
    for number, each in enumerate(incident.causes[:_LIKELY]):
        yield f"  {'causes' if not number else '':8}  {words.cause(each.cause)} {each.confidence:.0%}"
        yield from (f"            + {why}" for why in each.evidence_for)
        yield from (f"            − {why}" for why in each.evidence_against)


def _probe_lines(incident: IncidentReport) -> Iterator[str]:
    """The short runs on idle nodes that were to tell the causes apart."""
    for number, each in enumerate(incident.probes):
        yield f"  {'probes' if not number else '':8}  {each.probe} on {each.node}: {_SHOWED[each.spiked]}: {each.why}"


_SHOWED = {True: "spiked", False: "did not spike", None: "no verdict"}


def _action(incident: IncidentReport, watched: bool) -> Iterator[str]:
    yield words.action(str(incident.action))
    if incident.action == Action.REPLACE_RANKS:
        yield f"{in_place.ranks(incident.ranks_replaced)}, all others keep running"
    if incident.action == Action.ROLLBACK and not (watched and incident.decided_checkpoint_step is None):
        yield f"to step {incident.decided_checkpoint_step or 0}"
    if incident.lr_factor is not None:
        yield f"learning rate × {incident.lr_factor}"
    if incident.settings:
        yield " ".join(incident.settings)
    if incident.skip_batches:
        yield f"{incident.skip_batches} batches skipped"
    if incident.refused_step is not None:
        yield f"without the checkpoint of step {incident.refused_step}, now and later"
    if incident.excluded:
        yield f"without {', '.join(incident.excluded)}"
    if incident.advisory:
        yield (
            "advisory: the job is only watched, nothing is done"
            if watched
            else _ADVISORY
            if not incident.proposals
            else "only proposed: nothing is done"
        )


def _stack_lines(stacks: StacksReport) -> Iterator[str]:
    for group in stacks.groups:
        ranks = ",".join(map(str, group.ranks))
        yield f"  stacks    rank {ranks}: {' < '.join(group.frames[:3])}"
    if stacks.silent:
        yield f"  stacks    rank {','.join(map(str, stacks.silent))}: no answer"
    if stacks.odd:
        yield f"            not where most ranks are: rank {','.join(map(str, stacks.odd))}"
