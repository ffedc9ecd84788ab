"""The settings of a GPU, as far as a host without one can tell, and what they cost on a CPU."""

import gc
import json
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from opt_ops.contract.environment import Place, place_from_environment
from opt_ops.contract.fence import Fence
from tests.trainer.harness import REPOSITORY, SMALL, Ranks, engine_of, settings, telemetry, train
from tests.trainer.test_parallel import build, samples
from trainer import device
from trainer.checkpoint import Checkpointer, Destination, Writer, staging
from trainer.errors import UserError
from trainer.parallel import mesh
from trainer.step.measured import Progress
from trainer.step.step import advanced, forward_backward

CUDNN, FLASH = 3, 1  # as torch numbers the attention kernels


def test_all_of_it_is_one_short_file() -> None:
    assert len(Path(device.__file__).read_text().splitlines()) <= 120


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A host with two GPUs that exist in name only."""
    order = torch._C._get_sdp_priority_order()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    yield
    torch._C._set_sdp_priority_order(order)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("capability", "first"), [((9, 0), CUDNN), ((8, 0), FLASH), ((10, 0), FLASH), ((7, 0), FLASH)])
def test_cudnn_attention_comes_first_on_hopper_only(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], first: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device.select(0)
    order = torch._C._get_sdp_priority_order()
    assert order[0] == first
    assert sorted(order) == list(range(5)), "each kernel has a place"
    assert order.index(FLASH) < order.index(0), "the fused kernels come before the plain one"


@pytest.mark.usefixtures("gpu")
def test_on_gpus_nccl_has_its_groups_alone_and_the_host_one_of_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, dict[str, Any]]] = []
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: made.append((backend, options)))
    monkeypatch.setattr(dist, "new_group", lambda **options: (made.append((options["backend"], options)), group)[1])
    monkeypatch.setattr(mesh, "init_device_mesh", lambda kind, *_, **__: kind)
    monkeypatch.setattr(mesh, "_smallest_memory", lambda gpu: {torch.device("cuda", 1): 80e9}[gpu])
    layout = mesh.start(Place(rank=0, world=1, local_rank=3), 1, 1)
    assert layout.gpu_memory == 80e9
    assert [backend for backend, _ in made] == ["nccl", "gloo"]
    first, host = (options for _, options in made)
    assert first["device_id"] == torch.device("cuda", 1)
    assert first["timeout"] == host["timeout"] == mesh.TIMEOUT
    assert (layout.host, layout.mesh, layout.device) == (group, "cuda", torch.device("cuda", 1))


_RECORD = """
import json, os, resource, runpy, sys
import torch

def first_call():
    torch.cuda.is_available = lambda: False
    names = [n for n in os.environ if n.startswith(("PYTORCH", "TORCH", "CUBLAS"))]
    json.dump({
        "environment": {n: os.environ[n] for n in names},
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "cuda": torch.cuda.is_initialized(),
    }, open(os.environ["RECORD"], "w"))
    return False

torch.cuda.is_available = first_call
sys.argv[0] = "trainer"
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
"""


def arguments(folder: Path, attempt: str, text: Path, *more: str) -> list[str]:
    return [
        *("--recipe", "opt-tiny", "--data", str(text), "--run-dir", str(folder / attempt)),
        *("--checkpoint-dir", str(folder / "checkpoints")),
        *settings(*SMALL, "steps=4", "checkpoint_every=2", "deterministic=true"),
        *more,
    ]


@pytest.fixture(scope="module")
def deterministic(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with ``deterministic=true``. Its process recorded its settings when it first asked for a GPU."""
    folder = tmp_path_factory.mktemp("deterministic")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTORCH", "TORCH", "CUBLAS"))}
    done = subprocess.run(
        [sys.executable, "-c", _RECORD, *arguments(folder, "a1", text)],
        cwd=REPOSITORY,
        env=clean | {"RECORD": str(folder / "record.json"), "TORCH_FR_BUFFER_SIZE": "17"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, most)),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder


def test_settings_come_before_the_first_call_to_cuda(deterministic: Path) -> None:
    record = json.loads((deterministic / "record.json").read_text())
    assert not record["cuda"]
    assert record["deterministic"]
    assert record["tf32"] == [False, False]
    assert record["files"] == [resource.getrlimit(resource.RLIMIT_NOFILE)[1]] * 2, "it began with 256"
    environment = record["environment"]
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert environment["TORCH_FR_BUFFER_SIZE"] == "17", "the environment has precedence"
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == str(deterministic / "a1" / "collectives-rank-")
    assert json.loads((deterministic / "a1" / "config.json").read_text())["device"]["deterministic"]


def test_what_the_docs_say_about_determinism_holds_on_a_cpu(deterministic: Path, text: Path) -> None:
    docs = " ".join((REPOSITORY / "docs" / "trainer.md").read_text().split())
    assert (
        "In the same layout on CPUs, the losses of a resumed run are bit-identical to those of the whole run." in docs
    )
    assert "On GPUs they are bit-identical only with `--set deterministic=true`" in docs
    half = deterministic / "checkpoints" / "step-00000002"
    without = arguments(deterministic, "a2", text, "--resume", str(half), *settings("deterministic=false"))
    [done] = train(0, *without)
    assert (done.returncode, done.stderr) == (0, "")
    whole, resumed = (
        [(line["loss"], line["gnorm"]) for line in telemetry(deterministic / name)] for name in ("a1", "a2")
    )
    assert resumed == whole[2:]


