"""Changes in directories, told by the kernel (inotify): also in those that do not exist yet.

pyroute2 has no use for this: its own reader waits without an end, and fails on a watch that is gone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# linux/inotify.h
IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO = 0x4, 0x8, 0x40, 0x80
IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF = 0x100, 0x200, 0x400, 0x800
IN_ONLYDIR = 0x01000000
ENTRIES = IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO
MASK = ENTRIES | IN_ATTRIB | IN_CLOSE_WRITE | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
EVENT = struct.Struct("iIII")
BUFFER_BYTES = 64 << 10


class DirectoryWatch:
    """Tells that something may have changed in directories.

    Where the kernel has no more watches to give, ``fault`` is why, and nothing is told.
    """

    def __init__(self, ignored: str) -> None:
        """Watch nothing yet; files whose names begin with ``ignored`` are none of the caller's business."""
        self._ignored = os.fsencode(ignored)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._watches: set[int] = set()
        self.fault = ""
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            self.fault = os.strerror(ctypes.get_errno())

    def fileno(self) -> int:
        """Return the descriptor that can be read when something has changed; -1 if there is none."""
        return int(self._descriptor)

    def set(self, directories: Iterable[Path]) -> None:
        """Watch these directories, or what exists of the paths to them, and what they are in; and no others."""
        if self._descriptor < 0:
            return
        self.fault = ""
        watches = {self._add(place) for directory in directories for place in _places(directory)} - {-1}
        for gone in self._watches - watches:
            self._libc.inotify_rm_watch(self._descriptor, gone)  # fails where the directory is gone, too
        self._watches = watches

    def _add(self, directory: Path) -> int:
        watch = self._libc.inotify_add_watch(self._descriptor, os.fsencode(directory), MASK)
        if watch < 0 and ctypes.get_errno() not in {errno.ENOENT, errno.ENOTDIR}:
            self.fault = f"{directory}: {os.strerror(ctypes.get_errno())}"
        return int(watch)

    def wait(self, timeout: float) -> bool:
        """Wait for so many seconds at most, and tell whether something changed."""
        poll = select.poll()
        if self._descriptor >= 0:
            poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(timeout * 1000)) and self.drain()

    def drain(self) -> bool:
        """Forget what is told so far, and tell whether that was anything."""
        changed = False
        with suppress(BlockingIOError):
            while self._descriptor >= 0:
                data, place = os.read(self._descriptor, BUFFER_BYTES), 0
                while place < len(data):
                    length = EVENT.unpack_from(data, place)[3]
                    place += EVENT.size
                    changed |= not (length and data[place : place + length].startswith(self._ignored))
                    place += length
        return changed

    def close(self) -> None:
        """Watch nothing any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def _places(directory: Path) -> list[Path]:
    """Return a directory, and the next above it that exists: there it appears, or a link to it is changed."""
    absolute = Path(os.path.abspath(directory))
    above = next((parent for parent in absolute.parents if parent.is_dir()), Path("/"))
    return [above, absolute]
