"""The vocabulary of a campaign's journal, the state it tells, and which size begins next."""

from dataclasses import replace

import pytest

from opt_ops.core.campaign import events as e
from opt_ops.core.campaign.equal import differing, must_be_equal
from opt_ops.core.campaign.state import CampaignState, fold, next_size
from opt_ops.core.campaign.values import Band, Law, Size
from opt_ops.core.events import kinds_of
from opt_ops.core.values import Shape

# Old journals hold these for ever. Adding one is fine; taking one away or renaming it is not.
FROZEN = [
    "campaign_alert",
    "campaign_alert_settled",
    "campaign_forecast",
    "campaign_member",
    "campaign_member_intended",
    "campaign_request_refused",
    "campaign_started",
    "campaign_stopped",
]
LAW = Law(E=1.7, A=400.0, alpha=0.34, B=410.0, beta=0.28)


def size(recipe: str, parameters: int, nodes: int = 1) -> Size:
    shape = Shape(nodes=nodes, spares=1, ranks_per_node=8)
    return Size(recipe=recipe, parameters=parameters, tokens=10**9, settings=(), shape=shape)


def started(*sizes: Size, at_once: int = 1) -> CampaignState:
    event = e.CampaignStarted(request="r", author="ann", campaign="c", sizes=sizes, data=(), at_once=at_once)
    return fold(CampaignState(), 1.0, event)


def forecast(recipe: str, loss: float) -> e.CampaignForecast:
    return e.CampaignForecast(
        request=f"f-{loss}",
        recipe=recipe,
        tokens=10**9,
        loss=loss,
        low=loss - 0.1,
        high=loss + 0.1,
        points=72,
        sizes=("a", "b", "c"),
        fit=LAW,
        fit_low=LAW,
        fit_high=LAW,
        curve=(Band(tokens=10**9, loss=loss, low=loss - 0.1, high=loss + 0.1),),
    )


def intended(recipe: str, lineage: str) -> e.CampaignMemberIntended:
    return e.CampaignMemberIntended(recipe=recipe, lineage=lineage, request=f"campaign-c-{lineage}")


def test_the_kinds_are_frozen():
    assert sorted(kinds_of(*e.CampaignEvent.__args__)) == FROZEN


def test_events_survive_the_way_through_json():
    alert = e.CampaignAlert(request="above-1", what=e.AlertKind.ABOVE, recipe="a", lineage="12", why="", loss=2.0)
    for event in (forecast("d", 2.3), started(size("a", 1)).started, intended("a", "12"), alert):
        assert e.CAMPAIGN.decode(e.CAMPAIGN.encode(event)) == event


def test_sizes_begin_in_order_and_no_more_than_so_many_at_once():
    state = started(size("a", 1), size("b", 2), at_once=2)
    first = next_size(state, training=0, free=None)
    assert first is not None
    assert first.recipe == "a"
    state = fold(state, 2.0, intended("a", "12"))
    assert next_size(state, training=0, free=None) is None, "an intent is settled first"
    state = fold(state, 3.0, e.CampaignMember(recipe="a", lineage="12"))
    assert next_size(state, training=2, free=None) is None
    second = next_size(state, training=1, free=None)
    assert second is not None
    assert second.recipe == "b"


@pytest.mark.parametrize(("free", "begins"), [(4, False), (5, True), (None, True)])
def test_a_size_waits_for_its_nodes_and_spares(free: int | None, begins: bool):
    assert (next_size(started(size("a", 1, nodes=4)), training=0, free=free) is not None) is begins


def test_a_number_that_somebody_has_taken_frees_the_size_for_another():
    state = fold(started(size("a", 1)), 2.0, intended("a", "12"))
    state = fold(state, 3.0, e.CampaignMember(recipe="a", lineage="12", asked=False))
    assert next_size(state, training=0, free=None) is not None


def test_the_first_forecast_stays():
    state = fold(started(size("a", 1)), 2.0, forecast("a", 2.3))
    state = fold(state, 3.0, forecast("a", 2.1))
    assert (state.forecasts["a"].event.loss, state.forecasts["a"].made) == (2.3, 2.0)


def test_a_stopped_campaign_begins_nothing():
    state = fold(started(size("a", 1)), 2.0, e.CampaignStopped(request="s", author="ann", reason=""))
    assert next_size(state, training=0, free=None) is None


def test_only_what_the_size_decides_may_differ():
    first = {"model.num_layers": 2, "optim.peak_lr": 1e-3, "optim.betas": (0.9, 0.95), "precision": "bf16"}
    assert differing(first, {**first, "model.num_layers": 4, "optim.peak_lr": 1e-4, "optim.betas": [0.9, 0.95]}) == []
    assert differing(first, {**first, "precision": "fp16"}) == [("precision", "bf16", "fp16")]
    assert [key for key, _, _ in differing(first, {**first, "data.seq_len": 64})] == ["data.seq_len"]


def test_data_and_tokenizer_must_be_equal():
    config = {"settings": {"optim": {"clip_norm": 1.0}}, "data": {"digest": "a", "tokenizer": "t", "sources": ["x"]}}
    other = {**config, "data": {**config["data"], "digest": "b", "sources": ["y"]}}
    assert differing(must_be_equal(config), must_be_equal(other)) == [("data digest", "a", "b")]
    assert replace(LAW, E=2.0).loss(1e9, 1e9) > LAW.loss(1e9, 1e9)
