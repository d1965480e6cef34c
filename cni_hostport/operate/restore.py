"""What was taken away by a ``flush ruleset``, a firewall's reload or a mistake, rebuilt from libcni's cache.

Runtimes go on adding and deleting pods meanwhile, and an attachment that is deleted must not come back. Its DEL leaves
the attachment's key in the ruleset, whatever else it finds there, and the transaction that restores an attachment fails
if its key is there. A DEL that finds nothing and has no word of mappings leaves the key only where it sees that
attachments are being restored: that is noted first, and the cache read afterwards. Of a DEL before that there may be no
trace, since a flush takes the keys away as well: what was restored of its attachment is removed again when the cache
forgets it, for as long as that is watched.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from cni_hostport import deletion, ownership, plugin, portmap
from cni_hostport.check import Comparison
from cni_hostport.config import NetworkConfig
from cni_hostport.errors import CNIError, Code, NFTError
from cni_hostport.kernel import localnet
from cni_hostport.kernel.nft import Nft
from cni_hostport.libcni import cache
from cni_hostport.lookup import Lookup
from cni_hostport.names import RESTORING, dnat_chain
from cni_hostport.ruleset.base import base_commands, deleted_command, deletion_note_commands

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cni_hostport.attachment import Attachment
    from cni_hostport.ownership import Log
    from cni_hostport.ruleset.installed import Installed
    from cni_hostport.ruleset.plan import Plan
    from cni_hostport.skel import Call

DELETED = "it was deleted"
PAUSE = 0.2  # seconds between looks for what the cache has forgotten


class Status(StrEnum):
    """What became of an attachment."""

    RESTORED = "restored"
    MISSING = "missing"  # and not restored: a dry run
    PRESENT = "present"
    GONE = "gone"
    FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of the attachment in one file of a cache.

    ``mappings`` are its host ports, ``text`` says why, and ``commands`` are what a dry run would have run.
    """

    status: Status
    attachment: str
    mappings: tuple[str, ...] = ()
    text: str = ""
    commands: tuple[str, ...] = ()


def candidates(directories: Sequence[Path]) -> list[Path]:
    """Return the files of caches that are worth a look, in the order in which the attachments were added.

    Raises ``OSError`` if a cache cannot be looked at.
    """
    found = []
    for path in cache.entries(directories):
        try:
            found.append((path.stat().st_mtime_ns, path))
        except FileNotFoundError:
            continue
        except OSError:
            found.append((0, path))  # to be told
    return [path for _, path in sorted(found) if _may_map(path)]


def _may_map(path: Path) -> bool:
    try:
        call = cache.read(path)
        return call is not None and bool(NetworkConfig.parse(call.config).mappings)
    except (CNIError, ValueError):
        return True  # to be told


def restore(
    paths: Sequence[Path], log: Log, *, dry_run: bool = False, watch: float = 0
) -> Iterator[tuple[Path, Outcome]]:
    """Restore the attachments in files of a cache, and yield the files with what became of each that has host ports.

    The base of the ruleset is put right as well. For ``watch`` seconds after that, what turns out to have been deleted
    is taken back, and yielded a second time. Raises ``NFTError`` if nftables cannot be used.
    """
    nft = Nft()
    before = nft.installed()
    if not paths and not before.chains:
        return  # a node without host ports, and no rules to put right
    comparison = Comparison(nft)
    damaged = _damaged(comparison) if before.chains else []
    if not dry_run:
        ownership.run_on_base(nft, deletion_note_commands(RESTORING))
    if damaged:
        commands = tuple(base_commands()) if dry_run else ()
        status = Status.MISSING if dry_run else Status.RESTORED
        yield Path(), Outcome(status, "the base of the ruleset", text="; ".join(damaged), commands=commands)
    restoration = _Restoration(nft, before, comparison, log, dry_run=dry_run)
    for path in paths:
        outcome = restoration.restore(path)
        if outcome:
            yield path, outcome
    yield from restoration.take_back(watch)


def _damaged(comparison: Comparison) -> list[str]:
    try:
        return comparison.of_base()
    except CNIError:
        return []  # it is put right all the same


@dataclass(frozen=True)
class _Restored:
    path: Path
    name: str
    key: str
    handle: bytes  # of the chain, which tells it from one that somebody made since


@dataclass(frozen=True)
class _Refused:
    path: Path
    name: str


