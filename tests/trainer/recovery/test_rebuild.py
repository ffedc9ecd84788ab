"""New groups under a living engine: training that is broken off anywhere goes on, and gives the same bits."""

from typing import Any

import pytest

from tests.ports import free_port
from tests.trainer.harness import Ranks
from tests.trainer.recovery.broken_steps import broken_at_each_collective
from tests.trainer.test_parallel import build

TINY = ("model.hidden_size=16", "data.seq_len=16", "data.global_batch=4", "data.micro_batch=1", "checksum_every=1")
LAYOUTS = {
    "dp2": (2, 1),
    "hsdp": (4, 1, "parallel.replicas=2"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_is_broken_off_anywhere_is_made_again_to_the_bit(ranks: Ranks, layout: str) -> None:
    dp, tp, *changes = LAYOUTS[layout]
    recipe = build(dp, tp, *TINY, *changes)
    found: list[dict[str, Any]] = ranks(dp * tp, broken_at_each_collective, recipe, [free_port(), free_port()])
    for rank in found:
        assert rank["collectives"] >= 4
        assert len(rank["errors"]) == rank["collectives"], "each break reached every rank"
        assert rank["history"] == rank["expected"]
        assert rank["state"]
