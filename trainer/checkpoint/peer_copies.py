"""Each rank's state in host memory twice: its own, and one that its buddy on another node keeps.

After every k-th update a rank copies its parameters, moments and step counts into its own memory (:meth:`keep`). A
thread sends the copy to the buddy, receives the copy of the rank whose buddy this one is (its ward), and confirms it in
one small all-reduce. A version is **confirmed** when every rank holds its own and that of its ward. Then a lost rank
costs nobody a step: its buddy gives the state to its replacement (:mod:`trainer.checkpoint.hand_over`).

Each rank holds two versions of itself and two of its ward. The older one is overwritten only after the newer one was
confirmed. So at any moment every rank and every buddy holds the last confirmed version, and at most one newer.
"""

# torch does not list its foreach functions.
# pyright: reportPrivateImportUsage=false

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from opt_ops.contract.replacing import buddies
from trainer.checkpoint import hand_over
from trainer.checkpoint.hand_over import Holding
from trainer.checkpoint.versions import Key, RefusedCopyError, Sending, Slot, Slots, Version, receive, size_of, views
from trainer.plan.peer_copies import interval

__all__ = ["DamagedCopyError", "PeerCopies", "RefusedCopyError", "Version", "local_tensors"]

# How long a thread may need to end after its group was cut. It then waits for nothing but the processor.
_END_SECONDS = 60.0


class DamagedCopyError(Exception):
    """A copy does not have the checksum that its rank told. The memory of one of two hosts is damaged."""


