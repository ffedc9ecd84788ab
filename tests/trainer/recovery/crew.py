"""Ranks that make peer copies without a model, and that die where a test says. Each is a process of its own."""

import os
import queue
import signal
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import torch
import torch.distributed as dist

from tests.ports import free_port
from tests.trainer.forked import FORKS
from trainer.checkpoint import hand_over, peer_copies, versions
from trainer.checkpoint.peer_copies import PeerCopies
from trainer.recovery.connections import Connections

PATIENCE = 240.0  # seconds that a test waits for anything: the machine may be very busy


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one member does.

    Attributes:
        steps: how many it trains in each generation, beyond the one that it begins at.
        every: updates between two copies.
        versions: that are held.
        dies: (generation, call, count): it kills itself when it makes this call of torch.distributed, or passes this
            place of the thread, for the ``count``-th time in this generation. Or (generation, "reduction" or "update",
            step): before that of this step.
        loses: (generation, step): an error in this step, after its reduction and before its update, at :meth:`Crew.go`.
        unheard: (generation, count): an error in place of the outcome of the ``count``-th confirmation.
        damages: before it joins generation 2: which of its versions a bit is flipped in ("own" or "wards", oldest
            first).
        spoils: (generation, count): the ``count``-th message that it sends has a wrong bit.
        claims: a generation that it takes for the present one.
    """

    steps: int = 4
    every: int = 1
    versions: int = 2
    dies: tuple[int, str, int] | None = None
    loses: tuple[int, int] | None = None
    unheard: tuple[int, int] | None = None
    damages: tuple[tuple[str, int], ...] = ()
    spoils: tuple[int, int] | None = None
    claims: int | None = None


@dataclass(frozen=True)
class Order:
    generation: int
    nodes: tuple[str, ...]
    port: int


class _Calls:
    """torch.distributed as the module under test sees it: it counts calls, and dies or lies in one of them."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._count, self.generation = plan, dict[tuple[int, str], int](), 1
        self._sent: Any = None

    def __getattr__(self, name: str) -> Any:
        real = getattr(dist, name)
        if name not in ("isend", "irecv", "recv", "all_reduce", "all_gather_object"):
            return real

        def call(*args: Any, **named: Any) -> Any:
            if named.get("tag") == 0:
                self._sent = None
            count = self.passes(name)
            if name == "isend" and self._plan.spoils == (self.generation, count):
                args = (args[0] ^ 1, *args[1:])
            outcome = real(*args, **named)
            if name == "isend":
                self._sent = outcome
            if name == "all_reduce" and self._plan.unheard == (self.generation, count):
                raise RuntimeError("the connection broke after the peers had the outcome")
            return outcome

        return call

    def passes(self, name: str, _step: int = 0) -> int:
        key = self.generation, name
        self._count[key] = self._count.get(key, 0) + 1
        if self._plan.dies == (*key, self._count[key]):
            if name == "isend" and self._sent:
                self._sent.wait()  # the message before has arrived, and this one never will
            os.kill(os.getpid(), signal.SIGKILL)
        return self._count[key]


def state(rank: int, step: int) -> list[torch.Tensor]:
    """What the tensors of a rank hold after a step. Their sizes differ from rank to rank."""
    noise = torch.rand(9000 + 100 * rank, generator=torch.Generator().manual_seed(1000 * rank + step))
    return [noise, torch.tensor(float(step)), torch.zeros(0, 3), noise[:7].double(), noise[:5] > 0.5]


