"""A note while no daemon watches: the command writes it itself, as a short-lived owner of the journal."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_ops.contract.files import open_append
from opt_ops.core.events import NoteAdded
from opt_ops.core.state.model import State
from opt_ops.ports import Request
from opt_ops.runfolder.journal import Journal
from opt_ops.runfolder.liveness import JOB_WATCH_FILE, LOCK, may_live_elsewhere, signs_in, take_lock
from opt_ops.runfolder.permissions import group_of, private
from opt_ops.supervise.operator_requests import event_of


def write_note(lineage: Path, state: State, author: str, arguments: Mapping[str, Any]) -> str | None:
    """Journal a note, if this process can hold the daemon's lock meanwhile. Returns the id of its request.

    None: it was not written. A daemon may be at the journal: the lock is held or cannot be taken, a daemon of another
    host has given a sign of late, or `opt-ops run watch-job` writes this lineage. Or there is no journal to write to.
    """
    elsewhere = any(may_live_elsewhere(sign, time.time()) for sign in signs_in(lineage.parent))
    if state.lineage is None or (lineage / JOB_WATCH_FILE).exists() or elsewhere:
        return None
    request = Request(request=str(uuid.uuid4()), author=author, verb="note", arguments=arguments)
    event = event_of(state, request)
    if not isinstance(event, NoteAdded):
        return None
    try:
        with open_append(lineage.parent / LOCK) as lock:
            take_lock(lock)
            with private(group_of(lineage)):
                journal = Journal(lineage / "journal")
            try:
                journal.append(journal.stamp(event, time.time()))
            finally:
                journal.close()
    except OSError:  # held, or the file system has no locks, or this user may not write: the note goes to the inbox
        return None
    return request.request