def local_tensors(state: Mapping[str, Mapping[str, Any]]) -> list[Tensor]:
    """This rank's parts of the state of an engine, in its order. They share its memory.

    Args:
        state: :meth:`trainer.parallel.engine.Engine.state`.
    """
    moments = [each for of_one in state["optimizer"].values() for each in of_one.values()]
    held = [each.detach() for each in (*state["model"].values(), *moments)]
    return [each.to_local() if isinstance(each, DTensor) else each for each in held]


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the thread sends next."""

    step: int
    text: bytes
    slot: Slot
    copied: "_GpuCopy | None"
    copy_seconds: float
    step_seconds: float


class _GpuCopy:
    """A copy from a GPU that has been started on the current stream."""

    def __init__(self) -> None:
        self._begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record()

    def wait(self) -> float:
        """Wait for its end. Returns the seconds that it took."""
        self.end.synchronize()
        return self._begin.elapsed_time(self.end) / 1000


class PeerCopies:
    """The copies that one rank makes and keeps. Its methods belong to the thread that trains.

    Args:
        tensors: this rank's part of the state (:func:`local_tensors`).
        nodes: the node of each rank.
        group: a gloo group of all ranks that nothing else uses.
        generation: of the members. Copies of another generation are refused.
        every: updates between two copies. With -1 the ranks choose it from what they measure (:func:`interval`).
        versions: how many versions are held. With 1 the memory is half. But a rank that is lost while a copy is made
            leaves no common step, and the attempt must be restarted.
        passing: called in the thread before a version is sent (``copy``) and before it is confirmed (``confirm``),
            with the step. Drills use it.
        confirmed: called in the thread when a version was confirmed, with its step, before the next one can be kept.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        nodes: Sequence[str],
        group: dist.ProcessGroup,
        generation: int,
        *,
        every: int = 1,
        versions: int = 2,
        passing: Callable[[str, int], None] | None = None,
        confirmed: Callable[[int], None] | None = None,
    ) -> None:
        self._tensors, self._every, self._versions, self._passing = list(tensors), every, versions, passing
        self._on_confirmed = confirmed
        self._gpu = next((each.device for each in tensors if each.is_cuda), None)
        self._stream = torch.cuda.Stream(self._gpu) if self._gpu else None
        self._copied: _GpuCopy | None = None  # the last copy from the GPU
        self._own = Slots(versions, size_of(tensors), pinned=self._gpu is not None)
        self._views = {id(slot): views(slot.buffer, tensors) for slot in self._own}
        self._wards: dict[int, Slots] = {}
        self._changed = threading.Condition()
        self._confirmed: Version | None = None
        self._next = 0  # the first step that is due
        self._last: tuple[int, float] | None = None  # step and time of the last copy
        self._begin(nodes, group, generation)

    def _begin(self, nodes: Sequence[str], group: dist.ProcessGroup, generation: int) -> None:
        """Become a member of ``group``, and start the thread."""
        self._rank, self._group, self._generation = group.rank(), group, generation
        self._buddies = buddies(nodes)
        mine = [rank for rank, buddy in enumerate(self._buddies) if buddy == self._rank]
        self._wards = {rank: self._wards.get(rank) or Slots(self._versions) for rank in mine}
        self._pending: _Kept | None = None
        self._error: BaseException | None = None
        self._stopping, self._interval = False, 1
        self._thread = threading.Thread(target=self._serve, name="peer copies", daemon=True)
        self._thread.start()

    # What the thread that trains calls.

    @property
    def confirmed(self) -> int | None:
        """The newest step whose version every rank and every buddy holds. None before the first."""
        return self._confirmed.step if self._confirmed else None

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` is to be kept: on all ranks alike."""
        return step >= self._next

    def keep(self, step: int, header: Mapping[str, Any]) -> None:
        """Copy the state after ``step``. The thread then sends and confirms it.

        This first waits until the version before is confirmed. On a GPU the copy runs on a stream of its own, so call
        :meth:`before_update` before the state changes.

        Args:
            step: of the last update.
            header: what must be kept with the state. JSON must be able to hold it.

        Raises:
            Exception: what the thread met.
        """
        self.wait()
        now, last = time.monotonic(), self._last
        step_seconds = (now - last[1]) / (step - last[0]) if last and step > last[0] else math.inf
        self._last = step, now
        self._next = step + (self._every if self._every > 0 else self._interval)
        slot = self._own.free(self._safe)
        self._copied = self._copy_into(slot)
        text = json.dumps(dict(header)).encode()
        kept = _Kept(step, text, slot, self._copied, time.monotonic() - now, step_seconds)
        with self._changed:
            self._pending = kept
            self._changed.notify_all()

    def before_update(self) -> None:
        """Let the GPU finish its copy before it changes the state. The host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream(self._gpu).wait_event(self._copied.end)

    def wait(self) -> None:
        """Wait until what was kept is confirmed.

        Raises:
            Exception: what the thread met: a lost peer (RuntimeError), DamagedCopyError or RefusedCopyError.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._pending is None or self._error is not None or self._stopping)
            if self._error:
                raise self._error
            if self._stopping:
                raise RuntimeError("copies are not made any more: the group of the peers was given up")

    def stop(self) -> None:
        """End the thread. Whole versions stay. If something is being sent, its group must have been cut before.

        Raises:
            RuntimeError: the thread does not end. This process can go on with nothing that uses the copies.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(_END_SECONDS)
        if self._thread.is_alive():
            raise RuntimeError(f"the thread that sends copies has not ended in {_END_SECONDS:.0f} s")

    def own(self) -> list[Version]:
        """The versions of this rank whose checksum is right, oldest first. Call it when the thread has ended."""
        return self._own.whole()

    def wards(self) -> dict[int, list[Version]]:
        """The versions of each ward whose checksum is right, oldest first. Call it when the thread has ended."""
        return {rank: slots.whole() for rank, slots in self._wards.items()}

    def restore(self, key: Key) -> Version:
        """Write the own version ``key`` into the live state.

        Raises:
            DamagedCopyError: there is no such version, or its checksum is wrong.
        """
        slot = self._own.find(key)
        if slot is None or slot.whole() is None or slot.version is None:
            raise DamagedCopyError(f"rank {self._rank} holds no whole version of step {key[1]}")
        with torch.no_grad():
            torch._foreach_copy_(self._tensors, self._views[id(slot)])
        return slot.version

    def rejoin(self, nodes: Sequence[str], group: dist.ProcessGroup, generation: int) -> Version | None:
        """Go on with new members at the newest step that all have. Collective over ``group``.

        The ranks agree on a step. Ranks that have never held a version, because they are new, get it from their buddy.
        Each rank writes its own version into the live state. Then copies are made anew where a buddy lacks one, and the
        thread starts. A rank that survived has called :meth:`stop`. A new rank has just made its object.

        If this raises, another member was lost. All versions that were whole before are still whole, so call it again
        with the next generation.

        Args:
            nodes: the node of each rank.
            group: a gloo group of all ranks that nothing else uses.
            generation: of the new members.

        Returns:
            The common version. None, on all ranks alike, if there is none: then the ranks must be restarted.

        Raises:
            RuntimeError: a peer was lost.
        """
        self.stop()
        self._rank, self._group, self._generation = group.rank(), group, generation
        holding = Holding.of(self.own(), self.wards(), fresh=self._own.untouched())
        agreed = hand_over.agree(holding, group)
        if agreed is None:
            return None
        key, holdings = agreed
        if not hand_over.hand_over(hand_over.to_new(key, holdings), key, self._slots_of, group, generation):
            return None
        version = self.restore(key)
        to_buddies = hand_over.to_buddies(key, holdings, buddies(nodes))
        if not hand_over.hand_over(to_buddies, key, self._slots_of, group, generation):
            return None
        self._confirmed, self._last = version, None
        self._next = version.step + max(1, self._every)
        self._begin(nodes, group, generation)
        return version

    # What only this object uses.

    @property
    def _safe(self) -> Key | None:
        return self._confirmed.key if self._confirmed else None

    def _slots_of(self, rank: int) -> Slots:
        return self._own if rank == self._rank else self._wards.setdefault(rank, Slots(self._versions))

    def _copy_into(self, slot: Slot) -> _GpuCopy | None:
        """Copy the state. On a GPU, start to."""
        targets = self._views[id(slot)]
        with torch.no_grad():
            if self._stream is None:
                torch._foreach_copy_(targets, self._tensors)
                return None
            self._stream.wait_stream(torch.cuda.current_stream(self._gpu))  # for the update
            with torch.cuda.stream(self._stream):
                copy = _GpuCopy()
                torch._foreach_copy_(targets, self._tensors, non_blocking=True)
                copy.end.record()
            return copy

    def _serve(self) -> None:
        """The thread: send, receive and confirm what is kept, until it is told to stop or a peer is lost."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._pending is not None or self._stopping)
                    kept = self._pending
                if self._stopping or kept is None:
                    return
                confirmed = self._send_and_confirm(kept)
                if self._on_confirmed:
                    self._on_confirmed(confirmed.step)
                with self._changed:
                    self._confirmed, self._pending = confirmed, None
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  the thread that trains hears of it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _send_and_confirm(self, kept: _Kept) -> Version:
        """Exchange the version with the peers. It returns when every rank has it, and the copy of its ward."""
        group, generation, pass_ = self._group, self._generation, self._passing or _pass
        seconds = kept.copied.wait() if kept.copied else kept.copy_seconds
        version = kept.slot.holds(kept.step, generation, kept.text)
        pass_("copy", kept.step)
        buddy = self._buddies[self._rank]
        sending = None if buddy is None else Sending(kept.slot, buddy, group, generation)
        good = True
        for ward, slots in self._wards.items():
            received = receive(slots, ward, group, generation, version.key, self._safe)
            good, seconds = good and received.good, seconds + received.seconds
        if sending:
            sending.wait()
        pass_("confirm", kept.step)
        # Of all ranks: whether a copy is damaged, the slowest copy, and the shortest step.
        told = torch.tensor([float(not good), seconds, -kept.step_seconds], dtype=torch.float64)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
        damaged, slowest, shortest = told.tolist()
        if damaged:
            raise DamagedCopyError(
                f"step {kept.step}: a copy reached a peer with a wrong checksum"
                + ("" if good else f"; it is that of a ward of rank {self._rank}")
            )
        self._interval = interval(slowest, -shortest)
        return version


def _pass(where: str, step: int) -> None:
    """Without a drill, the thread passes every place."""
