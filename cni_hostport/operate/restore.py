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

from typing import TYPE_CHECKING

from cni_hostport import ownership, plugin
from cni_hostport.check import Comparison
from cni_hostport.dynamic_ports import pod_files
from cni_hostport.errors import CNIError, NFTError
from cni_hostport.kernel.nft import Nft
from cni_hostport.libcni import cache, directory
from cni_hostport.lookup import Lookup
from cni_hostport.names import RESTORING
from cni_hostport.operate.outcome import Outcome, OutcomeStatus
from cni_hostport.operate.restoration import Restoration
from cni_hostport.ruleset.base import base_commands, deletion_note_commands

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cni_hostport.log import Log


def candidates(directories: Sequence[Path]) -> list[Path]:
    """Return the files of caches, in the order in which their attachments were added.

    Raises ``OSError`` if a cache cannot be looked at.
    """
    found = []
    for path in directory.entries(directories):
        try:
            found.append((path.stat().st_mtime_ns, path))
        except FileNotFoundError:
            continue
        except OSError:
            found.append((0, path))
    return [path for _, path in sorted(found)]


def restore(
    paths: Sequence[Path], log: Log, *, dry_run: bool = False, watch_seconds: float = 0
) -> Iterator[tuple[Path | None, Outcome]]:
    """Restore the attachments in files of a cache. Yield the files whose attachments have host ports, and the outcomes.

    The base of the ruleset is put right as well: its outcome comes without a file. So are the files that tell pods
    their dynamic host ports. For ``watch_seconds`` after that, attachments are removed again that turn out to have been
    deleted; their files are yielded a second time. Raises ``NFTError`` if nftables cannot be used.
    """
    nft = Nft()
    before = nft.installed()
    if not before.chains and not any(map(_may_have_mappings, paths)):
        return  # a node without host ports, and no rules to put right
    comparison = Comparison(nft)
    damaged = _damaged_base_chains(comparison) if before.chains else []
    if not dry_run:
        ownership.run_on_base(nft, deletion_note_commands(RESTORING))
    if damaged:
        commands = tuple(base_commands()) if dry_run else ()
        status = OutcomeStatus.MISSING if dry_run else OutcomeStatus.RESTORED
        yield None, Outcome(status, "the base of the ruleset", text="; ".join(damaged), commands=commands)
    restoration = Restoration(nft, before, comparison, log, dry_run=dry_run)
    yield from restoration.restore(paths)
    if not dry_run:
        try:
            pod_files.keep_all(Lookup(), log)
        except NFTError as error:  # what was restored has to be watched all the same
            log(f"whether the files of pods tell their dynamic host ports cannot be read: {error}")
    yield from restoration.watch.run(watch_seconds)


def _may_have_mappings(path: Path) -> bool:
    """Tell whether a file's attachment has host ports, or may have some since the file cannot be read."""
    try:
        call = cache.read(path)
    except ValueError:
        return True
    return call is not None and plugin.may_have_host_ports(call)


def _damaged_base_chains(comparison: Comparison) -> list[str]:
    try:
        return comparison.damaged_base_chains()
    except CNIError:
        return []  # it is put right all the same
