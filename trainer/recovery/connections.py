"""The connections of one membership, and how to cut them: then every collective that waits for a peer ends.

Gloo has no way to leave a collective: ``abort`` of its groups does nothing in torch 2.13. A rank that waits for a lost
peer gets an error only if the connection to it breaks, and a rank that waits for a third one gets none at all. So the
first rank that leaves a collective cuts its own connections, and its peers get an error in turn.
"""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from torch.distributed import ProcessGroup

from trainer.recovery import rebuild

_OWN = Path("/proc/self/fd")


class Connections:
    """The TCP connections that the groups of one membership opened.

    Make it before the first group. Whatever TCP socket this process opens from then on, until :meth:`opened`, is one of
    them: of the groups and of their store.
    """

    def __init__(self) -> None:
        self._before = {socket_id for _, socket_id in _sockets()}
        self._opened: set[tuple[int, str]] | None = None
        self._communicators: list[ProcessGroup] = []
        self._is_cut = False

    @property
    def is_cut(self) -> bool:
        """Whether :meth:`cut` was called: results of collectives since then may be wrong."""
        return self._is_cut

    def opened(self) -> None:
        """Note that all groups exist. Sockets that this process opens later are not theirs.

        Gloo connects a group when it is made, all ranks with one another. NCCL has connections of its own, and a call
        that ends its collectives.
        """
        self._opened = self._since()
        self._communicators = rebuild.communicators()

    def cut(self) -> None:
        """Shut the connections down, in both directions. Any thread may call it, at any time, and more than once.

        Before :meth:`opened`, those are cut that exist by now: a rank that is still forming groups gets out as well.
        A descriptor stays open, because gloo closes it. One that now is another socket is left alone. So are listening
        sockets: gloo's thread that accepts connections would end the process.
        """
        self._is_cut = True
        communicators, self._communicators = self._communicators, []
        rebuild.stop(communicators)
        for number, socket_id in self._since() if self._opened is None else self._opened:
            _shut_down(number, socket_id)

    def _since(self) -> set[tuple[int, str]]:
        return {(number, socket_id) for number, socket_id in _sockets() if socket_id not in self._before}


def _sockets() -> Iterator[tuple[int, str]]:
    """The descriptors of this process that are sockets, each with what /proc names it by: ``socket:[inode]``."""
    for name in os.listdir(_OWN):  # noqa: PTH208  each name is a number
        if (target := _target(int(name))).startswith("socket:"):
            yield int(name), target


def _target(number: int) -> str:
    try:
        return os.readlink(_OWN / str(number))  # noqa: PTH115  no path, but the name of a socket
    except FileNotFoundError:  # closed by now
        return ""


def _shut_down(number: int, socket_id: str) -> None:
    """Shut down the TCP connection ``socket_id``, if the descriptor ``number`` still is that one."""
    try:
        copy = os.dup(number)
    except OSError:  # closed by now
        return
    try:
        # The copy keeps the socket that is looked at here: the descriptor may be closed and used again at any moment.
        if _target(copy) == socket_id:
            with socket.socket(fileno=os.dup(copy)) as found:
                if _is_connection(found):
                    found.shutdown(socket.SHUT_RDWR)
    except OSError:  # the peer was faster
        return
    finally:
        os.close(copy)


def _is_connection(found: socket.socket) -> bool:
    is_tcp = found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
    return is_tcp and not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
