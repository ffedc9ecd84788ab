"""Delivers alerts in threads, so that a slow alert service never delays the supervisor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from opt_ops.errors import NotDelivered
from opt_ops.ports import Alert


class Outbox:
    """Calls a function for each alert. It delivers the alert or raises `NotDelivered`."""

    def __init__(self, deliver: Callable[[Alert], None], got_through: Callable[[], None] = lambda: None) -> None:
        """`got_through` is called when `delivered` finds that a message was delivered."""
        self._deliver = deliver
        self._got_through = got_through
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="alert")
        self._running: dict[str, Future[str]] = {}

    def send(self, alert: Alert) -> None:
        """Begin to deliver an alert, unless that is under way."""
        if alert.id in self._running:
            return
        try:
            self._running[alert.id] = self._pool.submit(self._problem, alert)
        except RuntimeError as error:  # the system has no thread left
            failed: Future[str] = Future()
            failed.set_result(f"alert {alert.id} was not delivered: {error}")
            self._running[alert.id] = failed

    def delivered(self) -> Sequence[tuple[str, str]]:
        """Return the deliveries that ended since the last call: alert id and problem; empty: it was delivered."""
        ended = [name for name, future in self._running.items() if future.done()]
        outcomes = [(name, self._running.pop(name).result()) for name in ended]
        if any(not problem for _, problem in outcomes):
            self._got_through()
        return outcomes

    @property
    def busy(self) -> bool:
        """Whether an alert is under way, or its outcome was not asked for yet."""
        return bool(self._running)

    def close(self) -> None:
        """Do not begin another delivery. What is not delivered stays open in the journal."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _problem(self, alert: Alert) -> str:
        try:
            self._deliver(alert)
        except NotDelivered as error:
            return str(error)
        except Exception as error:  # noqa: BLE001  (the guard of one delivery: whatever fails, the alert stays open)
            return f"alert {alert.id} was not delivered: {type(error).__name__}: {error}"
        return ""
