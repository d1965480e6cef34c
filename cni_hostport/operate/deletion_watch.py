"""Attachments restored, or refused, whose deletion has begun already: that shows when the cache forgets them.

``operate.restore`` says why that can be.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cni_hostport import deletion, failures, plugin
from cni_hostport.errors import CNIError, Code, NFTError
from cni_hostport.libcni import cache
from cni_hostport.lookup import Lookup
from cni_hostport.operate import requests
from cni_hostport.operate.outcome import Outcome, OutcomeStatus

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from cni_hostport.log import Log

    Refusal = CNIError | NFTError | ValueError

DELETED = "it was deleted"
INTERVAL = 0.2  # seconds between looks


@dataclass(frozen=True)
class Entry:
    """A file of a cache, and the name of its attachment for people."""

    path: Path
    name: str

    def is_forgotten(self) -> bool:
        """Tell whether the cache certainly has it no more."""
        try:
            self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False
        return False


@dataclass(frozen=True)
class _Restored:
    """An attachment that was restored, and the handle of its chain, which one that is made later does not have."""

    entry: Entry
    key: str
    handle: bytes


class DeletionWatch:
    """Keeps an eye on entries of a cache."""

    def __init__(self, log: Log) -> None:
        """Begin with none."""
        self._log = log
        self._lookup = Lookup()
        self._lookup.leave_open()
        self._restored: list[_Restored] = []
        self._refused: list[Entry] = []

    def note_restored(self, entries: Mapping[str, Entry]) -> None:
        """Watch entries whose attachments, by their keys, were restored just now."""
        tokens = self._lookup.tokens(list(entries))
        self._restored += [_Restored(entries[key], key, handle) for key, handle in tokens.items()]

    def note_refused(self, entry: Entry, error: Refusal) -> Outcome:
        """Return the outcome of an attachment that was refused. If somebody else has its port, it is gone, or watched.

        ``error`` says why it was refused.
        """
        if isinstance(error, NFTError):
            error = failures.refused(error)
        if isinstance(error, CNIError) and error.code == Code.PORT_TAKEN:
            gone = self.why_gone(entry)
            if gone:
                return Outcome(OutcomeStatus.GONE, entry.name, text=gone)
            self._refused.append(entry)
        return Outcome(OutcomeStatus.FAILED, entry.name, text=str(error))

    def why_gone(self, entry: Entry) -> str:
        """Return why an attachment no longer exists, empty if it does or that cannot be told."""
        try:
            call = cache.read(entry.path)
            if call is None or self._lookup.is_deleted(plugin.attachment_of(call).key):
                return DELETED
            return requests.plan(call)[1]
        except (CNIError, NFTError, OSError, ValueError):
            return ""

    def run(self, seconds: float) -> Iterator[tuple[Path, Outcome]]:
        """Watch for so long. Remove what was restored of attachments that the cache forgets; yield what became of them.

        Attachments that were refused may turn out to be gone as well.
        """
        watched, refused, end = list(self._restored), list(self._refused), time.monotonic() + seconds
        while watched or refused:
            for entry, gone in [(entry, gone) for entry in refused if (gone := self.why_gone(entry))]:
                refused.remove(entry)
                yield entry.path, Outcome(OutcomeStatus.GONE, entry.name, text=gone)
            for restored in [restored for restored in watched if restored.entry.is_forgotten()]:
                watched.remove(restored)
                held = self._lookup.find(restored.key)
                # what was found of one with many ports does not have the handle
                if held and self._lookup.tokens([restored.key]).get(restored.key) == restored.handle:
                    deletion.remove(self._lookup, restored.key, held, self._log)
                yield restored.entry.path, Outcome(OutcomeStatus.GONE, restored.entry.name, text=DELETED)
            if time.monotonic() > end:
                return
            time.sleep(INTERVAL)
