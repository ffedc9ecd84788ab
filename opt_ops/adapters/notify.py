"""Sends alerts, and pings a service that watches the daemon from outside.

An `https://…` or `http://…` URL gets the alert as JSON. Any other URL is for apprise, which must be installed. URLs are
secrets: only the scheme, and the host of a web address, are ever shown. Titles and bodies hold text from logs and
nodes. They are sent as plain text, and markup of chat systems is escaped.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from typing import Any

from opt_ops.errors import NotDelivered
from opt_ops.ports import Alert

TIMEOUT_SECONDS = 10.0
LARGEST_BODY = 4000  # characters; chat systems and pagers accept that much in one message

_SEVERITIES = ("info", "warning", "page")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")

log = logging.getLogger("opt_ops.notify")


@dataclass(frozen=True, slots=True)
class Delivery:
    """The delivery of an alert to one URL (masked). `why`: the reason of the failure; empty if it was delivered."""

    url: str
    why: str


class UrlNotifier:
    """Sends alerts to a list of URLs, in parallel.

    An invalid URL fails when it is used, not before: a daemon without alerts is better than no daemon.
    """

    def __init__(self, urls: Sequence[str], least: str = "warning") -> None:
        """`urls` may hold environment variables as `$NAME` or `${NAME}`; `least` is the lowest severity to send."""
        self._urls = tuple(urls)
        self._least = _SEVERITIES.index(least)
        self._missing: dict[str, tuple[str, ...]] = {}

    def send(self, alert: Alert) -> None:
        """Send an alert to every URL, if it is severe enough. Blocks for about 10 s at most.

        Raises:
            NotDelivered: some URLs did not accept it. The next call for this alert sends it only to those.
        """
        if _SEVERITIES.index(alert.severity) < self._least:
            return
        urls = self._missing.pop(alert.id, self._urls)
        deliveries = deliver(alert, urls)
        if failed := [delivery for delivery in deliveries if delivery.why]:
            missing = zip(urls, deliveries, strict=True)
            self._missing[alert.id] = tuple(url for url, delivery in missing if delivery.why)
            reasons = "; ".join(f"{delivery.url}: {delivery.why}" for delivery in failed)
            raise NotDelivered(
                f"alert {alert.id} was not delivered to {reasons}", "opt-ops alerts test tries every URL"
            )


def deliver(alert: Alert, urls: Sequence[str]) -> list[Delivery]:
    """Send an alert of any severity to all URLs at once, and wait. Returns the deliveries in the order of `urls`."""
    if not urls:
        return []
    with ThreadPoolExecutor(max_workers=min(len(urls), 8)) as pool:
        return list(pool.map(lambda url: Delivery(masked(url), _deliver(alert, url)), urls))


def _deliver(alert: Alert, url: str) -> str:
    """Return why the alert was not delivered to `url`; empty if it was."""
    try:
        address = expanded(url)
    except ValueError as error:
        return str(error)
    if address.startswith(("https://", "http://")):
        return _http(address, json.dumps(_payload(alert)).encode())
    return _by_apprise(address, alert)


def expanded(url: str) -> str:
    """Return `url` with its environment variables replaced.

    Raises:
        ValueError: a variable is not set. The message names it, and shows nothing else of the URL.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ValueError(f"the environment variable {name} is not set")
        return os.environ[name]

    return _VARIABLE.sub(value, url)


def masked(url: str) -> str:
    """Return what may be shown of a URL: `https://host:port/…`, `slack://…`, or the name of its variable."""
    try:
        address = expanded(url)
    except ValueError:
        return "$" + next(name for match in _VARIABLE.findall(url) for name in match if name)
    scheme, separator, rest = address.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return "…"
    if scheme not in ("http", "https"):
        return f"{scheme}://…"  # in apprise's URLs even the host can be a token
    host = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2]
    return f"{scheme}://{host}/…"


def _payload(alert: Alert) -> dict[str, str]:
    """The JSON body. Chat systems show `text`: `&`, `<`, `>` are escaped in it, so it can hold no mention or link."""
    text = f"{_title(alert)}\n{_plain(alert.body)}".replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {"id": alert.id, "severity": alert.severity, "title": alert.title, "body": alert.body, "text": text}


def _title(alert: Alert) -> str:
    return _plain(f"[{alert.severity}] {alert.title}".replace("\n", " "))


def _plain(text: str) -> str:
    """Without control characters, and cut to the largest body."""
    kept = "".join(character for character in text if character.isprintable() or character == "\n")
    return kept if len(kept) <= LARGEST_BODY else kept[:LARGEST_BODY] + "…"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET, whose success would look like a delivery."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """Refuse."""


def _http(address: str, content: bytes | None) -> str:
    """POST JSON, or GET without content. Returns why it failed, without the address; empty if it succeeded."""
    headers = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(address, data=content, headers=headers)  # noqa: S310  (http or https)
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=TIMEOUT_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        known = error.code in list(HTTPStatus)
        return f"HTTP {error.code} {HTTPStatus(error.code).phrase if known else ''}".strip()
    except urllib.error.URLError as error:
        reason = error.reason
        return (reason.strerror if isinstance(reason, OSError) else None) or type(reason).__name__
    except (OSError, HTTPException, ValueError) as error:  # their messages may quote the address
        return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__


def _by_apprise(address: str, alert: Alert) -> str:
    try:
        import apprise
    except ImportError:
        return "needs apprise: pip install 'opt-ops[alerts]'"
    logging.getLogger("apprise").disabled = True  # it logs whole URLs
    types = apprise.NotifyType
    kind = {"info": types.INFO, "warning": types.WARNING, "page": types.FAILURE}[alert.severity]
    try:
        sender = apprise.Apprise()
        if not sender.add(address):
            return "apprise does not know this kind of URL"
        taken = sender.notify(
            title=_title(alert), body=_plain(alert.body), notify_type=kind, body_format=apprise.NotifyFormat.TEXT
        )
    except Exception as error:  # noqa: BLE001  (code of a hundred services; its messages may quote the URL)
        return type(error).__name__
    return "" if taken else "apprise could not deliver it"


class DeadManSwitch:
    """Pings an outside service that alerts on-call when the pings stop, even if this whole machine is down."""

    def __init__(self, url: str | None, seconds: float) -> None:
        """`url`: http or https, as in `UrlNotifier`; None: no pings."""
        self._url = url
        self._seconds = seconds
        self._pinged_at: float | None = None
        self._ping: threading.Thread | None = None
        self._why = ""

    def step(self) -> None:
        """Ping in the background if it is time. At most one ping runs at a time, and its errors are only logged."""
        if self._url is None or (self._ping is not None and self._ping.is_alive()):
            return
        if self._pinged_at is not None and time.monotonic() - self._pinged_at < self._seconds:
            return
        self._pinged_at = time.monotonic()
        self._ping = threading.Thread(target=self._send, args=(self._url,), name="heartbeat", daemon=True)
        self._ping.start()

    def _send(self, url: str) -> None:
        try:
            address = expanded(url)
            why = _http(address, None) if address.startswith(("https://", "http://")) else "its URL is not http(s)"
        except ValueError as error:
            why = str(error)
        if why != self._why:  # once, not at every ping
            log.warning("heartbeat ping to %s: %s", masked(url), why or "accepted again")
        self._why = why
