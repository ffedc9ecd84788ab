"""Drills on ranks: what a request hits, who injects it, and which ranks are spared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from opt_ops.cli.drill import Place
from opt_ops.contract.drills import IN_STEP
from opt_ops.core import events as e
from opt_ops.core.decide.drills import drill_behind
from opt_ops.core.state.model import State
from opt_ops.core.values import Shape, Tier
from opt_ops.ports import Request
from opt_ops.supervise.executor import Site, orders_of
from opt_ops.supervise.operator_requests import event_of
from tests.core.story import Story

SITE = Site(folder="/runs/12", trainer=("python", "-m", "trainer"))


def trained(*capabilities: str) -> Story:
    """Four nodes of two ranks that train."""
    story = Story(shape=Shape(nodes=4, spares=1, ranks_per_node=2))
    story.begin()
    story.hold("n1", "n2", "n3", "n4", "n5")
    story.train(20)
    attempt = story.state.attempt
    assert attempt is not None
    able = replace(attempt, capabilities=capabilities)
    story.state = replace(story.state, attempts={**story.state.attempts, attempt.name: able})
    return story


def asked(state: State, **arguments: Any) -> Any:
    return event_of(state, Request(request="r", author="ann", verb="drill", arguments=arguments))


@pytest.mark.parametrize(
    ("arguments", "hit"),
    [
        ({"fault": "kill-rank", "rank": 3}, {"rank": 3}),
        ({"fault": "kill-rank", "rank": 3, "in_step": "copy"}, {"rank": 3, "in_step": "copy"}),
        ({"fault": "kill-node", "node": "n3"}, {"node": "n3", "ranks": [4, 5]}),
        ({"fault": "kill-pair", "rank": 1}, {"ranks": [1, 5]}),
        ({"fault": "slow-standby", "seconds": 90}, {"seconds": 90.0}),
    ],
    ids=lambda value: value.get("fault", "") if isinstance(value, dict) else "",
)
def test_what_a_drill_hits(arguments: dict[str, Any], hit: dict[str, Any]):
    assert asked(trained("members").state, **arguments).arguments == hit


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"fault": "kill-rank", "rank": 8}, "has ranks 0 to 7"),
        ({"fault": "kill-rank", "rank": 3, "in_step": "lunch"}, "none of forward, backward"),
        ({"fault": "kill-rank", "rank": 3, "in_step": "copy"}, "cannot be replaced in place"),
        ({"fault": "kill-node", "node": "n5"}, "no rank of 12.00-a0 runs on n5"),
        ({"fault": "slow-standby", "seconds": 90}, "cannot be replaced in place"),
        ({"fault": "slow-standby", "seconds": 0}, "must be above 0"),
    ],
    ids=["rank", "place", "no-members", "spare", "slow", "zero"],
)
def test_what_a_drill_cannot_hit_is_refused(arguments: dict[str, Any], why: str):
    able = () if "cannot be replaced" in why else ("members",)
    assert why in asked(trained(*able).state, **arguments).why


def test_a_rank_that_kills_itself_is_not_killed_by_its_agent():
    story = trained("members")
    story.see(asked(story.state, fault="kill-rank", rank=3, in_step="update"))
    assert orders_of(story.state, SITE).drills == (), "the trainer reads it in drill.json"
    story.see(asked(story.state, fault="kill-pair", rank=0))
    assert [each.fault for each in orders_of(story.state, SITE).drills] == ["kill-pair"]


def test_who_takes_the_place_of_a_killed_rank_is_spared_and_dies_of_no_drill():
    story = trained("members")
    story.see(asked(story.state, fault="kill-rank", rank=2))
    assert len(orders_of(story.state, SITE).drills) == 1
    death = e.SignalRaised(
        signal="process_death",
        tier=Tier.ACT,
        attempt="12.00-a0",
        step=20,
        onset_step=None,
        at=story.now + 1,
        rule="a rank ended",
        evidence={"rank": 2, "signal": 9},
    )
    assert drill_behind(story.state, death) == "d000"
    story.now += 1
    nodes = ("n1", "n5", "n3", "n4")
    story.see(e.MembersIntended(attempt="12.00-a0", generation=2, nodes=nodes, new=(2, 3), incident=None))
    assert orders_of(story.state, SITE).drills == ()
    story.now += 1
    story.see(e.MembersJoined(attempt="12.00-a0", generation=2, step=20, at=story.now))
    assert drill_behind(story.state, death) == "d000", "it is told late"
    assert drill_behind(story.state, replace(death, at=story.now + 1)) is None


def test_the_command_offers_the_places_of_the_contract():
    assert tuple(Place) == IN_STEP
