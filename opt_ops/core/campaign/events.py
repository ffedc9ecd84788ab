"""The facts that the journal of a campaign holds. The journals of its lineages hold all that happens to each size.

They are a union of their own: no event of a lineage means anything here, and none of these means anything there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from opt_ops.core.campaign.values import Band, Law, Size
from opt_ops.core.codec import Vocabulary
from opt_ops.core.events import kinds_of


class AlertKind(StrEnum):
    """What an alert of a campaign says."""

    ABOVE = "above"  # the settled loss is above its band
    BELOW = "below"
    SETTINGS = "settings"  # two sizes differ in what must be equal


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignStarted:
    """Observation: an operator asked for these sizes. They are in the order in which they begin."""

    request: str
    author: str
    campaign: str
    sizes: tuple[Size, ...]
    data: tuple[str, ...]
    valid: tuple[str, ...] = ()
    tokenizer: str | None = None
    at_once: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignForecast:
    """Observation: the loss that the law of the sizes so far expects of the next one, made before it begins."""

    request: str
    recipe: str
    tokens: int
    loss: float
    low: float
    high: float
    points: int
    sizes: tuple[str, ...]  # whose losses were fitted
    fit: Law
    fit_low: Law
    fit_high: Law
    curve: tuple[Band, ...]  # on the way; the last one is the end


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignMemberIntended:
    """Intent: request the lineage of a size. Settled by `CampaignMember`.

    The number of the lineage and the id of its request are chosen here, so a second try requests the same lineage.
    """

    recipe: str
    lineage: str
    request: str
    unforecast: str = ""  # why there is no forecast; empty: there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignMember:
    """Outcome of `CampaignMemberIntended`. Not `asked`: the number belongs to somebody else, and another is taken."""

    recipe: str
    lineage: str
    asked: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignAlert:
    """Observation: something about a size that a person should look at. Nothing is done about it."""

    request: str
    what: AlertKind
    recipe: str
    lineage: str
    why: str
    step: int | None = None
    tokens: int | None = None
    loss: float | None = None
    low: float | None = None  # of the band there
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignAlertSettled:
    """Outcome of `CampaignAlert`: its message was delivered, or it was given up."""

    request: str
    problem: str = ""  # empty: it was delivered


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignStopped:
    """Observation: an operator wants no further size to begin. Those that have begun go on."""

    request: str
    author: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignRequestRefused:
    """Observation: a request that cannot be carried out."""

    request: str
    author: str
    verb: str
    why: str


CampaignEvent = (
    CampaignStarted
    | CampaignForecast
    | CampaignMemberIntended
    | CampaignMember
    | CampaignAlert
    | CampaignAlertSettled
    | CampaignStopped
    | CampaignRequestRefused
)

CAMPAIGN = Vocabulary(kinds_of(*CampaignEvent.__args__))
"""Of the journals of campaigns."""
