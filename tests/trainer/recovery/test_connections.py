"""A rank leaves a collective because its connections are cut, and takes all others with it."""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from opt_ops.contract.environment import place_from_environment
from opt_ops.contract.fence import SupersededError
from tests.ports import free_port
from tests.trainer.forked import FORKS
from tests.trainer.harness import Ranks, environment
from tests.trainer.recovery.broken_steps import Trainee, attempt
from tests.trainer.recovery.test_rebuild import ONE_LAYER
from tests.trainer.test_parallel import build
from trainer.errors import UserError
from trainer.parallel import mesh
from trainer.parallel.mesh import Meeting
from trainer.recipes import Recipe
from trainer.recovery.connections import Connections
from trainer.recovery.rebuild import is_lost_peer

PATIENCE = 60
"""Seconds after which a rank counts as blocked. It gets out in a fraction of a second."""


def _train_until_lost(rank: int, world: int, port: int, recipe: Recipe, pipe: Connection) -> None:
    """Train for ever on one rank. When a peer is lost, cut the own connections, say so and leave.

    A line from the other end of the pipe is the order to cut, as a thread of the rank gets it.
    """
    os.environ.update(environment(rank, world, port))
    trainee = Trainee(recipe, [port])
    error = attempt(trainee)

    def obey() -> None:
        pipe.recv()
        trainee.connections.cut()

    threading.Thread(target=obey, daemon=True).start()
    pipe.send("trains")
    while error is None:
        error = attempt(trainee)
    trainee.connections.cut()
    pipe.send(error)
    os._exit(0)


@contextmanager
def training(recipe: Recipe, world: int) -> Iterator[list[tuple[Any, Connection]]]:
    """Ranks that train, as (process, pipe)."""
    port, members = free_port(), []
    try:
        for rank in range(world):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_train_until_lost, args=(rank, world, port, recipe, theirs))
            FORKS.start(process)
            theirs.close()
            members.append((process, ours))
        assert heard([pipe for _, pipe in members]) == ["trains"] * world
        yield members
    finally:
        for process, pipe in members:
            process.kill()
            process.join()
            pipe.close()


