"""What the attachments in libcni's cache want installed again, their dynamic host ports included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cni_hostport import plugin
from cni_hostport.dynamic_ports import allocation, note
from cni_hostport.errors import CNIError, NFTError
from cni_hostport.libcni import cache
from cni_hostport.operate import requests
from cni_hostport.operate.deletion_watch import Entry
from cni_hostport.operate.outcome import Outcome, OutcomeStatus

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cni_hostport.attachment import Attachment
    from cni_hostport.dynamic_ports.assignment import Assigned
    from cni_hostport.dynamic_ports.request import Block
    from cni_hostport.kernel.nft import Nft
    from cni_hostport.log import Log
    from cni_hostport.lookup import Lookup
    from cni_hostport.operate.deletion_watch import DeletionWatch
    from cni_hostport.ruleset.plan import Plan, Request

    Outcomes = dict[Path, Outcome | None]  # None of what has no mappings


@dataclass(frozen=True)
class CachedAttachment:
    """An attachment that a cache has, and what it wants installed."""

    entry: Entry
    attachment: Attachment
    plan: Plan

    def outcome(self, status: OutcomeStatus, text: str = "", commands: Sequence[str] = ()) -> Outcome:
        """Return an outcome of it, with its host ports."""
        mappings = dict.fromkeys(map(str, self.plan.forwards))  # those of both families are one to a person
        return Outcome(status, self.entry.name, tuple(mappings), text, tuple(commands))


class _LackingError(Exception):
    """A host port has to be picked for an attachment, which has none any more."""


class CacheReader:
    """Reads entries of caches, as often as asked.

    Attachments for which host ports have to be picked are left out, and their files are in ``lacking``, until ``picks``
    is set.
    """

    def __init__(self, nft: Nft, lookup: Lookup, watch: DeletionWatch) -> None:
        """Begin with nothing read; ``watch`` is told of attachments that are refused."""
        self.lacking: list[Path] = []
        self.picks = False
        self._nft = nft
        self._lookup = lookup
        self._watch = watch
        self._unnoted: dict[str, tuple[Sequence[Block], Assigned]] = {}  # by keys: host ports other than those noted

    def read(self, paths: Sequence[Path]) -> tuple[list[CachedAttachment], Outcomes, list[Path]]:
        """Return what files' attachments want, the outcomes of the other files, and the files to be read once more."""
        wanted: list[CachedAttachment] = []
        unread: list[Path] = []
        outcomes: Outcomes = {}
        for path in paths:
            try:
                read = self._read(path, waits=len(paths) == 1)
            except ValueError as error:
                outcomes[path] = Outcome(OutcomeStatus.FAILED, str(path), text=str(error))
                unread += [path] if len(paths) > 1 else []  # the others do not wait until it is written
            else:
                outcomes[path] = None if isinstance(read, CachedAttachment) else read
                wanted += [read] if isinstance(read, CachedAttachment) else []
        return wanted, outcomes, unread

    def write_note(self, attachment: Attachment, log: Log) -> None:
        """Note the dynamic host ports of an attachment that was restored, if they are not those that were noted."""
        if attachment.key in self._unnoted:
            note.write(attachment, *self._unnoted[attachment.key], log)

    def _read(self, path: Path, *, waits: bool) -> CachedAttachment | Outcome | None:
        """Read what a file's attachment wants; raises ``ValueError``, a sentence, if the file cannot be read."""
        call = cache.read(path, waits=waits)
        if call is None or not plugin.may_have_host_ports(call):
            return None
        entry = Entry(path, requests.name(call))
        try:
            plan, gone = requests.plan(call, self._pick)
        except _LackingError:
            self.lacking.append(path)
            return None
        except (CNIError, NFTError, ValueError) as error:
            return self._watch.note_refused(entry, error)
        if plan is None:
            return Outcome(OutcomeStatus.GONE, entry.name, text=gone) if gone else None
        return CachedAttachment(entry, plugin.attachment_of(call), plan)

    def _pick(self, request: Request, attachment: Attachment, kept: Assigned) -> Assigned:
        picked = allocation.complete(self._nft, self._lookup, request, attachment, kept)
        self._unnoted.pop(attachment.key, None)
        if not picked.items() <= kept.items():
            if not self.picks:
                raise _LackingError
            self._unnoted[attachment.key] = request.blocks, picked
        return picked
