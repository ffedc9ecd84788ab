"""A short run of the benchmark that kills daemons with SIGKILL."""

from pathlib import Path

from benchmarks.kill_soak import soak


def test_nothing_is_duplicated_lost_or_stuck_over_forty_kills(tmp_path: Path):
    figures = soak(kills=40, seed=3, folder=tmp_path)
    assert figures.kills == 40
    assert 0 < figures.at_effects < 40
    assert figures.torn > 0
    assert figures.evaluations > 0
    assert figures.clean, figures.table()
