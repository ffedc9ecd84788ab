"""Delivers alerts in threads, so that a slow alert service never delays the supervisor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from opt_ops.errors import NotDelivered
from opt_ops.ports import Alert


class Outbox:
    """Calls a function for each alert. It delivers the alert or raises `NotDelivered`."""

    def __init__(self, deliver: Callable[[Alert], None]) -> None:
        self._deliver = deliver
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="alert")
        self._running: dict[str, Future[str]] = {}

    def send(self, alert: Alert) -> None:
        """Begin to deliver an alert, unless that is under way."""
        if alert.id not in self._running:
            self._running[alert.id] = self._pool.submit(self._problem, alert)

    def delivered(self) -> Sequence[tuple[str, str]]:
        """Return the deliveries that ended since the last call: alert id and problem; empty: it was delivered."""
        ended = [name for name, future in self._running.items() if future.done()]
        return [(name, self._running.pop(name).result()) for name in ended]

    def _problem(self, alert: Alert) -> str:
        try:
            self._deliver(alert)
        except NotDelivered as error:
            return str(error)
        return ""
