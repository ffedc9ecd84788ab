"""The daemon killed at random moments over failures on the real Slurm: nothing twice, nothing lost."""

from pathlib import Path

import pytest

from benchmarks.slurm_soak import soak
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_three_kills(tmp_path: Path, slurm: Cluster):
    figures = soak(kills=3, seed=1, folder=tmp_path)
    assert figures.clean, figures
    assert figures.kills == 3
    assert figures.requests == 4
