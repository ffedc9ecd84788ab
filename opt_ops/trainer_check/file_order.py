"""Which of two files of a folder was written first, told by the kernel (inotify(7)): times of files are too coarse."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

_MODIFY, _MOVED_TO, _CREATE = 0x2, 0x80, 0x100
_EVENT = struct.Struct("iIII")


class FileOrder:
    """Records the order in which files of one folder appear and are written. Close it."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd >= 0:
            libc.inotify_add_watch(self._fd, os.fsencode(folder), _MODIFY | _MOVED_TO | _CREATE)

    def appeared_before_written(self, name: str, other: str) -> bool | None:
        """Whether file `name` was there before anything was written to file `other`. None if the kernel did not say."""
        for event, mask in self._events():
            if event == name:
                return True
            if event == other and mask & (_MODIFY | _MOVED_TO):
                return False
        return None

    def _events(self) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        while self._fd >= 0:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # no more of them
                break
            at = 0
            while at < len(data):
                _, mask, _, length = _EVENT.unpack_from(data, at)
                at += _EVENT.size
                found.append((os.fsdecode(data[at : at + length].rstrip(b"\0")), mask))
                at += length
        return found

    def close(self) -> None:
        """Stop recording."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
