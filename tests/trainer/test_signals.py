"""What a supervisor, Slurm or a person does to running ranks with signals."""

import re
import signal
from pathlib import Path

from opt_ops.contract import manifest
from tests.trainer.harness import finish, settings, start, telemetry, wait_for, waits
from tests.trainer.test_train import arguments, wait_for_step

ENDLESS = settings("steps=100000", "checkpoint_every=100000")


def test_sigusr1_to_any_rank_saves_and_training_goes_on(text: Path, tmp_path: Path) -> None:
    ranks = start(2, *arguments(tmp_path, text, "a1", *ENDLESS))
    checkpoints = tmp_path / "checkpoints"
    wait_for_step(tmp_path / "a1", 3)
    for saves, asked in enumerate(ranks, start=1):
        asked.send_signal(signal.SIGUSR1)
        wait_for(lambda saves=saves: len(manifest.committed(checkpoints)) == saves, f"no checkpoint {saves}")
        step, path = manifest.committed(checkpoints)[-1]
        assert manifest.verify(path).telemetry["num_updates"] == step
        wait_for_step(tmp_path / "a1", step + 20)
        assert len(manifest.committed(checkpoints)) == saves, "one request, one save"
    for process in ranks:
        process.send_signal(signal.SIGTERM)
    assert [process.returncode for process in finish(ranks)] == [143, 143]


def test_requests_during_start_up_are_remembered_and_are_one_save(text: Path, tmp_path: Path) -> None:
    held = {signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)  # inherited: what comes too early for the child waits for it
    try:
        ranks = start(
            2, *arguments(tmp_path, text, "a1", *settings("steps=12", "checkpoint_every=100")), fresh=range(2)
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
    for process in ranks:
        process.send_signal(signal.SIGUSR1)
    wait_for((tmp_path / "a1").exists, "no run folder")  # handlers are in place, the group is not
    for _ in range(3):
        ranks[0].send_signal(signal.SIGUSR1)
    assert [process.returncode for process in finish(ranks)] == [0, 0]
    assert [step for step, _ in manifest.committed(tmp_path / "checkpoints")] == [1, 12]


def dumps(folder: Path, rank: int) -> list[str]:
    """The finished dumps of a rank."""
    path = folder / "a1" / "stacks" / f"rank-{rank:04d}.txt"
    *finished, _ = re.split(r"^end of dump \d+\.\d{3}\n", path.read_text(), flags=re.MULTILINE)
    return finished


def test_sigusr2_dumps_the_stacks_of_a_rank_that_is_blocked_in_a_collective(text: Path, tmp_path: Path) -> None:
    # Ignored as if inherited from an agent that protects what it starts.
    ranks = start(2, *arguments(tmp_path, text, "a1", *ENDLESS), ignored=(signal.SIGUSR2,))
    wait_for_step(tmp_path / "a1", 3)
    ranks[1].send_signal(signal.SIGSTOP)
    wait_for(lambda: waits(ranks[0]), "rank 0 does not wait for a stopped peer")
    steps = len(telemetry(tmp_path / "a1"))
    for count in (1, 2):
        # faulthandler is not yet there again when the end of its dump is written
        wait_for(lambda: waits(ranks[0]), "rank 0 does not wait for a stopped peer")
        ranks[0].send_signal(signal.SIGUSR2)
        wait_for(lambda count=count: len(dumps(tmp_path, 0)) == count, f"no dump {count}")
    for dump in dumps(tmp_path, 0):
        assert dump.count("Current thread 0x") == 1
        main_thread = dump.split("Current thread")[1]
        assert "distributed_c10d.py" in main_thread or "fsdp" in main_thread
        assert "loop.py" in main_thread
        assert "in train\n" in main_thread
        assert "in _handle" in dump, "other threads, too"
    assert dumps(tmp_path, 1) == []
    ranks[1].send_signal(signal.SIGCONT)
    wait_for_step(tmp_path / "a1", steps + 10)
    for process in ranks:
        process.send_signal(signal.SIGTERM)
    assert [process.stderr for process in finish(ranks)] == ["stopped by SIGTERM\n"] * 2
