"""What is saved is the state of the save's step, in any layout; what cannot be trusted is refused."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor

from opt_ops.contract import manifest
from opt_ops.contract.environment import place_from_environment
from opt_ops.contract.fence import Fence
from opt_ops.contract.manifest import CheckpointError
from tests.trainer.harness import Ranks, engine_of
from tests.trainer.test_parallel import build, samples
from trainer import optim
from trainer.checkpoint import Checkpointer, Destination, Writer
from trainer.checkpoint.agree import on_all_ranks, on_rank_0, one_line
from trainer.errors import UserError
from trainer.parallel import mesh
from trainer.step.measured import Progress
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import advanced, forward_backward, measure

SAVED, LAST = 3, 8


class Training:
    """The trainer's parts on one rank, to be stepped by hand."""

    def __init__(
        self, folder: Path, dp: int, tp: int, *changes: str, writer: Writer | None = None, **destination: Any
    ) -> None:
        self.recipe = build(dp, tp, *changes)
        self.writer = writer or Writer()
        self.engine = engine_of(self.recipe)
        self.layout, self.model, self.optimizer = self.engine.layout, self.engine.model, self.engine.optimizer
        to = {"node": "n1", "fence": Fence(None, "1.00-a1")} | destination
        self.checkpointer = Checkpointer(
            self.writer, Destination(folder=folder, **to), self.engine.state(), "127.0.0.1"
        )
        self.progress = Progress()
        self.samples = samples(self.recipe)

    def step(self) -> float:
        step = self.progress.step + 1
        shares = forward_backward(self.engine, self.samples, self.recipe, self.progress)
        measured = measure(self.engine, shares, StepInputs())
        self.engine.update(measured.gnorm, optim.learning_rate(step, self.recipe.optim), measured.divisor)
        self.progress = advanced(self.progress, self.recipe)
        return measured.loss

    def save(self, digest: str = "sha256:0", durable: bool = True) -> None:
        self.checkpointer.save(
            {
                "step": self.progress.step,
                "attempt": "1.00-a1",
                "ts": 0.0,
                "layout": {"world": self.layout.world},
                "data_position": self.progress.data_position,
                "tokens": self.progress.tokens,
                "settings_digest": digest,
                "telemetry": {},
            },
            durable,
        )

    def load(self, path: Path) -> None:
        found = self.checkpointer.load(path)
        self.progress = Progress(step=found.step, data_position=found.data_position, tokens=found.tokens)

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's weights and moments, copied."""
        state = {}
        for name, p in self.model.named_parameters():
            state[name] = local(p)
            state |= {f"{name}.{key}": local(value) for key, value in self.optimizer.state[p].items()}
        return state


def local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def save_and_go_on(folder: Path, dp: int, tp: int) -> list[float]:
    training = Training(folder, dp, tp)
    losses = [training.step() for _ in range(SAVED)]
    training.save()
    losses += [training.step() for _ in range(LAST - SAVED)]
    assert training.checkpointer.wait()
    return losses[SAVED:]


def resume(folder: Path, dp: int, tp: int) -> dict[str, Any]:
    training = Training(folder, dp, tp)
    training.load(manifest.step_folder(folder, SAVED))
    live = optim.readback(training.optimizer)
    losses = [training.step() for _ in range(LAST - SAVED)]
    return {
        "losses": losses,
        "tied": training.model.lm_head.weight is training.model.embed_tokens.weight,
        "data_position": training.progress.data_position,
        "betas": live["betas"],
    }


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("dp2")
    return folder, ranks(2, save_and_go_on, folder, 2, 1)[0]


@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (1, 2), (2, 2), (1, 1)])
def test_training_goes_on_alike_in_every_layout(
    ranks: Ranks, saved: tuple[Path, list[float]], dp: int, tp: int
) -> None:
    folder, uninterrupted = saved
    for rank in ranks(dp * tp, resume, folder, dp, tp):
        exactly = (dp, tp) == (2, 1)
        assert rank["losses"] == (uninterrupted if exactly else pytest.approx(uninterrupted, rel=1e-5))
        assert rank["tied"]
        assert rank["data_position"] == LAST * build().data.global_batch


def test_a_checkpoint_of_both_kinds_of_shards_is_read_by_one_process(ranks: Ranks, tmp_path: Path) -> None:
    uninterrupted = ranks(4, save_and_go_on, tmp_path, 2, 2)[0]
    (alone,) = ranks(1, resume, tmp_path, 1, 1)
    assert alone["losses"] == pytest.approx(uninterrupted, rel=1e-5)


def shrink_and_grow(folder: Path, dp: int) -> list[float]:
    """Two updates more than the newest checkpoint in ``folder`` has, and a checkpoint."""
    training = Training(folder, dp, 1)
    if found := manifest.committed(folder):
        training.load(found[-1][1])
    losses = [training.step() for _ in range(2)]
    training.save()
    assert training.checkpointer.wait()
    return losses


