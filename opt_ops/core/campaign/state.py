"""What the journal of a campaign tells, folded from its events, and which size begins next."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from opt_ops.core.campaign import events as e
from opt_ops.core.campaign.values import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A size that has begun, or will at once."""

    recipe: str
    lineage: str
    request: str
    unforecast: str
    asked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A forecast, and when it was journaled."""

    made: float
    event: e.CampaignForecast


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignState:
    """A campaign, by its journal."""

    started: e.CampaignStarted | None = None
    started_at: float = 0.0
    members: Mapping[str, Member] = field(default_factory=dict[str, Member])  # by recipe
    forecasts: Mapping[str, Forecast] = field(default_factory=dict[str, Forecast])  # by recipe
    alerts: Mapping[str, e.CampaignAlert] = field(default_factory=dict[str, e.CampaignAlert])  # by request
    unsettled: AbstractSet[str] = frozenset()  # alerts whose message is not delivered yet
    stopped: e.CampaignStopped | None = None
    refused: Mapping[str, e.CampaignRequestRefused] = field(default_factory=dict[str, e.CampaignRequestRefused])

    @property
    def requests(self) -> AbstractSet[str]:
        """The requests that are answered."""
        forecasts = (each.event.request for each in self.forecasts.values())
        own = (each.request for each in (self.started, self.stopped) if each is not None)
        return {*forecasts, *self.alerts, *self.refused, *own}

    @property
    def waiting(self) -> tuple[Size, ...]:
        """The sizes that have not begun, in order; none once an operator has stopped the campaign."""
        if self.started is None or self.stopped is not None:
            return ()
        return tuple(size for size in self.started.sizes if size.recipe not in self.members)

    @property
    def open(self) -> Member | None:
        """The member whose lineage was intended, and perhaps not requested."""
        return next((each for each in self.members.values() if not each.asked), None)


def fold(state: CampaignState, ts: float, event: e.CampaignEvent) -> CampaignState:
    """The state after one more event."""
    match event:
        case e.CampaignStarted():
            return replace(state, started=event, started_at=ts)
        case e.CampaignForecast():
            known = Forecast(made=ts, event=event)
            return replace(state, forecasts={event.recipe: known, **state.forecasts})  # the first one stays
        case e.CampaignMemberIntended():
            member = Member(
                recipe=event.recipe, lineage=event.lineage, request=event.request, unforecast=event.unforecast
            )
            return replace(state, members={**state.members, event.recipe: member})
        case e.CampaignMember():
            others = {name: each for name, each in state.members.items() if name != event.recipe}
            if not event.asked:
                return replace(state, members=others)
            return replace(
                state, members={**state.members, event.recipe: replace(state.members[event.recipe], asked=True)}
            )
        case e.CampaignAlert():
            return replace(
                state,
                alerts={**state.alerts, event.request: event},
                unsettled=state.unsettled | {event.request},
            )
        case e.CampaignAlertSettled():
            return replace(state, unsettled=state.unsettled - {event.request})
        case e.CampaignStopped():
            return replace(state, stopped=event)
        case e.CampaignRequestRefused():
            return replace(state, refused={**state.refused, event.request: event})


def next_size(state: CampaignState, training: int, free: int | None) -> Size | None:
    """The size that begins now; None: there is none, or it has to wait.

    Args:
        state: The campaign.
        training: How many of its lineages train, or wait for nodes. One that has ended or halted holds up nothing.
        free: Nodes that nobody holds. None: the scheduler's queue decides that.
    """
    waiting = state.waiting
    if state.started is None or not waiting or state.open is not None or training >= state.started.at_once:
        return None
    wanted = waiting[0].shape.nodes + waiting[0].shape.spares
    return waiting[0] if free is None or wanted <= free else None
