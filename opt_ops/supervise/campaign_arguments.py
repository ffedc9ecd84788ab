"""The requests in the inbox of a campaign: what is beyond their bounds is refused, and the refusal is journaled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from opt_ops.core.campaign import events as e
from opt_ops.core.campaign.state import CampaignState
from opt_ops.core.campaign.values import Band, Law, Size
from opt_ops.core.codec import reader_of
from opt_ops.core.text import clean
from opt_ops.ports import Request
from opt_ops.supervise.request_arguments import LONGEST_REASON, MOST_STEPS, Arguments, InvalidRequest
from opt_ops.supervise.start_arguments import shape_of

MOST_SIZES = 100
_MOST_TOKENS = 10**16
_MOST_PARAMETERS = 10**14
_LONGEST_WHY = 300


def event_of(name: str, state: CampaignState, request: Request) -> e.CampaignEvent:
    """The event to journal for a request. It can be a `CampaignRequestRefused`."""
    why = request.unusable
    if not why:
        try:
            return _VERBS[request.verb](name, state, request)
        except KeyError as error:
            why = f"unknown verb or missing argument {error}"
        except Exception as error:  # noqa: BLE001 - whatever a request holds, its author hears why it is refused
            why = str(error) or type(error).__name__
    return e.CampaignRequestRefused(
        request=clean(request.request, _LONGEST_WHY),
        author=clean(request.author, _LONGEST_WHY),
        verb=clean(request.verb, _LONGEST_WHY),
        why=clean(why, _LONGEST_WHY),
    )


def _start(name: str, state: CampaignState, request: Request) -> e.CampaignStarted:
    if state.started is not None:
        raise InvalidRequest("the campaign is already started")
    given = Arguments(request.arguments)
    sizes = tuple(
        Size(
            recipe=each.text("recipe"),
            parameters=each.whole("parameters", 1, _MOST_PARAMETERS),
            tokens=each.whole("tokens", 1, _MOST_TOKENS),
            settings=each.texts("settings"),
            shape=shape_of(each.part("shape")),
        )
        for each in given.parts("sizes")
    )
    if not 0 < len(sizes) <= MOST_SIZES or len({size.recipe for size in sizes}) < len(sizes):
        raise InvalidRequest(f"sizes must be from 1 to {MOST_SIZES} different recipes")
    return e.CampaignStarted(
        request=request.request,
        author=request.author,
        campaign=name,
        sizes=tuple(sorted(sizes, key=lambda size: size.parameters)),
        data=given.texts("data"),
        valid=given.texts("valid", ()),
        tokenizer=given.optional_text("tokenizer"),
        at_once=given.whole("at_once", 1, MOST_SIZES, 1),
    )


def _forecast(name: str, state: CampaignState, request: Request) -> e.CampaignForecast:
    given = Arguments(request.arguments)
    recipe = given.text("recipe")
    if all(size.recipe != recipe for size in state.waiting):
        raise InvalidRequest(f"{recipe} has begun, or is no size of this campaign: a forecast is made before")
    if recipe in state.forecasts:
        raise InvalidRequest(f"the forecast of {recipe} is in the journal, and does not change")
    event = e.CampaignForecast(
        request=request.request,
        recipe=recipe,
        tokens=given.whole("tokens", 1, _MOST_TOKENS),
        loss=given.positive("loss"),
        low=given.positive("low"),
        high=given.positive("high"),
        points=given.whole("points", 1, 10**9),
        sizes=given.texts("sizes"),
        fit=_value(request, "fit", Law),
        fit_low=_value(request, "fit_low", Law),
        fit_high=_value(request, "fit_high", Law),
        curve=_value(request, "curve", tuple[Band, ...]),
    )
    rising = all(a.tokens < b.tokens for a, b in pairwise((Band(tokens=0, loss=1, low=1, high=1), *event.curve)))
    bands = (event, *event.curve)
    if not event.curve or not rising or not all(0 < each.low <= each.loss <= each.high for each in bands):
        raise InvalidRequest("the forecast is not in order: 0 < low ≤ loss ≤ high, and a curve over rising tokens")
    return event


def _alert(name: str, state: CampaignState, request: Request) -> e.CampaignAlert:
    given = Arguments(request.arguments)
    recipe = given.text("recipe")
    member = state.members.get(recipe)
    if member is None:
        raise InvalidRequest(f"{recipe} has not begun")
    return e.CampaignAlert(
        request=request.request,
        what=e.AlertKind(given.text("kind")),
        recipe=recipe,
        lineage=member.lineage,
        why=clean(given.text("why", LONGEST_REASON), LONGEST_REASON),
        step=given.optional_whole("step", 0, MOST_STEPS),
        tokens=given.optional_whole("tokens", 0, _MOST_TOKENS),
        loss=given.optional_positive("loss"),
        low=given.optional_positive("low"),
        high=given.optional_positive("high"),
    )


def _stop(name: str, state: CampaignState, request: Request) -> e.CampaignStopped:
    if not state.waiting:
        raise InvalidRequest("every size has begun, or the campaign is stopped: there is nothing to stop")
    given = Arguments(request.arguments)
    return e.CampaignStopped(
        request=request.request, author=request.author, reason=given.text("reason", LONGEST_REASON, "")
    )


def _value(request: Request, name: str, cls: Any) -> Any:
    """A value as the journal's reader takes it.

    Raises:
        InvalidRequest: it is of another type.
    """
    try:
        return reader_of(cls)(request.arguments[name], name)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(str(error)) from error


_VERBS: Mapping[str, Callable[[str, CampaignState, Request], e.CampaignEvent]] = {
    "start": _start,
    "forecast": _forecast,
    "alert": _alert,
    "stop": _stop,
}
