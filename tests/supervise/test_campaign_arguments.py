"""Requests of campaigns: what is beyond their bounds is refused with the reason, and nothing raises."""

from __future__ import annotations

from typing import Any

import pytest

from opt_ops.core.campaign import events as e
from opt_ops.core.campaign.state import CampaignState, fold
from opt_ops.ports import Request
from opt_ops.supervise.campaign_arguments import event_of

SHAPE = {"nodes": 1, "spares": 0, "ranks_per_node": 1, "min_nodes": 1}
SIZE = {"recipe": "a", "parameters": 9, "tokens": 9, "settings": [], "shape": SHAPE}
START = {"sizes": [SIZE, SIZE | {"recipe": "b", "parameters": 5}], "data": [], "tokenizer": None}
LAW = {"E": 1.0, "A": 1.0, "alpha": 0.3, "B": 1.0, "beta": 0.3}
BAND = {"tokens": 4, "loss": 2.0, "low": 1.9, "high": 2.1}
CURVE = [BAND, BAND | {"tokens": 9}]
FORECAST = {"recipe": "a", "tokens": 9, "loss": 2.0, "low": 1.9, "high": 2.1, "points": 5, "sizes": ["x"]}
FORECAST |= {"fit": LAW, "fit_low": LAW, "fit_high": LAW, "curve": CURVE}
ALERT = {"recipe": "b", "kind": "above", "why": "it is above"}
GOOD = {"start": START, "forecast": FORECAST, "alert": ALERT, "stop": {"reason": "enough"}}


def begun() -> CampaignState:
    """A campaign of two sizes, of which the smaller one has begun."""
    state = fold(CampaignState(), 1.0, ask(CampaignState(), "start", START))
    for event in (
        e.CampaignMemberIntended(recipe="b", lineage="1", request="r", unforecast="first"),
        e.CampaignMember(recipe="b", lineage="1"),
    ):
        state = fold(state, 2.0, event)
    return state


def ask(state: CampaignState, verb: str, arguments: Any) -> e.CampaignEvent:
    return event_of("sizes", state, Request(request="r1", author="ann", verb=verb, arguments=arguments))


@pytest.mark.parametrize("verb", GOOD)
def test_what_is_in_its_bounds_is_taken(verb: str):
    state = CampaignState() if verb == "start" else begun()
    event = ask(state, verb, GOOD[verb])
    assert not isinstance(event, e.CampaignRequestRefused), event
    assert "r1" in fold(state, 3.0, event).requests


@pytest.mark.parametrize(
    ("verb", "wrong", "why"),
    [
        ("start", {"sizes": []}, "from 1 to 100 different recipes"),
        ("start", {"sizes": [SIZE, SIZE]}, "from 1 to 100 different recipes"),
        ("start", {"sizes": [SIZE | {"tokens": 0}]}, "tokens"),
        ("start", {"sizes": [SIZE | {"shape": []}]}, "shape"),
        ("start", {"sizes": "a"}, "sizes"),
        ("start", {"at_once": 0}, "at_once"),
        ("forecast", {"recipe": "b"}, "has begun"),
        ("forecast", {"low": 2.05}, "not in order"),
        ("forecast", {"curve": []}, "not in order"),
        ("forecast", {"curve": CURVE[::-1]}, "not in order"),
        ("forecast", {"curve": [BAND | {"tokens": 0}, BAND]}, "not in order"),
        ("forecast", {"curve": [BAND | {"low": 0.0}]}, "not in order"),
        ("forecast", {"curve": [BAND | {"high": float("nan")}]}, "high"),
        ("forecast", {"curve": [BAND | {"low": -1.0, "loss": -0.5}]}, "not in order"),
        ("forecast", {"curve": {"tokens": 1}}, "curve"),
        ("forecast", {"fit": {**LAW, "E": "x"}}, "E"),
        ("alert", {"recipe": "a"}, "a has not begun"),
        ("alert", {"kind": "odd"}, "odd"),
        ("alert", {"loss": -1.0}, "loss"),
        ("stop", {"reason": 5}, "reason"),
        ("other", {}, "unknown verb"),
    ],
    ids=str,
)
def test_what_is_beyond_its_bounds_is_refused_with_the_reason(verb: str, wrong: dict[str, Any], why: str):
    state = CampaignState() if verb == "start" else begun()
    event = ask(state, verb, GOOD.get(verb, {}) | wrong)
    assert isinstance(event, e.CampaignRequestRefused)
    assert why in event.why
    assert fold(state, 3.0, event).members == state.members


def test_a_forecast_does_not_change():
    state = begun()
    state = fold(state, 3.0, ask(state, "forecast", FORECAST))
    again = ask(state, "forecast", FORECAST | {"loss": 2.05})
    assert isinstance(again, e.CampaignRequestRefused)
    assert "does not change" in again.why