def test_a_rank_fewer_and_then_again_all_of_them_is_the_same_training(ranks: Ranks, tmp_path: Path) -> None:
    losses = [loss for dp in (4, 3, 4) for loss in ranks(dp, shrink_and_grow, tmp_path / "changing", dp)[0]]
    alone = [loss for _ in range(3) for loss in ranks(1, shrink_and_grow, tmp_path / "alone", 1)[0]]
    assert losses == pytest.approx(alone, rel=1e-5)
    assert [manifest.verify(path).data_position for _, path in manifest.committed(tmp_path / "changing")] == [
        *(16, 32, 48)
    ]


def test_tied_weights_are_saved_once(saved: tuple[Path, list[float]]) -> None:
    folder, _ = saved
    index = FileSystemReader(manifest.step_folder(folder, SAVED)).read_metadata().state_dict_metadata
    assert "model.embed_tokens.weight" in index
    assert not [name for name in index if "lm_head" in name]


def save_held_back_until_the_next_update(folder: Path) -> list[str]:
    training = Training(folder, 2, 1)
    training.step()
    os.kill(training.writer.pid, signal.SIGSTOP)
    try:
        training.save()
        at_save = training.state()
        training.step()
    finally:
        os.kill(training.writer.pid, signal.SIGCONT)
    assert training.checkpointer.wait()
    after = training.state()
    training.load(manifest.step_folder(folder, 1))
    read = training.state()
    assert all(not torch.equal(at_save[name], after[name]) for name in at_save), "the second update changed nothing"
    return [name for name in at_save if not torch.equal(read[name], at_save[name])]


def test_updates_during_the_save_do_not_leak_into_it(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, save_held_back_until_the_next_update, tmp_path) == [[], []]


def saves_into_used_folders(folder: Path) -> dict[str, Any]:
    training = Training(folder, 2, 1)
    training.step()
    path = manifest.step_folder(folder, 1)
    first = training.layout.rank == 0
    found: dict[str, Any] = {}

    def save(digest: str) -> manifest.Manifest | None:
        training.save(digest)
        training.checkpointer.wait()  # on rank 0: until it is committed
        return manifest.verify(path) if first else None

    if first:
        path.mkdir()
        (path / "__7_0.distcp").write_bytes(b"of a wider layout, never finished")
        (path / "rank-0001.json").write_text("{}")
    save("sha256:0")
    found["leftovers"] = (path / "__7_0.distcp").exists()

    written = first and (path / "manifest.json").stat().st_mtime_ns
    save("sha256:0")
    found["kept"] = first and (path / "manifest.json").stat().st_mtime_ns == written

    other = save("sha256:1")
    found["replaced"] = other and other.settings_digest == "sha256:1"

    if first:
        os.truncate(path / ".metadata", 10)
    found["mended"] = save("sha256:1")
    return found


def test_a_folder_of_the_same_step_is_kept_only_if_it_is_whole_and_of_this_run(ranks: Ranks, tmp_path: Path) -> None:
    found, _ = ranks(2, saves_into_used_folders, tmp_path)
    assert not found["leftovers"], "files of an unfinished save were left among the new ones"
    assert found["kept"], "a good checkpoint of this step was written again"
    assert found["replaced"], "a checkpoint made under other settings was left in place"
    assert found["mended"], "a damaged checkpoint was left in place"


