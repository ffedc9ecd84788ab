"""Every word of Slurm has a meaning for us, or is unknown: recorded answers, and any word at all."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.adapters.slurm import answers
from opt_ops.adapters.slurm.answers import OurJob, state_of, time_of
from opt_ops.adapters.slurm.states import Job, job_state, unfit
from opt_ops.core import events as e
from opt_ops.core.values import HOLDING, AllocationStatus
from opt_ops.errors import SchedulerUnavailable
from opt_ops.supervise.watch_allocation import AllocationWatch
from tests.adapters.slurm_stand_in import Answer, StandIn
from tests.core.story import Story

RECORDS = Path(__file__).parent / "slurm_records"
FORGOTTEN = "slurm_load_jobs error: Invalid job id specified"


def rows(name: str) -> list[Any]:
    with (RECORDS / name).open(encoding="utf-8") as file:
        return [
            pytest.param(row, id=f"{row.get('id') or row['version']}-{row.get('name') or ''}")
            for row in csv.DictReader(file)
        ]


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(answers, "ask", stand_in.ask)
    return stand_in


def observed(story: Story, allocation: Any, job: OurJob) -> list[e.Event]:
    """What the watch over the job makes of the answer."""
    scheduler = SimpleNamespace(state=lambda *_: state_of(job, {}), jobs=list)
    training = SimpleNamespace(last=lambda _: None, report_progress=lambda _: ())
    clock = SimpleNamespace(monotonic=lambda: 0.0, now=lambda: story.now)
    events = list(AllocationWatch(scheduler, training, clock).observe(story.state))
    for event in events:
        story.write(event)
    return events


@pytest.mark.parametrize("row", rows("job_states.csv"))
def test_what_squeue_and_sacct_say_of_a_job(row: dict[str, str], slurm: StandIn):
    story = Story()
    if row["phase"] == "after_running":
        story.training(450)
    else:
        story.begin()
        story.see(e.AllocationSubmitted(allocation=story.state.allocation.name, job="77", adopted=False))
    allocation = story.state.allocation
    nodes, number = ",".join(allocation.nodes), allocation.job

    def record(line: str, *keys: str) -> list[dict[str, str]]:
        values = line.replace("JOB", number).replace("NODES", nodes).split("|", len(keys) - 1)
        return [dict(zip(keys, values, strict=True))] if line else []

    slurm.squeue = Answer(
        record(row["squeue_out"], "job", "state", "nodes", "ends", "reason"),
        row["squeue_err"] if row["squeue_rc"] != "0" else "",
    )
    slurm.sacct = Answer(
        record(row["sacct_out"], "state", "nodes", "reason"), row["sacct_err"] if row["sacct_rc"] != "0" else ""
    )
    events = observed(story, allocation, OurJob(number=number))
    after = story.state.allocations[allocation.name]
    signals = [event for event in events if isinstance(event, e.SignalRaised)]
    if row["wanted"].startswith("held"):
        assert not signals
        assert after.status in HOLDING
        assert after.nodes == allocation.nodes
    elif row["wanted"] == "ended":
        assert (after.status, after.reason) == (AllocationStatus.ENDED, row["why"])
        assert len(signals) == 1
    else:
        assert row["wanted"] == "queued"
        assert after.pending
        assert len(events) == 1
        assert after.unknown_since is None


@pytest.mark.parametrize("row", rows("node_states.csv"))
def test_what_sinfo_says_of_a_node(row: dict[str, str]):
    why = unfit(row["word"], row["reason"])
    assert bool(why) == (row["wanted"] == "unfit")
    if why and row["reason"] != "none":
        assert why.endswith(row["reason"])


@pytest.mark.parametrize("row", rows("versions.csv"))
def test_what_each_version_says(row: dict[str, str], slurm: StandIn):
    command, sample, meaning = row["command"], row["sample"].split(" (")[0], row["meaning wanted"]
    if command.startswith("sinfo") and "%N|%T|%E" in command:
        _, word, reason = sample.split("|")
        assert bool(unfit(word, reason)) == meaning.startswith("unfit")
    elif command.startswith("scontrol"):
        state, _, reason = sample.removeprefix("State=").partition(" … Reason=")
        assert unfit(state, reason).endswith(reason)
    elif "%i|%T|%N|%e|%r" in command and "|" in sample:
        slurm.squeue = Answer([dict(zip(("job", "state", "nodes", "ends", "reason"), sample.split("|"), strict=True))])
        state = state_of(OurJob(number="4711"), {})
        begins = {"runs": "running", "ours": "suspended", "queued": "queued", "on": "running"}
        assert state.status == begins[meaning.split()[0].rstrip(";")]
        assert (state.ends_at is not None) == meaning.startswith("runs")


def test_words_in_other_forms():
    assert unfit("IDLE+DRAIN", "x").endswith("x")
    assert unfit("MIXED+CLOUD", "none") == ""
    assert "does not respond" in unfit("IDLE+CLOUD+NOT_RESPONDING", "none")
    assert "powering down" in unfit("mix%", "none")
    assert unfit("alloc#", "none") == ""
    assert job_state("CANCELLED by 1000") == (Job.ENDED, "CANCELLED")
    assert job_state("cancelled+") == (Job.ENDED, "CANCELLED")
    assert job_state("PD") == (Job.QUEUED, "PENDING")
    assert job_state("RUNNING,STOPPED") == (Job.SUSPENDED, "STOPPED")
    assert job_state("CANCELLED,COMPLETING") == (Job.LEAVING, "COMPLETING")
    assert job_state("LEVITATING") is None


def test_the_words_of_the_manual_pages_are_all_there():
    words = """
        BOOT_FAIL CANCELLED COMPLETED CONFIGURING COMPLETING DEADLINE EXPEDITING FAILED LAUNCH_FAILED NODE_FAIL
        OUT_OF_MEMORY PENDING POWER_UP_NODE PREEMPTED RECONFIG_FAIL REQUEUED REQUEUE_FED REQUEUE_HOLD RESIZING
        RESV_DEL_HOLD REVOKED RUNNING SIGNALING SPECIAL_EXIT STAGE_OUT STOPPED SUSPENDED TIMEOUT UPDATE_DB
    """
    assert [word for word in words.split() if job_state(word) is None] == []


def test_a_node_that_is_listed_once_for_each_partition_has_one_reason(slurm: StandIn):
    slurm.squeue = Answer([{"job": "7", "state": "RUNNING", "nodes": "gpu[01-02]", "ends": "N/A"}])
    slurm.nodes = [("gpu01", "mixed", "none"), ("gpu02", "drng", "fan\nsecond line"), ("gpu02", "drng", "fan")]
    assert state_of(OurJob(number="7"), {}).unfit == {"gpu02": "slurm_drng: fan"}


def test_a_suspended_job_keeps_its_nodes_and_has_no_time_limit(slurm: StandIn):
    slurm.squeue = Answer([{"job": "7", "state": "SUSPENDED", "nodes": "gpu[01-02]", "ends": "1796119200"}])
    state = state_of(OurJob(number="7"), {})
    assert (state.status, state.nodes, state.ends_at) == (AllocationStatus.SUSPENDED, ("gpu01", "gpu02"), None)


def test_a_mark_that_says_nothing_about_nodes(slurm: StandIn):
    slurm.squeue = Answer([{"job": "7", "state": "UPDATE_DB", "nodes": "gpu01", "ends": "N/A"}])
    assert state_of(OurJob(number="7"), {}).status is AllocationStatus.RUNNING
    slurm.squeue = Answer([{"job": "7", "state": "UPDATE_DB", "ends": "N/A"}])
    assert state_of(OurJob(number="7"), {}).status is AllocationStatus.QUEUED


class TestNumbersThatBeginAnew:
    """The controller lost its state: job 1 is another job now."""

    OLD, NEW = "1796119000", "1796119011"

    def test_the_accounts_of_an_older_job_do_not_end_ours(self, slurm: StandIn):
        ours, seen = OurJob(number="1", name="opt-ops-1-n1", since=1796119010.0), {}
        slurm.squeue = Answer(
            [{"job": "1", "state": "RUNNING", "nodes": "gpu01", "name": "opt-ops-1-n1", "submitted": self.NEW}]
        )
        slurm.sacct = Answer([{"state": "CANCELLED by 0", "name": "opt-ops-1-n0", "submitted": self.OLD}])
        assert state_of(ours, seen).status is AllocationStatus.RUNNING
        slurm.squeue = Answer()  # for a moment, as the controller restarts
        with pytest.raises(SchedulerUnavailable):
            state_of(ours, seen)
        for name in ("", "opt-ops-1-n1"):  # the same lineage of a folder that was deleted
            slurm.sacct.records[0]["name"] = name
            with pytest.raises(SchedulerUnavailable):
                state_of(ours, seen)
        slurm.sacct.records[0]["submitted"] = self.NEW
        assert state_of(ours, seen).reason == "CANCELLED"

    def test_a_daemon_that_has_not_seen_the_job_goes_by_name_and_time(self, slurm: StandIn):
        ours = OurJob(number="1", name="opt-ops-1-n1", since=1796119010.0)
        slurm.sacct = Answer([{"state": "CANCELLED by 0", "name": "opt-ops-1-n1", "submitted": self.OLD}])
        assert state_of(ours, {}).reason == "CANCELLED", "clocks differ"
        slurm.sacct.records[0]["name"] = ""
        with pytest.raises(SchedulerUnavailable):
            state_of(ours, {})

    def test_another_job_with_our_number_is_the_end_of_ours(self, slurm: StandIn):
        slurm.squeue = Answer(
            [{"job": "1", "state": "RUNNING", "nodes": "gpu01", "name": "interactive", "submitted": self.NEW}]
        )
        state = state_of(OurJob(number="1", name="opt-ops-1-n1", since=1796119010.0), {})
        assert (state.status, state.reason) == (AllocationStatus.ENDED, "FORGOTTEN")


@pytest.mark.parametrize("word", ["RUNNING", "PENDING", "SUSPENDED", "COMPLETING", "nonsense", ""])
def test_what_the_controller_has_forgotten_does_not_run_whatever_the_accounts_say(slurm: StandIn, word: str):
    slurm.squeue = Answer(error=FORGOTTEN)
    slurm.sacct = Answer([{"state": word, "nodes": "gpu[01-02]"}])
    state = state_of(OurJob(number="4711"), {})
    assert (state.status, state.reason) == (AllocationStatus.ENDED, "FORGOTTEN")
    slurm.sacct = Answer(error="slurmdbd: Connection refused")
    assert state_of(OurJob(number="4711"), {}).reason == "FORGOTTEN"


TEXT = st.text(max_size=40) | st.sampled_from(
    ["N/A", "(null)", "9" * 400, "0", "-1", "10000-01-01T00:00:00", "|", "\0"]
)
WORD = TEXT | st.sampled_from(
    ["RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "COMPLETED", "running", "CANCELLED by"]
)


@given(
    state=WORD,
    nodes=TEXT,
    ends=TEXT,
    submitted=TEXT,
    name=TEXT,
    reason=TEXT,
    node=st.tuples(TEXT, TEXT, TEXT),
    other=WORD,
)
def test_any_word_in_any_column_is_a_state_or_unknown(node: tuple[str, str, str], other: str, **fields: str):
    stand_in = StandIn(Answer([{"job": "7", **fields}]), Answer([{**fields, "state": other}]), [node])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "ask", stand_in.ask)
        try:
            state = state_of(OurJob(number="7", name="opt-ops-1-n0", since=1796119010.0), {})
        except SchedulerUnavailable:
            return
    assert isinstance(state.status, AllocationStatus)
    assert state.ends_at is None or 0 < state.ends_at < 1e12


@given(st.text())
def test_any_line_at_all_is_a_state_or_unknown(line: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "ask", lambda *_, **__: line.splitlines())
        with contextlib.suppress(SchedulerUnavailable):
            state_of(OurJob(number="7"), {})
    unfit(line, line)


def test_the_hour_that_a_change_of_the_clocks_repeats_is_told_apart():
    """Slurm is asked for seconds since the epoch: local time has two moments with one name."""
    assert time_of("1792890000") == 1792890000.0
    assert time_of(" 1792893600 \n") == 1792893600.0
    for none in ("", "N/A", "NONE", "Unknown", "UNLIMITED", "0", "2026-13-01T00:00:00"):
        assert time_of(none) is None
