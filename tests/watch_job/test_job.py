"""What scontrol and sacct say of a job, in many shapes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.adapters.slurm.states import Job
from opt_ops.errors import NotFound, SchedulerUnavailable, UsageError
from opt_ops.watch_job import job as job_module
from opt_ops.watch_job.job import job_of

TASK = """JobId=815 ArrayJobId=812 ArrayTaskId=3 JobName=a b JobState=FAILED
   UserId=ann(1000) GroupId=ann(1000) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=gpu[001-002]
   BatchHost=gpu001.example
   NumNodes=2 NumCPUs=4 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   Command=/home/ann/train.sh
   WorkDir=/home/ann/the run
   StdErr=/home/ann/the run/err-%A_%a-%N.txt
   StdIn=/dev/null
   StdOut=out/%5j-%x-%u.txt
   Power=

"""


def said(monkeypatch: pytest.MonkeyPatch, text: str, accounts: list[str] | str = "down") -> list[tuple[str, ...]]:
    asked: list[tuple[str, ...]] = []

    def ask(*command: str) -> list[str]:
        asked.append(command)
        if command[0] == "scontrol":
            if text.startswith("error"):
                raise SchedulerUnavailable(f"scontrol: {text}")
            return [line for line in text.splitlines() if line]
        if isinstance(accounts, str):
            raise SchedulerUnavailable(f"sacct: {accounts}")
        return accounts

    monkeypatch.setattr(job_module, "ask", ask)
    return asked


def test_a_task_of_an_array(monkeypatch: pytest.MonkeyPatch):
    asked = said(monkeypatch, TASK)
    found = job_of("812_3")
    assert (found.word, found.meaning, found.nodes, found.code) == ("RUNNING", Job.HOLDS, "gpu[001-002]", 0)
    assert found.name == "a b JobState=FAILED", "a name is a name, whatever it says"
    folder = Path("/home/ann/the run")
    job_name = found.name
    assert found.logs == (folder / f"out/00815-{job_name}-ann.txt", folder / "err-812_3-gpu001.txt")
    assert asked == [("scontrol", "show", "job", "812_3")]


def test_several_tasks_must_be_told_apart(monkeypatch: pytest.MonkeyPatch):
    said(monkeypatch, TASK + TASK.replace("815", "816").replace("TaskId=3", "TaskId=4"))
    with pytest.raises(UsageError, match="array of 2 tasks"):
        job_of("812")


def test_what_only_the_accounts_know(monkeypatch: pytest.MonkeyPatch):
    row = "812|CANCELLED by 1000|0:15|gpu001|/home/ann|train|%j.out|"
    said(monkeypatch, "error: Invalid job id specified", ["811|FAILED|1:0|n|/|x||", row])
    found = job_of("812")
    assert (found.word, found.ended, found.signal, found.logs) == ("CANCELLED", True, 15, (Path("/home/ann/812.out"),))
    said(monkeypatch, "error: Invalid job id specified", [])
    with pytest.raises(NotFound):
        job_of("812")
    said(monkeypatch, "error: Unable to contact slurm controller", [row])
    with pytest.raises(SchedulerUnavailable):
        job_of("812")


@pytest.mark.parametrize("number", ["", "-a", "8;id", "812 813", "../8", "$(id)", "9" * 40])
def test_what_is_no_number(number: str):
    with pytest.raises(UsageError):
        job_of(number)


@given(
    st.lists(st.sampled_from([*TASK.splitlines(), "", "=", "a=", "JobId=1", "JobState=", "x y", "é=\0"]), max_size=20)
)
def test_any_answer_is_an_answer_or_none(lines: list[str]):
    with pytest.MonkeyPatch.context() as patch:
        said(patch, "\n".join(lines))
        with suppress(SchedulerUnavailable, UsageError, NotFound):
            job_of("812")
