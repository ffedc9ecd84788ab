"""How long no heartbeat of a held node was read, and whether the node itself is the cause.

A node is not blamed for what keeps its heartbeats from being read:

- The daemon is delayed. The time between two looks counts for at most half the timeout, so several looks are always
  needed to call a node silent.
- No heartbeat of any node is read, for example because the shared file system hangs. Then four times the timeout is
  needed. When the first node is heard again, the others get one more timeout.

A lost machine says nothing, but its peers do: their ranks find broken connections. Where ranks on two other nodes say
so, two missed heartbeats are enough. Neither is enough alone: a heartbeat may be late, and a connection may break.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

SPREAD_SECONDS = 3.0  # between the last heartbeats of nodes that fell silent together: one interval and a tick
TOLD_SECONDS = 5.0  # two heartbeats and a tick; then a node is silent whose ranks have left their peers
_TOLD_BY = 2  # nodes whose ranks have lost a peer
_ALL_SILENT = 4.0  # times the timeout with one node, before the silence of all is believed


@dataclass(slots=True)
class _Held:
    at: float  # last heard, or first held, by the clock
    counted: float  # the same, in counted seconds
    heard: bool
    close: float  # as `counted`, in seconds that a single look cannot make many
    again: float | None = None  # end of an outage since which the node was not heard, in counted seconds


class Silence:
    """Follows the held nodes from look to look. Times are those of a monotonic clock, in seconds."""

    def __init__(self, timeout: float) -> None:
        """`timeout`: counted seconds without a heartbeat, after which one node is silent."""
        self._timeout = timeout
        self._nodes: dict[str, _Held] = {}
        self._looked_at: float | None = None
        self._counted = 0.0  # seconds in which heartbeats could be noticed
        self._close = 0.0
        self._outage = False
        self._peers: frozenset[str] = frozenset()  # nodes one of which is lost, as the others say

    def look(
        self,
        now: float,
        heard: Iterable[str],
        held: Iterable[str],
        peers: Collection[str] = (),
        told: Iterable[str] = (),
    ) -> None:
        """Take note of one look.

        Args:
            now: Seconds of a monotonic clock.
            heard: The nodes of which a heartbeat came since the look before.
            held: All nodes.
            peers: The nodes of which the ranks are connected.
            told: Those of them whose newest heartbeat says that a rank there has lost a peer.
        """
        if self._looked_at is not None:
            self._counted += min(now - self._looked_at, self._timeout / 2)
            self._close += min(now - self._looked_at, TOLD_SECONDS / 2)
        self._looked_at = now
        held = set(held)
        for name in self._nodes.keys() - held:
            del self._nodes[name]  # if it is held again, it is a new node here
        for name in held:
            if name not in self._nodes:
                self._nodes[name] = _Held(now, self._counted, heard=False, close=self._close)
        before = self._least()
        known = [name for name in heard if name in self._nodes]
        for name in known:
            self._nodes[name] = _Held(now, self._counted, heard=True, close=self._close)
        if known and len(self._nodes) > 1 and before > self._timeout - SPREAD_SECONDS:
            self._end_outage()
        self._outage = len(self._nodes) > 1 and (
            self._timeout - SPREAD_SECONDS < self._least() < _ALL_SILENT * self._timeout
        )
        by = [name for name in told if name in self._nodes and not self._missed(name)]
        enough = len(by) >= max(1, min(_TOLD_BY, len(peers) - 1))
        self._peers = frozenset(peers) if enough else frozenset()

    def _missed(self, node: str) -> bool:
        """Whether two heartbeats of the node are missing."""
        return self._close - self._nodes[node].close > TOLD_SECONDS

    def told(self, node: str) -> bool:
        """Whether two heartbeats of the node are missing, and ranks on other nodes have lost a peer."""
        return node in self._peers and node in self._nodes and self._missed(node)

    def _end_outage(self) -> None:
        for node in self._nodes.values():
            if node.counted < self._counted and node.again is None:  # once: it must not put off judgement for ever
                node.again = self._counted

    def _least(self) -> float:
        """Counted seconds in which no node was heard. A node that was never heard counts only if no node was."""
        heard = [node.counted for node in self._nodes.values() if node.heard]
        return self._counted - max(heard or [node.counted for node in self._nodes.values()], default=self._counted)

    def heard_at(self, node: str) -> float | None:
        """When the node was last heard, or first held; None: it is not held."""
        return self._nodes[node].at if node in self._nodes else None

    def seconds(self, node: str) -> float:
        """Seconds by the clock from then to the last look."""
        at = self.heard_at(node)
        return 0.0 if at is None or self._looked_at is None else self._looked_at - at

    def silent(self, node: str) -> bool:
        """Whether the node was not heard for longer than the timeout, or is `told`."""
        long = node in self._nodes and self._counted - self._nodes[node].counted > self._timeout
        return long or self.told(node)

    def lost(self, node: str) -> bool:
        """Whether the node is silent by its own fault: no outage explains it."""
        if self._outage or not self.silent(node):
            return False
        again = self._nodes[node].again
        return again is None or self._counted - again > self._timeout