def _is_forgotten(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False  # what cannot be told is not taken away
    return False


class _Restoration:
    """Several attachments, restored one after another."""

    def __init__(self, nft: Nft, before: Installed, comparison: Comparison, log: Log, *, dry_run: bool) -> None:
        self._nft = nft
        self._comparison = comparison
        self._log = log
        self._dry_run = dry_run
        self._before = before
        self._lookup = Lookup()
        self._restored: list[_Restored] = []
        self._refused: list[_Refused] = []

    def restore(self, path: Path) -> Outcome | None:
        """Restore the attachment in one file; ``None`` if there is none, or one without mappings."""
        seen, name = self._before, str(path)
        for attempt in range(ownership.ATTEMPTS):
            try:
                # always the ruleset first, then the cache: the transaction notices what was changed in between
                call = cache.read(path)
                if call is None:
                    return None
                name = cache.attachment(call)
                return self._restore_from(path, call, seen)
            except CNIError as error:
                return self._failed(path, name, error)
            except ValueError as error:
                return Outcome(Status.FAILED, name, text=str(error))
            except NFTError as error:
                if not error.may_be_a_race:
                    return Outcome(Status.FAILED, name, text=ownership.refused(error).msg)
                failure = ownership.lost_races(error)
            ownership.pause(attempt)
            seen = self._nft.installed()
        return Outcome(Status.FAILED, name, text=failure.msg)

    def _failed(self, path: Path, name: str, error: CNIError) -> Outcome:
        """Return what became of an attachment that was refused; if somebody else has its port, it may be gone."""
        refused = _Refused(path, name)
        if error.code == Code.PORT_TAKEN:
            gone = self._why_gone(refused)
            if gone:
                return Outcome(Status.GONE, name, text=gone)
            self._refused.append(refused)
        return Outcome(Status.FAILED, name, text=str(error))

    def _why_gone(self, refused: _Refused) -> str:
        """Return why there no longer is an attachment, empty if it is there or that cannot be told."""
        try:
            call = cache.read(refused.path)
            if call is None or self._lookup.is_deleted(plugin.attachment_of(call).key):
                return DELETED
            return cache.plan(call)[1]
        except (CNIError, NFTError, OSError, ValueError):
            return ""

    def _restore_from(self, path: Path, call: Call, seen: Installed) -> Outcome | None:
        name = cache.attachment(call)
        plan, gone = cache.plan(call)
        if plan is None:
            return Outcome(Status.GONE, name, text=gone) if gone else None
        attachment = plugin.attachment_of(call)
        mappings = tuple(dict.fromkeys(map(str, plan.forwards)))  # those of both families are one to a person
        if self._is_there(attachment, plan, seen):
            if not self._dry_run:  # which others may have reset
                localnet.open_for(plan, self._log)
            return Outcome(Status.PRESENT, name, mappings)
        if self._dry_run:
            portmap.Rules(self._lookup).in_the_way(attachment, plan)
            _, _, commands = ownership.reinstatement(self._nft, attachment, plan, seen)
            return Outcome(Status.MISSING, name, mappings, commands=tuple(commands))
        if not self._reinstate(path, name, attachment, plan, seen):
            return Outcome(Status.GONE, name, mappings, DELETED)
        return Outcome(Status.RESTORED, name, mappings)

    def _is_there(self, attachment: Attachment, plan: Plan, seen: Installed) -> bool:
        """Tell whether there are no rules to install: they are as they should be, or were added since this began."""
        token = dnat_chain(attachment.key)
        if seen.chains.get(token) != self._before.chains.get(token):
            return True
        return attachment.key in seen.holders and not self._comparison.is_changed(attachment, plan)

    def _reinstate(self, path: Path, name: str, attachment: Attachment, plan: Plan, seen: Installed) -> bool:
        """Install it, and tell whether that was done: not if it was deleted."""
        portmap.make_room(self._lookup, attachment, plan, self._log)
        try:
            own = ownership.reinstate(self._nft, attachment, plan, seen, self._log)
        except NFTError as error:
            if any(command == deleted_command("create", attachment.key) for _, command in error.refusals):
                return False
            raise
        held = self._lookup.find(attachment.key)
        if held:
            self._restored.append(_Restored(path, name, attachment.key, held.handle))
        plugin.follow_up(self._nft, own, self._log)
        return True

    def take_back(self, seconds: float) -> Iterator[tuple[Path, Outcome]]:
        """Remove what was restored although it was being deleted, which the end of that shows: the cache forgets it.

        What was refused, since somebody else has its port, may turn out to be gone as well.
        """
        watched, refused, until = list(self._restored), list(self._refused), time.monotonic() + seconds
        while watched or refused:
            for of, gone in [(of, gone) for of in refused if (gone := self._why_gone(of))]:
                refused.remove(of)
                yield of.path, Outcome(Status.GONE, of.name, text=gone)
            for restored in [of for of in watched if _is_forgotten(of.path)]:
                watched.remove(restored)
                held = self._lookup.find(restored.key)
                if held and held.handle == restored.handle:
                    deletion.remove(self._lookup, restored.key, held, self._log)
                yield restored.path, Outcome(Status.GONE, restored.name, text=DELETED)
            if time.monotonic() > until:
                return
            time.sleep(PAUSE)