class _Member:
    def __init__(self, rank: int, plan: Plan, reports: Connection) -> None:
        self._rank, self._plan, self._reports = rank, plan, reports
        self._calls = _Calls(plan)
        self._tensors = [torch.zeros_like(each) for each in state(rank, 0)]
        self._copies: PeerCopies | None = None
        self._connections = Connections()
        self._go = threading.Event()
        for module in (versions, hand_over, peer_copies):
            setattr(module, "dist", self._calls)  # noqa: B010
        versions._CHUNK = 8192

    def serve(self, orders: Connection) -> None:
        received = queue.Queue[Order]()

        def hear() -> None:
            while True:
                try:
                    order = orders.recv()
                except (EOFError, OSError):
                    os._exit(0)
                if order is None:
                    self._go.set()
                    continue
                if order.generation > 1:
                    self._connections.cut()
                received.put(order)

        threading.Thread(target=hear, daemon=True).start()
        while True:
            order = received.get()
            self._calls.generation = order.generation
            try:
                self._run(order)
            except Exception as error:  # noqa: BLE001  the test is told
                self._connections.cut()
                if self._copies:
                    self._copies.stop()
                self._leave()
                self._say("lost", (type(error).__name__, self._held()))

    def _run(self, order: Order) -> None:
        self._connections = Connections()
        store = dist.TCPStore("127.0.0.1", order.port, is_master=False, timeout=timedelta(seconds=PATIENCE))
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(str(order.generation), store),
            rank=self._rank,
            world_size=len(order.nodes),
            timeout=timedelta(seconds=PATIENCE),
        )
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))
        assert isinstance(group, dist.ProcessGroup)
        plan, step, generation = self._plan, 0, self._plan.claims or order.generation
        if self._copies is None:
            self._copies = PeerCopies(
                self._tensors,
                order.nodes,
                group,
                generation,
                every=plan.every,
                versions=plan.versions,
                passing=self._calls.passes,
            )
        elif order.generation == 2:
            self._damage(self._copies)
        if order.generation > 1:
            found = self._copies.rejoin(order.nodes, group, generation)
            if found is None:
                self._leave()
                self._say("none", None)
                return
            step = found.step
            assert all(map(torch.equal, self._tensors, state(self._rank, step))), "the state is that of the step"
            assert found.header == {"rank": self._rank, "step": step}
            self._say("joined", step)
        for each in range(step + 1, step + plan.steps + 1):
            self._train(order.generation, each)
        self._copies.wait()
        self._copies.stop()
        self._say("confirmed", self._copies.confirmed)
        self._leave()
        self._say("done", self._held())

    def _train(self, generation: int, step: int) -> None:
        assert self._copies is not None
        self._dies_here(generation, "reduction", step)
        dist.all_reduce(torch.ones(1))
        if self._plan.loses == (generation, step):
            assert self._go.wait(PATIENCE)
            raise RuntimeError("the connection broke after the peers had the sum")
        self._dies_here(generation, "update", step)
        for tensor, value in zip(self._tensors, state(self._rank, step), strict=True):
            tensor.copy_(value)
        if self._copies.due(step):
            self._copies.keep(step, {"rank": self._rank, "step": step})
            self._say("kept", step)
        self._say("confirmed", self._copies.confirmed)

    def _dies_here(self, generation: int, where: str, step: int) -> None:
        if self._plan.dies == (generation, where, step) and self._copies:
            self._copies.wait()  # otherwise the version before might be the one that is lost
            os.kill(os.getpid(), signal.SIGKILL)

    def _damage(self, copies: PeerCopies) -> None:
        for which, place in self._plan.damages:
            every = copies._own if which == "own" else next(iter(copies._wards.values()))
            held = sorted((slot for slot in every if slot.version), key=lambda slot: slot.version.key)
            held[place].buffer[4321] ^= 4

    def _held(self) -> tuple[list[int], dict[int, list[int]]]:
        """The steps of the whole versions: the own ones, and those of each ward."""
        if self._copies is None:
            return [], {}
        own, wards = self._copies.own(), self._copies.wards()
        return [each.step for each in own], {rank: [each.step for each in held] for rank, held in wards.items()}

    def _leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def _say(self, what: str, value: Any) -> None:
        self._reports.send((what, value))


def _serve(rank: int, plan: Plan, orders: Connection, reports: Connection) -> None:
    torch.set_num_threads(1)
    _Member(rank, plan, reports).serve(orders)


@dataclass
class _Process:
    process: Any
    orders: Connection
    reports: Connection
    heard: list[tuple[str, Any]] = field(default_factory=list)


