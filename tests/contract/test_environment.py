"""Who a rank is, by the variables of whoever started it."""

import pytest

from opt_ops.contract.environment import (
    Place,
    RankEnvironmentError,
    of_rank,
    place_from_environment,
    rendezvous_from_slurm,
)


def test_the_place_comes_from_torchrun_or_slurm_or_nobody() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2"}
    assert place_from_environment(torchrun | slurm) == Place(5, 8, 1)
    assert place_from_environment(slurm) == Place(3, 4, 2)
    assert place_from_environment({}) == Place(0, 1, 0)
    del torchrun["MASTER_PORT"]
    with pytest.raises(RankEnvironmentError, match="MASTER_PORT is not"):
        place_from_environment(torchrun)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu7", "gpu7"), ("gpu-[003-010,12]", "gpu-003"), ("a1,b[2-3]", "a1"), ("c[9]", "c9")],
)
def test_slurm_tasks_meet_on_the_first_node_of_their_step(nodes: str, first: str) -> None:
    step = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2"}
    address, port = rendezvous_from_slurm(step)
    assert address == first
    assert 20_000 <= port < 32_000
    assert rendezvous_from_slurm(step | {"SLURM_STEP_ID": "3"})[1] != port


def test_a_rank_reads_what_the_agent_has_set() -> None:
    place = Place(rank=13, world=16, local_rank=5)
    variables = of_rank(place, local_world=8, address="10.0.0.7", port=23817, node="n3", attempt="1.00-a0")
    assert place_from_environment(variables) == place
    assert variables["TORCHELASTIC_RUN_ID"] == "1.00-a0"  # or Lightning takes its ranks from Slurm
    assert variables["OPT_OPS_NODE"] == "n3"
    assert all(isinstance(value, str) for value in variables.values())
