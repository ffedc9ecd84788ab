"""How a rank notices that the membership has changed, gets out of its collectives, and joins the newer generation.

A rank hears of a loss in one of two ways: a collective fails, or the file of its membership has a newer generation. In
both cases it cuts its own connections, so that its peers get an error in turn. Then it waits for the newer generation.
The supervisor decides whether there will be one. If not, it ends this process.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from opt_ops.contract.data_since import CAPABILITY as DATA_SINCE
from opt_ops.contract.environment import Place
from opt_ops.contract.exit_codes import ExitCode
from opt_ops.contract.fence import OutdatedError
from opt_ops.contract.files import write_durably
from opt_ops.contract.membership import MembersFile, Membership, lost_file, tell_joining
from opt_ops.contract.replacing import CAPABILITY
from opt_ops.contract.warm_start import CAPABILITY as WARM_START
from trainer import preconditions
from trainer.checkpoint.peer_copies import RefusedCopyError
from trainer.console import print_line
from trainer.errors import exit_code
from trainer.parallel import mesh
from trainer.parallel.mesh import Layout, Meeting
from trainer.recipes import Recipe
from trainer.recovery import rebuild
from trainer.recovery.connections import Connections

_LOOK_SECONDS = 0.05  # the file is on the node's own disk
_ANSWER_SECONDS = 0.5  # of the host of rank 0, to one attempt to connect

# What a collective that was cut off may seem to be: its result can be wrong, and its error can have any text.
_BY_A_CUT = {
    ExitCode.UNEXPECTED_ERROR,
    ExitCode.NOT_FINITE,
    ExitCode.CORRUPT_DATA,
    ExitCode.PEER_CORRUPT_DATA,
    ExitCode.LOSS_SCALE_FLOOR,
}


class LostPeerError(Exception):
    """The connections to the peers were cut: what was computed since then may be wrong."""


def capabilities(recipe: Recipe, world: int, file: MembersFile) -> list[str]:
    """What the ranks of this attempt can do, as ``config.json`` says it.

    Args:
        recipe: names the engine, and how often copies are made.
        world: number of ranks.
        file: of the membership. Without one, nobody would name a newer generation.
    """
    replaceable = [CAPABILITY, "peer_copies"] if world > 1 and can_replace(recipe, file) else []
    return [*replaceable, WARM_START, DATA_SINCE]


def can_replace(recipe: Recipe, file: MembersFile) -> bool:
    """Whether ranks of more than one can be replaced while the others keep running."""
    wanted = file.path is not None and recipe.engine == "fsdp2" and recipe.peer_copies.every != 0
    return wanted and rebuild.supported() is None


class Members:
    """The membership that this rank takes part in, and the connections to the other members.

    Args:
        file: of this rank.

    Attributes:
        generation: of the membership that this rank takes part in. 1 is the launch, or before a standby has a place.
        file: of this rank.
    """

    def __init__(self, file: MembersFile) -> None:
        self.generation = 1
        self.file = file
        self._connections: Connections | None = None
        self._on_cut: Callable[[], None] = lambda: None
        self._is_cut = False
        self._newest: Membership | None = None
        self._changed = threading.Condition()

    def watch(self, on_cut: Callable[[], None]) -> None:
        """Start the thread that looks at the file. It cuts the connections when a newer generation is there.

        Args:
            on_cut: called when connections are cut, before new ones are formed, perhaps from another thread.
        """
        self._on_cut = on_cut
        threading.Thread(target=self._watch, daemon=True, name="members").start()

    @property
    def is_cut(self) -> bool:
        """Whether the connections were cut. What was computed since then may be wrong."""
        return self._is_cut

    def require_whole(self) -> None:
        """Check that no connection was cut so far.

        Raises:
            LostPeerError: they were.
        """
        if self._is_cut:
            raise LostPeerError("connections to the peers were cut")

    def is_loss(self, error: BaseException) -> bool:
        """Whether ``error`` comes from a lost peer, and a newer generation may go on without it."""
        if self._connections is None:
            return False
        if isinstance(error, (LostPeerError, OutdatedError, RefusedCopyError)) or rebuild.is_lost_peer(error):
            return True
        return self._is_cut and exit_code(error) in _BY_A_CUT

    def cut(self) -> None:
        """Cut the connections, so that this rank and its peers get out of their collectives."""
        with self._changed:
            first, self._is_cut = not self._is_cut, True  # first of all: what ends by the cut may be wrong
            if self._connections is None:  # there are no groups yet, so nothing that belongs to them
                return
            self._connections.cut()
            if first:
                self._on_cut()

    def wait_for_newer(self, again: Callable[[], None] | None = None) -> Membership:
        """Wait for a generation that is newer than this one. The supervisor decides how long this lasts.

        Args:
            again: called once a minute.
        """
        while True:
            with self._changed:
                if self._changed.wait_for(self._has_newer, timeout=60.0):
                    assert self._newest is not None
                    return self._newest
            if again:
                again()

    def lose(self, error: BaseException, step: int) -> None:
        """Get out of the groups because of ``error``, and say that this rank waits for a newer generation.

        Args:
            error: for the log.
            step: the last one.
        """
        self.cut()
        text = " ".join(str(error).split())[:200] or repr(error)
        print_line(f"lost a peer after step {step} in generation {self.generation}: {text}", sys.stderr)
        assert self.file.path is not None
        if self._has_newer():  # the agent knows that it is needed
            return
        try:
            write_durably(lost_file(self.file.path), f"{os.getpid()}\n")
        except OSError as error:  # the agent sees the ranks that died in any case
            print_line(f"note: {lost_file(self.file.path)} cannot be written: {error}", sys.stderr)

    def form(
        self, place: Place, recipe: Recipe, membership: Membership | None, agreed: str
    ) -> tuple[Layout, dist.ProcessGroup | None]:
        """Form the groups of a generation, together with its other ranks, in the order in which all form them.

        Args:
            place: of this rank.
            recipe: for the mesh.
            membership: of the generation. None at the launch.
            agreed: what must be the same on all ranks: recipe, settings and data.

        Returns:
            The layout, and a group for copies alone if the ranks can be replaced.

        Raises:
            UserError: the ranks do not agree.
            RuntimeError: a peer was lost.
        """
        connections = Connections()
        if membership and self.file.path:
            lost_file(self.file.path).unlink(missing_ok=True)
            try:
                tell_joining(self.file.path, membership.generation)
            except OSError as error:  # at worst this rank counts as stuck, and is replaced
                print_line(f"note: {self.file.path} cannot be answered: {error}", sys.stderr)
        with self._changed:
            self.generation = membership.generation if membership else 1
            self._is_cut = False
            can = CAPABILITY in capabilities(recipe, place.world, self.file)
            self._connections = connections if can else None
        meeting = None
        if membership:
            meeting = Meeting(membership.address, membership.port, membership.generation)
            if place.rank != 0:
                self._wait_for_rank_0(membership)
        dp, tp = preconditions.check_layout(recipe, place.world)
        layout = mesh.start(place, dp, tp, recipe.parallel.replicas, meeting)
        mesh.require_agreement("the recipe, its settings or the data", f"{agreed} {can}", layout.host)
        group = dist.new_group(backend="gloo", timeout=mesh.TIMEOUT) if can else None
        assert not isinstance(group, int)  # only for a rank outside the group
        connections.opened()
        return layout, group

    def _wait_for_rank_0(self, membership: Membership) -> None:
        """Wait until the store of the generation answers. torch's own wait for it cannot be cut off."""
        while True:
            self.require_whole()
            try:
                socket.create_connection((membership.address, membership.port), _ANSWER_SECONDS).close()
            except OSError:
                time.sleep(_LOOK_SECONDS / 2)
            else:
                return

    def _has_newer(self) -> bool:
        return self._newest is not None and self._newest.generation > self.generation

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            newest = self.file.newer(self.generation)
            if newest is None:
                continue
            if newest.rank is None:
                _leave(newest)
            with self._changed:
                if newest.generation <= self.generation:
                    continue
                self._newest = newest
                self.cut()  # before the other thread hears of it: what that forms next must stay
                self._changed.notify_all()


def _leave(membership: Membership) -> None:
    """End this process, which has no place any more. Its main thread may wait for a peer, so it is not asked."""
    print_line(
        f"error: superseded: generation {membership.generation} of {membership.attempt} has no place for this process",
        sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ExitCode.SUPERSEDED)
