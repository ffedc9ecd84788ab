"""New groups under a living engine: training that is broken off anywhere goes on, and gives the same bits."""

import shutil
from typing import Any

import pytest

from tests.ports import free_port
from tests.trainer.harness import Ranks
from tests.trainer.recovery.broken_steps import Break, broken_run, compiled_run, groups_kept, recovered_often
from tests.trainer.test_parallel import build
from trainer.recovery import rebuild

TINY = ("model.hidden_size=16", "data.seq_len=16", "data.micro_batch=1", "checksum_every=1")
ONE_LAYER = (*TINY, "model.num_layers=1", "data.global_batch=2")
ACCUMULATED = (*TINY, "model.num_layers=1", "data.global_batch=4")
# By name: dp, tp, how many collectives a step has at most, and settings.
LAYOUTS: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "dp": (2, 1, 8, ONE_LAYER),
    "accumulated": (2, 1, 11, ACCUMULATED),
    "replicas": (4, 1, 10, (*ACCUMULATED, "parallel.replicas=2")),
    "tp": (2, 2, 27, ONE_LAYER),
    "recomputed": (2, 1, 8, (*ONE_LAYER, "checkpoint_activations=true")),
    "fp16": (2, 1, 11, (*ACCUMULATED, "precision=fp16")),
}


def ports(count: int = 30) -> list[int]:
    """A generation needs a port of its own: the store of an earlier one is open for as long as a group is kept."""
    return [free_port() for _ in range(count)]


def broken(ranks: Ranks, layout: str, every: int = 1, most: int = 0, *more: str) -> list[dict[str, Any]]:
    """Training in which the first try of each step is broken off: at its first collective, at a later one, and so on.

    The rank that breaks it off changes. In some cases it goes on with a new engine, as a replacement does.

    Args:
        ranks: the processes.
        layout: of LAYOUTS.
        every: which collectives are taken: each, each second one.
        most: collectives of a step, if not those of LAYOUTS.
        more: settings.
    """
    dp, tp, known, changes = LAYOUTS[layout]
    places = range(0, most or known, every)
    world = dp * tp
    breaks = {
        step: Break((step - 1) % world, place, replaced=step // world % 2 == 1) for step, place in enumerate(places, 1)
    }
    found = ranks(world, broken_run, build(dp, tp, *changes, *more), ports(len(places) + 4), breaks, len(places) + 1)
    assert max(rank["collectives"] for rank in found) == (most or known), "each collective of a step was broken off"
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_is_broken_off_anywhere_is_made_again_to_the_bit(ranks: Ranks, layout: str) -> None:
    every = {"dp": 1, "tp": 9}.get(layout, 3)
    for rank in broken(ranks, layout, every):
        assert len(rank["errors"]) >= LAYOUTS[layout][2] // every - 1
        assert rank["history"], "losses and gradient norms"
        assert rank["state"]


def test_a_rank_that_is_a_step_ahead_goes_back(ranks: Ranks) -> None:
    """The last sum of a step arrives at some ranks, and others get an error instead."""
    dp, tp, most, changes = LAYOUTS["dp"]
    last = Break(1, most - 1, afterwards=True)
    found = ranks(dp * tp, broken_run, build(dp, tp, *changes), ports(), {2: last}, 3)
    assert [rank["repeated"] for rank in found] == [1, 0]
    assert all(rank["history"] and rank["state"] for rank in found)


@pytest.mark.soak
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_collective_of_two_layers_and_several_micro_batches(ranks: Ranks, layout: str) -> None:
    most = {"dp": 17, "accumulated": 17, "replicas": 15, "tp": 83, "recomputed": 20, "fp16": 17}[layout]
    for rank in broken(ranks, layout, 1, most, "model.num_layers=2", "data.global_batch=4"):
        assert rank["history"]
        assert rank["state"]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("aot_eager", marks=pytest.mark.soak), pytest.param("inductor", marks=pytest.mark.soak)],
)
def test_compiled_layers_stay_compiled(backend: str) -> None:
    """Their collectives find the new groups by name."""
    pool = Ranks()
    try:
        found = pool(2, compiled_run, build(1, 2, *ONE_LAYER, "compile=true"), ports(), backend)
    finally:
        pool.close()
    for rank in found:
        assert rank["graphs"] == [1, 1, 1, 1]
        assert rank["same"]


def test_recoveries_leave_nothing_behind(ranks: Ranks) -> None:
    for rank in ranks(2, recovered_often, build(2, 1, *ONE_LAYER), ports(), 6):
        for what, counts in rank.items():
            assert counts[-1] <= counts[1], what


@pytest.mark.parametrize(("dp", "tp", "replicas"), [(2, 1, 1), (4, 1, 2), (2, 2, 1)])
def test_the_engine_keeps_no_older_group(ranks: Ranks, dp: int, tp: int, replicas: int) -> None:
    """It fails when a new torch keeps groups in other places than those that are replaced."""
    recipe = build(dp, tp, *ONE_LAYER, f"data.global_batch={dp}", f"parallel.replicas={replicas}")
    for kept, unknown in ranks(dp * tp, groups_kept, recipe, ports()):
        assert kept >= 2
        assert unknown == 0


def test_this_torch_can_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rebuild.supported() is None
    monkeypatch.delattr("torch.distributed.fsdp.FSDPModule.reset_iter_state")
    assert "needs torch 2.13" in (rebuild.supported() or "")
