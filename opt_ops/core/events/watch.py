"""Events: what the watch itself could not read or do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class InputLeftOut:
    """Observation: records of a file are not what docs/formats.md says. Written at the first one, and as more come.

    The counts are those since the file is read. The examples are untrusted text.
    """

    source: str  # what kind of file: telemetry, phases, heartbeats, reports, stacks, config, requests
    file: str  # relative to the lineage's folder
    count: int  # records (lines, or whole files) that were left out, wholly or in part
    taken: int  # records that were taken
    first: str
    newest: str
    most: bool = False  # more were left out than taken: it is another format

    @property
    def text(self) -> str:
        """For people: `3 lines of telemetry left out, newest: line 2,113: …`."""
        one, many = _RECORDS.get(self.source, ("record", "records"))
        words = one if self.count == 1 else many
        return f"{self.count:,} {words} left out, newest: {self.newest}"


_RECORDS = {
    "telemetry": ("line of telemetry", "lines of telemetry"),
    "phases": ("line of phases", "lines of phases"),
    "heartbeats": ("heartbeat", "heartbeats"),
    "reports": ("report on ranks", "reports on ranks"),
    "stacks": ("file of stacks", "files of stacks"),
    "config": ("file of settings", "files of settings"),
    "requests": ("request", "requests"),
}
"""By source, what a record is called: one, and several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatcherFailed:
    """Observation: a part of the watch failed and was skipped. The other parts go on."""

    watcher: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WatcherRecovered:
    """Observation: a part of the watch that had failed works again."""

    watcher: str
