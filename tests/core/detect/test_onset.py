"""The digest of an onset: each kind of trouble leaves its own mark in it. The curves are drawn from seeds."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from opt_ops.core.detect.onset import Place, onset_digest
from opt_ops.core.detect.point import Point
from opt_ops.core.values import Optimizer
from tests.core.curve import curve


def bad_shard(step: int, point: Point) -> dict[str, Any]:
    return {"loss": point.loss + 1.5, "gnorm": point.gnorm * 6} if 500 <= step < 540 else {}


def edge(step: int, point: Point) -> dict[str, Any]:
    growing = math.exp(max(0, step - 300) / 100)
    unorms = {name: norm * growing for name, norm in (point.block_unorms or {}).items()} or None
    return {
        "loss": point.loss + max(0.0, step - 500) * 0.02,
        "gnorm": point.gnorm * growing,
        "block_unorms": unorms,
    }


@pytest.mark.parametrize("seed", range(5))
def test_a_bad_shard_comes_at_once_and_its_batches_are_known(seed: int):
    found = onset_digest(curve(seed, 560, bad_shard), 502, Place(first_step=1))
    assert found["step"] == 500, "the stated onset is two steps off"
    assert found["loss"]["at_once"] > 0.8
    assert found["gnorm"]["first"] > 3
    assert (found["data"]["batch"], found["data"]["last"], found["data"]["still"]) == (500, 539, False)
    assert found["growth"]["gnorm"]["ratio"] == pytest.approx(1.0, abs=0.2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_trouble_that_goes_on_is_told_from_trouble_that_is_over():
    assert onset_digest(curve(1, 530, bad_shard), 500, Place())["data"]["still"] is True


def test_a_shard_that_the_model_begins_to_learn_is_not_over():
    def learned(step: int, point: Point) -> dict[str, Any]:
        return {"loss": point.loss + 2 + 8 * math.exp((500 - step) / 3)} if step >= 500 else {}

    data = onset_digest(curve(1, 540, learned), 500, Place())["data"]
    assert (data["last"], data["still"]) == (540, True)


@pytest.mark.parametrize("seed", range(5))
def test_the_edge_of_stability_grows_for_hundreds_of_steps_before(seed: int):
    found = onset_digest(curve(seed, 560, edge), 505, Place(first_step=1))
    assert found["loss"]["at_once"] < 0.3
    for norm in ("gnorm", "unorm"):
        assert found["growth"][norm]["ratio"] > 1.8
        assert found["growth"][norm]["errors"] > 4


def test_a_block_that_changes_alone_is_named():
    def corrupt(step: int, point: Point) -> dict[str, Any]:
        if step < 500:
            return {}
        pnorms = {**point.block_pnorms, "layers.1": 27.0} if point.block_pnorms else None
        return {"loss": point.loss + 0.8, "block_pnorms": pnorms}

    odd = onset_digest(curve(3, 560, corrupt), 500, Place())["blocks"]["pnorm"]
    assert odd["block"] == "layers.1"
    assert odd["ratio"] == pytest.approx(1.32, abs=0.05)
    assert odd["others"] < 1.01
    assert odd["usual"] < 1.01

    def gone(step: int, point: Point) -> dict[str, Any]:
        lost = {k: v for k, v in (point.block_pnorms or {}).items() if k != "layers.2"}
        return {"block_pnorms": lost or None} if step >= 500 else {}

    odd = onset_digest(curve(3, 560, gone), 500, Place())["blocks"]["pnorm"]
    assert (odd["block"], odd["ratio"]) == ("layers.2", None)


def test_a_learning_rate_off_its_schedule_is_dated():
    def off(step: int, point: Point) -> dict[str, Any]:
        return {"lr": 2.5e-3, "loss": point.loss + max(0.0, step - 520) * 0.02} if step >= 480 else {}

    planned = Place(first_step=1, expected_lr=lambda step: 1e-3)
    found = onset_digest(curve(4, 560, off), 525, planned)["lr"]
    assert (found["value"], found["expected"], found["off_since"]) == (2.5e-3, 1e-3, 480)
    assert "off_since" not in onset_digest(curve(4, 560, bad_shard), 500, planned)["lr"]
    assert "expected" not in onset_digest(curve(4, 560, off), 525, Place())["lr"]


def test_what_changed_at_the_line_of_the_onset():
    def other(step: int, point: Point) -> dict[str, Any]:
        return {"batch": 2, "stage": "code", "betas": (0.9, 0.999)} if step >= 500 else {"stage": "web"}

    asked = Optimizer(betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0)
    found = onset_digest(curve(5, 560, other), 501, Place(optimizer=asked))
    assert found["optimizer"]["asked_betas"] == [0.9, 0.95]
    assert found["changed"]["batch"] == {"before": 8, "after": 2, "step": 500}
    assert found["changed"]["stage"]["after"] == "code"
    assert found["changed"]["betas"]["after"] == [0.9, 0.999]
    assert "changed" not in onset_digest(curve(5, 560), 400, Place())


def test_a_restored_state_is_compared_with_the_loss_that_was_due():
    lost = curve(6, 560)[500:]
    kept = curve(6, 500) + [replace(point, loss=point.loss + 0.4) for point in lost[:20]]
    found = onset_digest(kept, 501, Place(first_step=501, restored_from=500, due=lost))
    assert found["attempt"]["steps_in"] == 0
    assert found["attempt"]["due"]["apart"] == pytest.approx(0.4)
    assert found["attempt"]["due"]["noise"] < 0.1


def test_numbers_that_are_missing_leave_their_part_out():
    bare = [
        replace(p, gnorm=None, lr=0.0, betas=(), batch=None, block_gnorms=None, block_pnorms=None, block_unorms=None)
        for p in curve(7, 300)
    ]
    found = onset_digest(bare, 290, Place())
    assert set(found) == {"step", "points_before", "interval", "loss", "lr"}
    assert onset_digest([], 5, Place()) == {}
    dead = [replace(p, loss=None, gnorm=None, finite=False) if p.step >= 290 else p for p in curve(7, 300)]
    assert onset_digest(dead, 290, Place())["loss"] == {"finite": False}