class Crew:
    """The members, and what they have told.

    Args:
        nodes: the node of each rank.
        plans: by rank, for those that do not follow ``plan``.
        plan: of all others, and of their replacements.
    """

    def __init__(self, nodes: Sequence[str], plans: Mapping[int, Plan] | None = None, plan: Plan | None = None) -> None:
        self.nodes, self.plan = list(nodes), plan or Plan()
        port = free_port()
        self._store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        self._port, self.generation = port, 0
        self.confirmed = 0  # the newest step that anybody knows to be confirmed, members that are gone included
        self._members = {rank: self._start(rank, (plans or {}).get(rank, self.plan)) for rank in range(len(nodes))}
        self._order()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members.values():
            member.process.kill()
            member.process.join()

    def _start(self, rank: int, plan: Plan) -> _Process:
        (their_orders, orders), (reports, their_reports) = (FORKS.Pipe(duplex=False) for _ in range(2))
        process = FORKS.Process(target=_serve, args=(rank, plan, their_orders, their_reports), daemon=True)
        FORKS.start(process)
        their_orders.close()
        their_reports.close()
        return _Process(process, orders, reports)

    def _order(self) -> None:
        self.generation += 1
        for member in self._members.values():
            member.orders.send(Order(self.generation, tuple(self.nodes), self._port))

    def lost(self, *ranks: int) -> None:
        """Wait until these ranks are dead."""
        for rank in ranks:
            process = self._members[rank].process
            process.join(PATIENCE)
            assert process.exitcode == -signal.SIGKILL, f"rank {rank} should be dead. {self._all_heard()}"

    def _all_heard(self) -> str:
        """What the members have told that no test has asked for, and how they ended: why one is not where it should be.

        Each tells its errors as ``lost``.
        """
        for rank in self._members:
            self._hear(rank)
        told = {rank: (member.process.exitcode, member.heard) for rank, member in self._members.items()}
        return f"generation {self.generation}, exit code and words of each rank: {told}"

    def kill(self, *ranks: int) -> None:
        """Kill these ranks now."""
        for rank in ranks:
            self._members[rank].process.kill()

    def until_kept(self, step: int, *ranks: int) -> None:
        """Wait until these ranks have copied the state of this step."""
        for rank in ranks:
            while self._told(rank, "kept") < step:
                pass

    def go(self, rank: int) -> None:
        """Let a rank meet the error that is planned for it."""
        self._members[rank].orders.send(None)

    def replace(self, *ranks: int, plans: Mapping[int, Plan] | None = None) -> None:
        """Begin the next generation, with new processes for these ranks."""
        self.lost(*ranks)
        for rank in range(len(self.nodes)):
            self._hear(rank)
        lost = {self.nodes[rank] for rank in ranks} - {
            node for rank, node in enumerate(self.nodes) if rank not in ranks
        }
        for rank in ranks:
            if self.nodes[rank] in lost:  # as a whole: spares take the places of its ranks
                self.nodes[rank] = f"spare-{self.generation}-for-{self.nodes[rank]}"
            self._members[rank] = self._start(rank, (plans or {}).get(rank, self.plan))
        self._order()

    def told(self, what: str, *ranks: int) -> list[Any]:
        """What these ranks (default: all) tell next under this name."""
        return [self._told(rank, what) for rank in ranks or range(len(self.nodes))]

    def _told(self, rank: int, what: str) -> Any:
        deadline, heard = time.monotonic() + PATIENCE, self._members[rank].heard
        while True:
            self._hear(rank)
            found = next((index for index, (name, _) in enumerate(heard) if name == what), None)
            if found is not None:
                return heard.pop(found)[1]
            member = self._members[rank]
            assert member.process.exitcode is None, f"rank {rank} ended, it has told {heard}"
            assert time.monotonic() < deadline, f"rank {rank} has not told {what!r}, but {heard}"
            wait([member.reports, member.process.sentinel], timeout=1)

    def _hear(self, rank: int) -> None:
        member = self._members[rank]
        try:
            while member.reports.poll():
                what, value = member.reports.recv()
                if what == "confirmed":
                    self.confirmed = max(self.confirmed, value or 0)
                else:
                    member.heard.append((what, value))
        except (EOFError, OSError, struct.error):
            return  # it is dead
