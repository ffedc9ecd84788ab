import pytest

from benchmarks.fleet import FAULTS, measure, show


def test_a_real_daemon_answers_what_the_feeder_puts_in(capsys: pytest.CaptureFixture[str]):
    measured = measure(4, rounds=1, seconds=0.0, kinds=("xid", "nan"), speed=4.0)
    # That each was taken for what it is, `measure` has seen to; a tick is half a second, and other work may slow it.
    assert {kind: len(delays) for kind, delays in measured.delays.items()} == {"xid": 1, "nan": 1}
    assert all(0.0 < delay < 60.0 for delays in measured.delays.values() for delay in delays)
    first, last = measured.uses[0], measured.uses[-1]
    assert last.at - first.at > 5.0
    assert 0.0 < last.daemon - first.daemon <= last.machine - first.machine + 1.0
    assert 0.0 < first.resident <= measured.peak + 1.0
    # Four nodes of eight GPUs, twice a second each, and no more than the time allows.
    assert measured.readings >= 4 * 8 * 2 * 5
    show([measured])
    assert "| 4 | bad_gpu | 1 |" in capsys.readouterr().out
    assert FAULTS["xid"] == "bad_gpu"
