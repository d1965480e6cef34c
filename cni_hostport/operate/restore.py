"""What was taken away by a ``flush ruleset``, a firewall's reload or a mistake, rebuilt from libcni's cache.

Runtimes go on adding and deleting pods meanwhile, and an attachment that is deleted must not come back. Its DEL leaves
the attachment's key in the ruleset, whatever else it finds there, and the transaction that restores an attachment fails
if its key is there. A DEL that finds nothing and has no word of mappings leaves the key only where it sees that
attachments are being restored: that is noted first, and the cache read afterwards. Of a DEL before that there may be no
trace, since a flush takes the keys away as well. It is most often at its end then, and what was restored of its
attachment is removed again when the cache forgets it.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from cni_hostport import comparison, host, ownership, plugin
from cni_hostport.attachment import SHORT_ID, pod_name
from cni_hostport.config import NetworkConfig
from cni_hostport.errors import CNIError, NFTError
from cni_hostport.lookup import Lookup
from cni_hostport.nft import Nft
from cni_hostport.operate import cache
from cni_hostport.table import RESTORING, base, deleted, dnat_chain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cni_hostport.attachment import Attachment
    from cni_hostport.installed import Installed
    from cni_hostport.ownership import Log
    from cni_hostport.plan import Plan
    from cni_hostport.skel import Call

WATCH = 2  # seconds in which a DEL that had begun before has come to its end


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
    """Return the files of caches that are worth a look, in the order in which the attachments were added."""
    found = []
    for path in cache.entries(directories):
        with suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found) if _may_map(path)]


def _may_map(path: Path) -> bool:
    try:
        call = cache.read(path)
        return call is not None and bool(NetworkConfig.parse(call.config).mappings)
    except (CNIError, ValueError):
        return True  # to be told


def restore(paths: Sequence[Path], log: Log, *, dry_run: bool = False) -> Iterator[Outcome]:
    """Restore the attachments in files of a cache, and yield what became of each; some have nothing to restore.

    The base of the ruleset is put right as well. Raises ``NFTError`` if nftables cannot be used.
    """
    nft = Nft()
    if not paths and not nft.installed().chains:
        return  # a node without host ports, and no rules to put right
    if not dry_run:
        _begin(nft)
    restoration = _Restoration(nft, log, dry_run=dry_run)
    for path in paths:
        outcome = restoration.restore(path)
        if outcome:
            yield outcome
    yield from restoration.take_back()


def _begin(nft: Nft) -> None:
    """Note that attachments are being restored."""
    commands = [*base(), *(deleted(verb, RESTORING) for verb in ("add", "delete", "add"))]
    try:
        nft.run(commands)
    except NFTError as error:
        if not error.of_other_declarations:
            raise
        ownership.declare_again(nft)
        nft.run(commands)


@dataclass(frozen=True)
class _Restored:
    path: Path
    key: str
    name: str
    handle: bytes  # of the chain, which tells it from one that somebody made since


class _Restoration:
    """Several attachments, restored one after another."""

    def __init__(self, nft: Nft, log: Log, *, dry_run: bool) -> None:
        self._nft = nft
        self._log = log
        self._dry_run = dry_run
        self._before = nft.installed()
        self._lookup = Lookup()
        self._restored: list[_Restored] = []

    def restore(self, path: Path) -> Outcome | None:
        """Restore the attachment in one file; ``None`` if there is none, or one without mappings."""
        seen, name = self._before, str(path)
        for attempt in range(ownership.ATTEMPTS):
            try:
                # always the ruleset first, then the cache: the transaction notices what was changed in between
                call = cache.read(path)
                if call is None:
                    return None
                name = _name(call)
                return self._restore_from(path, call, seen)
            except (CNIError, ValueError) as error:
                return Outcome(Status.FAILED, name, text=str(error))
            except NFTError as error:
                if not error.may_be_a_race:
                    return Outcome(Status.FAILED, name, text=ownership.refused(error).msg)
                failure = ownership.lost_races(error)
            ownership.pause(attempt)
            seen = self._nft.installed()
        return Outcome(Status.FAILED, name, text=failure.msg)

    def _restore_from(self, path: Path, call: Call, seen: Installed) -> Outcome | None:
        if not host.has_interface(call.netns, call.ifname):
            where = f"its network namespace {call.netns}"
            gone = f"{call.ifname} is gone from {where}" if host.is_namespace(call.netns) else f"{where} is gone"
            return Outcome(Status.GONE, _name(call), text=gone)
        plan = plugin.plan_of(call)
        if plan is None or not plan.forwards:
            return None
        attachment, name = plugin.attachment_of(call), _name(call)
        mappings = tuple(dict.fromkeys(map(str, plan.forwards)))  # those of both families are one to a person
        own, token = ownership.unshared(seen, attachment, plan), dnat_chain(attachment.key)
        is_new = seen.chains.get(token) != self._before.chains.get(token)
        present = attachment.key in seen.holders
        if is_new or not own.forwards or (present and not comparison.differences(attachment, plan)):
            return Outcome(Status.PRESENT, name, mappings, "it was added meanwhile" if is_new else "")
        if self._dry_run:
            commands = ownership.reinstatement(attachment, own, seen, [attachment.key] if present else [])
            return Outcome(Status.MISSING, name, mappings, commands=tuple(commands))
        if not self._reinstate(attachment, plan, seen):
            return Outcome(Status.GONE, name, mappings, "it was deleted")
        held = self._lookup.find(attachment.key)
        if held:
            self._restored.append(_Restored(path, attachment.key, name, held.handle))
        return Outcome(Status.RESTORED, name, mappings)

    def _reinstate(self, attachment: Attachment, plan: Plan, seen: Installed) -> bool:
        try:
            own = ownership.reinstate(self._nft, attachment, plan, seen, self._log)
        except NFTError as error:
            if any(command == deleted("create", attachment.key) for _, command in error.refusals):
                return False
            raise
        plugin.follow_up(self._nft, attachment, own, self._log)
        return True

    def take_back(self) -> Iterator[Outcome]:
        """Remove what was restored although it was being deleted, which the end of that shows: the cache forgets it."""
        watched, until = self._restored, time.monotonic() + (WATCH if self._restored else 0)
        while watched:
            for restored in [of for of in watched if not of.path.exists()]:
                watched.remove(restored)
                held = self._lookup.find(restored.key)
                if held and held.handle == restored.handle and not self._lookup.remove(restored.key, held):
                    ownership.release(self._nft, restored.key, self._log)
                yield Outcome(Status.GONE, restored.name, text="it was deleted")
            if time.monotonic() > until:
                return
            time.sleep(WATCH / 10)


def _name(call: Call) -> str:
    pod = pod_name(call.args)
    who = f"pod {pod}" if pod else f"container {call.container_id[:SHORT_ID]}"
    return f"{who}, {call.ifname} on network {call.network}"
