"""Attachments that lost their rules to a ``flush ruleset``, a firewall's reload or a mistake, and their restoration.

What they asked for is in libcni's cache. Meanwhile, runtimes go on to add and delete pods, and what is deleted must not
come back:

- A DEL notes the attachment's key in the ruleset, even where it finds nothing else of it. The transaction that restores
  an attachment fails if its key is there.
- A DEL that finds nothing, and is not told of mappings, notes the key only while attachments are being restored. It
  sees that by another note, which is made first; the cache is read after that.
- A flush also removes the notes of DELs before it. Such a DEL ends later: the cache then forgets the attachment. That
  is watched for some time, and what was restored of the attachment is removed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cni_hostport import deletion, failures, ownership, plugin
from cni_hostport.check import Comparison
from cni_hostport.config import NetworkConfig
from cni_hostport.errors import CNIError, Code, NFTError
from cni_hostport.kernel import localnet, refusals
from cni_hostport.kernel.nft import Nft
from cni_hostport.libcni import cache
from cni_hostport.lookup import Lookup
from cni_hostport.migration import removal
from cni_hostport.names import RESTORING, dnat_chain
from cni_hostport.operate import requests
from cni_hostport.operate.outcome import Outcome, OutcomeStatus
from cni_hostport.portmap import Rules
from cni_hostport.ruleset.base import base_commands, deleted_command, deletion_note_commands

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cni_hostport.attachment import Attachment
    from cni_hostport.log import Log
    from cni_hostport.ruleset.installed import Installed
    from cni_hostport.ruleset.plan import Plan
    from cni_hostport.skel import Call

DELETED = "it was deleted"
WATCH_INTERVAL = 0.2  # seconds between looks for what the cache has forgotten


def candidates(directories: Sequence[Path]) -> list[Path]:
    """Return the files of caches whose attachments may have host ports, in the order in which these were added.

    A file that cannot be read is among them: its outcome says so. Raises ``OSError`` if a cache cannot be looked at.
    """
    found = []
    for path in cache.entries(directories):
        try:
            found.append((path.stat().st_mtime_ns, path))
        except FileNotFoundError:
            continue
        except OSError:
            found.append((0, path))
    return [path for _, path in sorted(found) if _may_have_mappings(path)]


def _may_have_mappings(path: Path) -> bool:
    try:
        call = cache.read(path)
        return call is not None and bool(NetworkConfig.parse(call.config).mappings)
    except (CNIError, ValueError):
        return True


def restore(
    paths: Sequence[Path], log: Log, *, dry_run: bool = False, watch_seconds: float = 0
) -> Iterator[tuple[Path | None, Outcome]]:
    """Restore the attachments in files of a cache. Yield the files whose attachments have host ports, and the outcomes.

    The base of the ruleset is put right as well: its outcome comes without a file. For ``watch_seconds`` after that,
    attachments are removed again that turn out to have been deleted; their files are yielded a second time. Raises
    ``NFTError`` if nftables cannot be used.
    """
    nft = Nft()
    before = nft.installed()
    if not paths and not before.chains:
        return  # a node without host ports, and no rules to put right
    comparison = Comparison(nft)
    damaged = _damaged_base_chains(comparison) if before.chains else []
    if not dry_run:
        ownership.run_on_base(nft, deletion_note_commands(RESTORING))
    if damaged:
        commands = tuple(base_commands()) if dry_run else ()
        status = OutcomeStatus.MISSING if dry_run else OutcomeStatus.RESTORED
        yield None, Outcome(status, "the base of the ruleset", text="; ".join(damaged), commands=commands)
    restoration = _Restoration(nft, before, comparison, log, dry_run=dry_run)
    for path in paths:
        outcome = restoration.restore(path)
        if outcome:
            yield path, outcome
    yield from restoration.remove_deleted(watch_seconds)


def _damaged_base_chains(comparison: Comparison) -> list[str]:
    try:
        return comparison.damaged_base_chains()
    except CNIError:
        return []  # it is put right all the same


@dataclass(frozen=True)
class _Entry:
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

    entry: _Entry
    key: str
    handle: bytes


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
        self._refused: list[_Entry] = []  # since somebody else has its port

    def restore(self, path: Path) -> Outcome | None:
        """Restore the attachment in one file; ``None`` if there is none, or one without mappings."""
        installed, entry = self._before, _Entry(path, str(path))
        for attempt in range(ownership.ATTEMPTS):
            try:
                # always the ruleset first, then the cache: the transaction notices what was changed in between
                call = cache.read(path)
                if call is None:
                    return None
                entry = _Entry(path, requests.attachment(call))
                return self._restore_call(entry, call, installed)
            except CNIError as error:
                return self._failed(entry, error)
            except ValueError as error:
                return Outcome(OutcomeStatus.FAILED, entry.name, text=str(error))
            except NFTError as error:
                if not refusals.may_be_a_race(error):
                    return Outcome(OutcomeStatus.FAILED, entry.name, text=failures.refused(error).msg)
                failure = failures.lost_races(error, ownership.ATTEMPTS)
            ownership.pause(attempt)
            installed = self._nft.installed()
        return Outcome(OutcomeStatus.FAILED, entry.name, text=failure.msg)

    def _failed(self, entry: _Entry, error: CNIError) -> Outcome:
        """Return the outcome of an attachment that was refused; if somebody else has its port, it may be gone."""
        if error.code == Code.PORT_TAKEN:
            gone = self._why_gone(entry)
            if gone:
                return Outcome(OutcomeStatus.GONE, entry.name, text=gone)
            self._refused.append(entry)
        return Outcome(OutcomeStatus.FAILED, entry.name, text=str(error))

    def _why_gone(self, entry: _Entry) -> str:
        """Return why an attachment no longer exists, empty if it does or that cannot be told."""
        try:
            call = cache.read(entry.path)
            if call is None or self._lookup.is_deleted(plugin.attachment_of(call).key):
                return DELETED
            return requests.plan(call)[1]
        except (CNIError, NFTError, OSError, ValueError):
            return ""

    def _restore_call(self, entry: _Entry, call: Call, installed: Installed) -> Outcome | None:
        plan, gone = requests.plan(call)
        if plan is None:
            return Outcome(OutcomeStatus.GONE, entry.name, text=gone) if gone else None
        attachment = plugin.attachment_of(call)
        mappings = tuple(dict.fromkeys(map(str, plan.forwards)))  # those of both families are one to a person
        if self._is_installed(attachment, plan, installed):
            if not self._dry_run:
                localnet.open_for(plan, self._log)  # others may have reset route_localnet
            return Outcome(OutcomeStatus.PRESENT, entry.name, mappings)
        if self._dry_run:
            removal.claims_of_gone_containers(Rules(self._lookup), attachment, plan)
            _, _, commands = ownership.reinstatement(self._nft, attachment, plan, installed)
            return Outcome(OutcomeStatus.MISSING, entry.name, mappings, commands=tuple(commands))
        if not self._reinstate(entry, attachment, plan, installed):
            return Outcome(OutcomeStatus.GONE, entry.name, mappings, DELETED)
        return Outcome(OutcomeStatus.RESTORED, entry.name, mappings)

    def _is_installed(self, attachment: Attachment, plan: Plan, installed: Installed) -> bool:
        """Tell whether there are no rules to install: they are as they should be, or were added since this began."""
        token = dnat_chain(attachment.key)
        if installed.chains.get(token) != self._before.chains.get(token):
            return True
        return attachment.key in installed.holders and not self._comparison.is_changed(attachment, plan)

    def _reinstate(self, entry: _Entry, attachment: Attachment, plan: Plan, installed: Installed) -> bool:
        """Install an attachment again; ``False`` if it was not, since it was deleted."""
        self._lookup.leave_open()
        removal.make_room(Rules(self._lookup), attachment, plan, self._log)
        try:
            in_force = ownership.reinstate(self._nft, attachment, plan, installed, self._log)
        except NFTError as error:
            if any(command == deleted_command("create", attachment.key) for _, command in error.refusals):
                return False
            raise
        held = self._lookup.find(attachment.key)
        if held:
            self._restored.append(_Restored(entry, attachment.key, held.handle))
        plugin.follow_up(self._nft, in_force, self._log)
        return True

    def remove_deleted(self, watch_seconds: float) -> Iterator[tuple[Path, Outcome]]:
        """Remove what was restored of attachments whose deletion had begun: they are those that the cache forgets.

        Attachments that were refused, since somebody else has their port, may turn out to be gone as well.
        """
        watched, refused, end = list(self._restored), list(self._refused), time.monotonic() + watch_seconds
        while watched or refused:
            for entry, gone in [(entry, gone) for entry in refused if (gone := self._why_gone(entry))]:
                refused.remove(entry)
                yield entry.path, Outcome(OutcomeStatus.GONE, entry.name, text=gone)
            for restored in [restored for restored in watched if restored.entry.is_forgotten()]:
                watched.remove(restored)
                held = self._lookup.find(restored.key)
                if held and held.handle == restored.handle:
                    deletion.remove(self._lookup, restored.key, held, self._log)
                yield restored.entry.path, Outcome(OutcomeStatus.GONE, restored.entry.name, text=DELETED)
            if time.monotonic() > end:
                return
            time.sleep(WATCH_INTERVAL)
