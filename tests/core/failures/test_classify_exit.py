"""Why a rank ended, from what programs really print."""

import pytest

from opt_ops.core.failures.cause_lines import CauseLines
from opt_ops.core.failures.classify_exit import blame, last_words, why_ended
from opt_ops.core.values import RankExit


def ended(rank: int = 0, code: int | None = 1, at: float = 1.0) -> RankExit:
    return RankExit(rank=rank, node="n1", code=code, signal=None if code is not None else 9, at=at)


TAILS = {
    "out_of_memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "gpu_error": "RuntimeError: CUDA error: uncorrectable ECC error encountered",
    "storage": "OSError: [Errno 28] No space left on device",
    "communication": "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1970",
    "process_death": "ValueError: shapes do not match",
}


@pytest.mark.parametrize(("kind", "line"), TAILS.items())
def test_the_logs_own_words(kind: str, line: str):
    tail = f"step 12\n{line}\nwarning: something else\n"
    found = why_ended(ended(), tail)
    assert (found.kind, found.line) == (kind, line)


def test_gloos_words():
    line = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:43210"
    assert why_ended(ended(), line).kind == "communication"


@pytest.mark.parametrize(("code", "kind"), [(65, "checkpoint_refused"), (78, "user_error"), (84, "out_of_memory")])
def test_an_exit_code_that_names_its_class_outranks_the_log(code: int, kind: str):
    assert why_ended(ended(code=code), TAILS["communication"]).kind == kind


def test_a_killed_rank_says_nothing():
    found = why_ended(ended(code=None), "step 12\nstep 13\n")
    assert (found.kind, found.line) == ("process_death", "")


def test_what_a_rank_survived_is_no_cause():
    """It lost a peer once, went on in place, and is killed later."""
    lost = "lost a peer after step 386 in generation 3: [gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    log = [lost, "step 387: goes on in generation 4"]
    killed = ended(code=None)
    found = [each.line for each in CauseLines().add_all(log).found]
    assert why_ended(killed, last_words(killed, found)).kind == "process_death"
    found = [each.line for each in CauseLines().add_all(log[:1]).found]
    assert why_ended(killed, last_words(killed, found)).kind == "communication"


def test_the_first_to_fail_is_not_the_first_to_complain_about_a_peer():
    complaint, cause = ended(rank=0, at=1.0), ended(rank=3, at=1.2)
    failed = {complaint: TAILS["communication"], cause: TAILS["process_death"]}
    assert blame(failed).first is cause


def test_among_equals_the_earliest():
    failed = {ended(rank=5, at=2.0): "", ended(rank=7, at=1.5): ""}
    assert blame(failed).first.rank == 7
