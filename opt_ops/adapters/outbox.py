"""Alerts on their way: each delivered by a thread, so that a slow pager never holds up the watch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from opt_ops.errors import NotDelivered
from opt_ops.ports import Alert


class Outbox:
    """Hands alerts to a function that delivers one, or raises `NotDelivered`."""

    def __init__(self, deliver: Callable[[Alert], None]) -> None:
        self._deliver = deliver
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="alert")
        self._running: dict[str, Future[str]] = {}

    def send(self, alert: Alert) -> None:
        """Begin to deliver it, unless that is under way."""
        if alert.id not in self._running:
            self._running[alert.id] = self._pool.submit(self._problem, alert)

    def delivered(self) -> Sequence[tuple[str, str]]:
        """The deliveries that ended since the last call, each with what went wrong; empty if nothing did."""
        ended = [name for name, future in self._running.items() if future.done()]
        return [(name, self._running.pop(name).result()) for name in ended]

    def _problem(self, alert: Alert) -> str:
        try:
            self._deliver(alert)
        except NotDelivered as error:
            return str(error)
        return ""