def heard(pipes: list[Connection]) -> list[str]:
    """What each of the ranks says next."""
    said: dict[Connection, str] = {}
    deadline = time.monotonic() + PATIENCE
    while waiting := [pipe for pipe in pipes if pipe not in said]:
        for pipe in wait(waiting, timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(pipe, Connection)
            said[pipe] = pipe.recv()
        assert time.monotonic() < deadline, f"ranks {[pipes.index(pipe) for pipe in waiting]} are blocked"
    return [said[pipe] for pipe in pipes]


def lose(how: signal.Signals, seed: int) -> None:
    """Take a rank of four away at a random moment; all others get out. If it is stopped, an order makes them cut."""
    chance = random.Random(seed)
    victim, after = chance.randrange(4), chance.uniform(0, 0.5)
    with training(build(2, 2, *ONE_LAYER), 4) as members:
        time.sleep(after)
        os.kill(members[victim][0].pid, how)
        pipes = [pipe for rank, (_, pipe) in enumerate(members) if rank != victim]
        if how == signal.SIGSTOP:
            time.sleep(0.2)  # a stopped process breaks no connection
            assert not any(pipe.poll() for pipe in pipes)
            for pipe in pipes:
                pipe.send("cut")
        assert all(heard(pipes)), f"rank {victim}, {after:.3f} s after all trained"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_all_others_get_out_when_a_rank_is_lost(how: signal.Signals) -> None:
    lose(how, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
@pytest.mark.parametrize("seed", range(2, 22))
def test_all_others_get_out_whichever_is_lost_whenever(how: signal.Signals, seed: int) -> None:
    lose(how, seed)


def _meet_in_vain(absent: int, port: int) -> tuple[bool, float]:
    """Form groups with a rank that does not come. Whether the error is that of a lost peer, and seconds until it."""
    place, connections = place_from_environment(os.environ), Connections()
    if place.rank == absent:
        return True, 0.0
    threading.Timer(0.3, connections.cut).start()
    start = time.monotonic()
    try:
        mesh.start(place, 3, 1, 1, Meeting("127.0.0.1", port, 2, timedelta(seconds=1)))
    except RuntimeError as error:
        return is_lost_peer(error), time.monotonic() - start
    return False, time.monotonic() - start


@pytest.mark.parametrize("absent", [0, 2], ids=["the one with the store", "another one"])
def test_a_rank_gets_out_while_groups_are_formed(absent: int) -> None:
    pool = Ranks(PATIENCE)
    try:
        for lost, seconds in pool(3, _meet_in_vain, absent, free_port()):
            assert lost
            assert seconds < PATIENCE / 2  # far below what a group waits for
    finally:
        pool.close()


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket, socket.socket]]:
    """A listening socket, and both ends of a connection to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far:
            near.settimeout(PATIENCE)
            yield listener, near, far


def test_only_connections_of_the_membership_are_cut() -> None:
    with connected() as (_, earlier, peer):
        connections = Connections()
        with connected() as (listener, near, _far), connected() as (_, closed, _):
            here, there = socket.socketpair()
            connections.opened()
            with connected() as (_, later, later_peer), here, there:
                number = closed.detach()
                os.dup2(later.fileno(), number)  # the descriptor is another connection now
                connections.cut()
                connections.cut()
                assert near.recv(1) == b"", "cut"
                with socket.create_connection(listener.getsockname()), listener.accept()[0]:
                    pass  # a listening socket goes on
                here.send(b"1")
                assert there.recv(1) == b"1", "a connection inside this host to the writer, for example, goes on"
                later_peer.send(b"2")
                assert later.recv(1) == b"2", "so does a later one, on a descriptor that was closed"
                os.close(number)
        peer.send(b"3")
        assert earlier.recv(1) == b"3", "and one from before"
        assert connections.is_cut


def test_a_cut_leaves_the_number_of_descriptors_as_it_is() -> None:
    connections = Connections()
    with connected():
        connections.opened()
        before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
        connections.cut()
        assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


LOST = [
    RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7851. This is typically"),
    RuntimeError("[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:919: Connection reset by peer."),
    RuntimeError(
        "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation to complete"
    ),
    RuntimeError("Application timeout caused pair closure"),
    dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
    dist.DistBackendError("NCCL communicator was aborted on rank 1."),
    dist.DistBackendError("NCCL error: remote process exited or there was a network error, NCCL version 2.27.5"),
]
FAULTS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("[enforce fail at pair.cc:453] op.preamble.length <= op.nbytes. 400 vs 40"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    dist.DistBackendError("NCCL error: invalid usage, NCCL version 2.27.5"),
    torch.OutOfMemoryError("CUDA out of memory."),
    UserError("Connection closed by peer"),
    ConnectionResetError("Connection reset by peer"),  # of a pipe or of a store for files
]


@pytest.mark.parametrize("error", LOST, ids=range(len(LOST)))
def test_a_lost_peer_is_known_by_what_is_raised(error: Exception) -> None:
    assert is_lost_peer(error)
    assert is_lost_peer(CheckpointException("load", {1: (error, None)}))  # pyright: ignore[reportArgumentType]
    wrapped = RuntimeError("a hook failed")
    wrapped.__cause__ = error
    assert is_lost_peer(wrapped)


@pytest.mark.parametrize("error", FAULTS, ids=range(len(FAULTS)))
def test_a_fault_of_the_program_is_none(error: Exception) -> None:
    assert not is_lost_peer(error)
    assert not is_lost_peer(CheckpointException("load", {1: (error, None)}))  # pyright: ignore[reportArgumentType]


def test_an_error_raised_on_purpose_after_a_loss_is_none() -> None:
    superseded = SupersededError("a newer attempt exists")
    superseded.__context__ = LOST[0]
    assert not is_lost_peer(superseded)


_SAYS: dict[str, Callable[[], object]] = {
    "all_reduce": lambda: dist.all_reduce(torch.ones(8)),
    "gather_object": lambda: dist.all_gather_object([None] * 2, {"step": 1}),
    "broadcast_object": lambda: dist.broadcast_object_list([1], src=1),
    "recv": lambda: dist.recv(torch.ones(8), src=1),
    "new_group": lambda: dist.new_group(backend="gloo"),
    "barrier": dist.barrier,
}


def _lost_in(what: str) -> bool:
    """Whether the survivor of two ranks knows what ``what`` raises."""
    place, connections = place_from_environment(os.environ), Connections()
    mesh.start(place, 2, 1)
    connections.opened()
    dist.barrier()
    if place.rank == 1:
        connections.cut()
        return True
    if what == "new_group":  # waits for the store, which is its own
        threading.Timer(0.2, connections.cut).start()
    try:
        _SAYS[what]()
    except RuntimeError as error:
        return is_lost_peer(error)
    return False


@pytest.mark.parametrize("what", _SAYS)
def test_a_loss_is_known_in_every_exchange(ranks: Ranks, what: str) -> None:
    assert ranks(2, _lost_in, what) == [True, True]