@pytest.mark.gpu
def test_a_resumed_run_on_a_gpu_is_bit_identical_if_deterministic(text: Path, tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / "step-00000002"
    for attempt, more in (("a1", []), ("a2", ["--resume", str(half)])):
        [done] = train(0, *arguments(tmp_path, attempt, text, *settings("precision=bf16"), *more))
        assert done.returncode == 0, done.stderr
    whole, resumed = ([(x["loss"], x["gnorm"]) for x in telemetry(tmp_path / name)] for name in ("a1", "a2"))
    assert resumed == whole[2:]
    about = json.loads((tmp_path / "a1" / "config.json").read_text())["device"]
    assert about["deterministic"]
    assert about["attention"] in ("flash", "efficient"), "cuDNN's is left out, and the plain one is slow"


def test_an_older_name_of_a_setting_has_precedence_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    older = {
        "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "17",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/elsewhere/trace",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    monkeypatch.setattr(os, "environ", dict(older))
    device.prepare(tmp_path, deterministic=False)
    assert os.environ == older


def descriptors(pid: int | str = "self") -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def start_with_few_descriptors(folder: Path) -> tuple[int, int]:
    """Start a rank where 256 descriptors are allowed. Returns how many it has opened, and how many its writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = descriptors()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        writer = Writer()
        layout = mesh.start(place_from_environment(os.environ), 8, 1)
        to = Destination(folder=folder, node="n1", fence=Fence(None, "1.00-a1"))
        Checkpointer(writer, to, {"model": {"weight": torch.zeros(4)}}, "127.0.0.1", layout.host)
        return descriptors() - before, descriptors(writer.pid)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ranks_open_few_descriptors(tmp_path: Path) -> None:
    """Each gloo group costs a rank a socket for each other rank, and some more. A second one would pass the bounds."""
    fresh = Ranks()  # processes of earlier tests hold descriptors of their own
    try:
        first, *others = fresh(8, start_with_few_descriptors, tmp_path)
    finally:
        fresh.close()
    assert first[0] <= 42, "rank 0 holds the store, so it has a connection of each rank as well"
    assert first[1] <= 48
    for opened, by_writer in others:
        assert opened <= 25
        assert by_writer <= 31


class _Runtime:
    """CUDA's runtime as torch binds it, on a host that cannot pin memory. Kernels take its last error away."""

    def __init__(self) -> None:
        self.last_error = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert (address > 0, size > 0, flags) == (True, True, 0)
        self.last_error = 2
        return 2


def state_that_cannot_be_pinned() -> list[Any]:
    runtime, printed, zeros = _Runtime(), [], torch.zeros

    def check(code: int) -> None:
        if code:
            raise RuntimeError(f"out of memory ({code})")

    def kernel(*size: int, **options: Any) -> Tensor:
        if options.pop("device", None) == "cuda" and (code := runtime.last_error):
            runtime.last_error = 0
            check(code)
        return zeros(*size, **options)

    layout = mesh.start(place_from_environment(os.environ), 1, 1)
    weight = torch.arange(3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "cudart", lambda: runtime)
        patch.setattr(torch.cuda, "check_error", check)
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
        patch.setattr(torch, "zeros", kernel)
        patch.setattr(staging, "print_line", lambda text, *_: printed.append(text))
        staged = staging.Staging({"model": {"weight": weight}}, layout.host)
        staged.copy()
    with mmap.mmap(staged.memory, staged.size) as memory:
        [copy] = staging.views(memory, staged.plan)
        same = torch.equal(copy, weight)
        del copy
    return [runtime.last_error, same, *printed]


def test_memory_that_cannot_be_pinned_costs_a_note_and_not_the_training(ranks: Ranks) -> None:
    [[last_error, same, *printed]] = ranks(1, state_that_cannot_be_pinned)
    assert last_error == 0, "the next kernel of training would raise it"
    assert same
    assert len(printed) == 1
    assert "cannot be pinned: out of memory (2)" in printed[0]


def tensors_alive_without_automatic_collection() -> list[int]:
    """The number of tensors alive after each of some updates, of which none is due for a collection."""
    recipe = build(1, 1)
    engine, data, progress = engine_of(recipe), samples(build(1, 1)), Progress()
    alive = []
    for step in range(1, 13):
        forward_backward(engine, data, recipe, progress)
        engine.update(1.0, 1e-3, 256.0)
        progress = advanced(progress, recipe)
        device.collect_garbage(step)
        assert not gc.isenabled()
        gc.unfreeze()
        alive.append(sum(isinstance(thing, Tensor) for thing in gc.get_objects()))
        gc.freeze()
    gc.enable()
    gc.unfreeze()
    return alive


def test_memory_does_not_wait_for_the_next_collection(ranks: Ranks) -> None:
    """A step leaves no tensor in a cycle. So the memory of 50 steps without a collection is that of one."""
    [alive] = ranks(1, tensors_alive_without_automatic_collection)
    assert alive[2] == alive[-1]


def test_garbage_is_collected_at_the_same_steps_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    for name in ("freeze", "disable"):
        monkeypatch.setattr(gc, name, lambda: None)
    monkeypatch.setattr(gc, "isenabled", lambda: False)
    for step in range(1, 201):
        monkeypatch.setattr(gc, "collect", lambda step=step: collected.append(step))
        device.collect_garbage(step)
    assert collected == [50, 100, 150, 200]


@pytest.mark.usefixtures("gpu")
def test_the_place_of_a_rank_decides_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [device.select(rank).torch_device.index for rank in range(3)] == [0, 1, 0]
    assert [found.index for found in chosen] == [0, 1, 0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.select(1).backend == "gloo"


def test_a_gpu_that_torch_cannot_use_is_an_error_and_no_reason_to_train_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="torch finds no GPU"):
        device.select(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not device.select(0).is_gpu, "somebody wants a CPU"
