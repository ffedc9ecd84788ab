"""The energy meter: what counters gain, in accounts of ten minutes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core.health import Gpu, Heartbeat
from opt_ops.core.health.energy import EnergyMeter

BEAT = Heartbeat(node="n1", host="n1", ts=0.0, attempt=None, nvml="ok", gpus=(Gpu(index=0), Gpu(index=1)))


def beat(ts: float, joules: float | None, node: str = "n1", gpus: int = 2) -> Heartbeat:
    return replace(BEAT, node=node, ts=ts, energy_joules=joules, gpus=tuple(Gpu(index=i) for i in range(gpus)))


def test_accounts_come_every_ten_minutes_and_join_without_a_gap():
    meter = EnergyMeter()
    accounts = []
    for second in range(0, 1900, 2):
        for node in ("n1", "n2"):
            meter.add(beat(second, 700.0 * second, node))
        if account := meter.account(last=False):
            accounts.append(account)
    assert [(a.since, a.until, a.gpus) for a in accounts] == [(0, 600, 4), (600, 1200, 4), (1200, 1800, 4)]
    assert [a.joules for a in accounts] == [2 * 700.0 * 600] * 3
    rest = meter.account(last=True)
    assert rest is not None
    assert (rest.since, rest.until) == (1800, 1898)
    assert meter.account(last=True) is None


def test_a_counter_that_fell_or_a_gpu_that_is_gone_adds_nothing():
    meter = EnergyMeter()
    for ts, joules, gpus in ((0, 5e6, 2), (2, 100.0, 2), (4, 200.0, 2), (6, 150.0, 1), (8, 250.0, 1), (10, None, 1)):
        meter.add(beat(ts, joules, gpus=gpus))
    account = meter.account(last=True)
    assert account is not None
    assert account.joules == 100.0 + 100.0


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), min_size=2, max_size=60))
def test_whenever_it_is_asked_the_whole_is_what_the_counter_gained(gains: list[tuple[float, bool]]):
    meter, counter, total = EnergyMeter(), 0.0, 0.0
    for second, (gain, asked) in enumerate(gains):
        counter += gain
        meter.add(beat(400.0 * second, counter))
        if asked and (account := meter.account(last=False)):
            total += account.joules
    if rest := meter.account(last=True):
        total += rest.joules
    assert abs(total - (counter - gains[0][0])) < 1e-6


def test_nodes_without_counters_have_no_account():
    meter = EnergyMeter()
    for ts in range(0, 2000, 100):
        meter.add(beat(float(ts), None))
    assert meter.account(last=True) is None