def saves_that_fail(folder: Path) -> list[tuple[bool, str | None]]:
    training = Training(folder, 2, 1)
    outcomes = []
    for room in (resource.RLIM_INFINITY, 1000, resource.RLIM_INFINITY):
        if training.layout.rank == 1:
            resource.prlimit(training.writer.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        dist.barrier()
        training.step()
        training.save()
        saved = training.checkpointer.wait()
        outcomes.append((saved, training.checkpointer.take_error()))
        assert training.checkpointer.take_error() is None, "told twice"
    return outcomes


def test_a_failed_save_leaves_no_marker_and_the_next_one_succeeds(ranks: Ranks, tmp_path: Path) -> None:
    manifest.step_folder(tmp_path, 1).write_text("a file where rank 0 needs a folder")
    for rank in ranks(2, saves_that_fail, tmp_path):
        (in_the_way, why), (written, too_large), good = rank
        assert not in_the_way
        assert why is not None
        assert why.startswith("[Errno 20] Not a directory")
        assert not written
        assert too_large is not None
        assert too_large.startswith("rank 1: ")
        assert good == (True, None)
    assert [step for step, _ in manifest.committed(tmp_path)] == [3]
    assert not manifest.step_folder(tmp_path, 2).exists(), "what cannot be used takes up room"


def loses_its_writer(folder: Path) -> list[bool]:
    training = Training(folder, 2, 1)
    training.step()
    if training.layout.rank == 1:
        os.kill(training.writer.pid, signal.SIGKILL)
    training.save()
    saved = [training.checkpointer.wait()]
    training.step()
    training.save()
    saved.append(training.checkpointer.wait())
    return [*saved, "has ended; only a restart" in (training.checkpointer.take_error() or "")]


def test_a_writer_that_dies_costs_checkpoints_and_not_the_training(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(2, loses_its_writer, tmp_path)
    assert second == [False, False, True]
    assert first[:2] == [False, False]
    assert manifest.committed(tmp_path) == []


def saves_beside_gpus(folder: Path) -> tuple[bool, str]:
    """A save on a host with GPUs, as far as the writer can tell. Returns whether it is good, and which GPUs it saw."""
    seen = folder / "seen"

    def available() -> bool:
        seen.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all of them"))
        return True

    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

    with pytest.MonkeyPatch.context() as patch:  # the writer is forked meanwhile, so only it keeps the patches
        patch.setattr(torch.cuda, "is_available", available)
        patch.setattr(torch.cuda, "current_stream", refuse)
        writer = Writer()
    training = Training(folder, 1, 1, writer=writer)
    training.step()
    training.save()
    return training.checkpointer.finish(), seen.read_text()


def test_the_writer_sees_no_gpu_and_uses_none(ranks: Ranks, tmp_path: Path) -> None:
    """Torch's writer of files asks for a CUDA stream where it finds a GPU. In exclusive mode that fails every save."""
    assert ranks(1, saves_beside_gpus, tmp_path) == [(True, "")]


def fails_on_one(fails: int) -> list[str]:
    mesh.start(place_from_environment(os.environ), 2, 1)
    rank, outcomes = dist.get_rank(), []

    def work() -> str:
        if rank == fails:
            raise ZeroDivisionError("nobody foresaw it")
        return f"from {rank}"

    for agree in (on_rank_0, on_all_ranks, on_all_ranks):
        try:
            outcomes.append(str(agree(None, work)))
        except RuntimeError as error:
            outcomes.append(str(error))
    return [*outcomes, str(on_all_ranks(None, lambda: rank))]


@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_that_nobody_foresaw_is_one_on_all_ranks_and_does_not_part_them(ranks: Ranks, fails: int) -> None:
    why = "ZeroDivisionError: nobody foresaw it"
    assert ranks(2, fails_on_one, fails) == [[why if fails == 0 else "from 0", why, why, "[0, 1]"]] * 2


def test_why_a_save_failed_is_told_in_one_line_that_is_not_long() -> None:
    told = one_line(OSError("first line\n\n  second line " + 1000 * "x"))
    assert told.startswith("first line second line xxx")
    assert len(told) == 300
    assert one_line(TimeoutError()) == "TimeoutError()", "empty"


def refusal(folder: Path, *changes: str) -> str:
    training = Training(folder, 2, 1, *changes)
    before = training.state()
    try:
        training.load(manifest.step_folder(folder, SAVED))
    except (CheckpointError, UserError) as error:
        after = training.state()
        assert all(torch.equal(before[name], after[name]) for name in before), "refused, but read"
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_damage_is_refused_on_all_ranks_before_anything_is_read(
    ranks: Ranks, saved: tuple[Path, list[float]], tmp_path: Path
) -> None:
    folder, _ = saved
    copy = manifest.step_folder(tmp_path, SAVED)
    copy.mkdir()
    for file in manifest.step_folder(folder, SAVED).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    content = bytearray((copy / "__1_0.distcp").read_bytes())
    content[-100] ^= 4
    (copy / "__1_0.distcp").write_bytes(content)
    for message in ranks(2, refusal, tmp_path):
        assert message.startswith("CheckpointError")
        assert "the content of __1_0.distcp has changed" in message


def test_another_model_is_refused_with_the_first_difference(ranks: Ranks, saved: tuple[Path, list[float]]) -> None:
    folder, _ = saved
    for message in ranks(2, refusal, folder, "model.num_layers=3"):
        assert message.startswith("UserError")
        assert "model.layers.2.fc1.bias is absent there and (128,) here" in message


def test_settings_of_the_optimizer_never_come_from_a_checkpoint(ranks: Ranks, saved: tuple[Path, list[float]]) -> None:
    folder, _ = saved
    assert ranks(2, betas_after_load, folder) == [[0.8, 0.9]] * 2


def betas_after_load(folder: Path) -> list[float]:
    training = Training(folder, 2, 1, "optim.betas=0.8,0.9")
    training.load(manifest.step_folder(folder, SAVED))
    training.step()
    return optim.readback(training.optimizer)["betas"]
