"""What portmap left behind of containers that no longer exist: told, and removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport.errors import CNIError, NFTError
from cni_hostport.kernel.nft import Nft
from cni_hostport.lookup import Lookup
from cni_hostport.migration import iptables as leftovers_iptables
from cni_hostport.migration import nftables as leftovers_nftables
from cni_hostport.migration.census import Census, Fate
from cni_hostport.operate.statements import note, ok, problem
from cni_hostport.portmap import Rules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cni_hostport.migration.census import Verdict
    from cni_hostport.migration.nftables import Leftover
    from cni_hostport.operate.statements import Statement

    Find = Callable[[Nft], list[Leftover]]

BACKENDS: dict[str, Find] = {"nftables": leftovers_nftables.find, "iptables": leftovers_iptables.find}


def statements(nft: Nft, caches: Sequence[Path], find: Find) -> Iterator[Statement]:
    """Say what one of portmap's back ends left of which containers.

    Raises ``CNIError`` or ``OSError`` if it cannot be told which of them exist, and ``NFTError``.
    """
    found = find(nft)
    if not found:
        return
    existing = []
    for container_id, (verdict, of) in _verdicts(found, caches).items():
        lines = tuple(str(one) for leftover in of for one in leftover.translations)
        if verdict.fate is Fate.EXISTS:
            existing.append(f"{container_id}: {verdict.reason}")
        elif verdict.fate is Fate.UNKNOWN:
            yield note(
                f"whether portmap's container {container_id} exists cannot be told: {verdict.reason}", "", "", lines
            )
        else:
            say = problem if verdict.heirs else note
            yield say(
                f"portmap's rules of container {container_id} are there, and the container is not",
                f"These ports lead into another pod: {'; '.join(verdict.heirs)}."
                if verdict.heirs
                else "They lead these ports to whichever pod gets the address next.",
                "hostport doctor --remove-portmap-leftovers removes them, and no others.",
                lines,
            )
    if existing:
        yield ok(f"containers that portmap mapped exist, and their rules stay: {len(existing)}", *existing)


def remove(caches: Sequence[Path]) -> list[str]:
    """Remove portmap's rules of containers that no longer exist, and return what was removed, a line each.

    Raises ``CNIError`` or ``OSError``, with nothing changed, if it cannot be told which of them exist, and ``CNIError``
    or ``NFTError`` if rules cannot be read or removed.
    """
    nft = Nft()
    found = [leftover for find in BACKENDS.values() for leftover in find(nft)]
    verdicts = _verdicts(found, caches)
    dead = {leftover for leftover in found if verdicts[leftover.container_id][0].fate is Fate.GONE}
    if not dead:
        return []
    # finding out who lives takes time, in which others act
    still = [leftover for find in BACKENDS.values() for leftover in find(nft) if leftover in dead]
    rules = Rules(Lookup())
    for leftover in still:
        rules.remove(leftover.network, leftover.container_id)
    return [str(leftover) for leftover in still]


def removal(caches: Sequence[Path]) -> Iterator[Statement]:
    """Remove what ``remove`` does, and say what that was, or why it was nothing."""
    try:
        removed = remove(caches)
    except (CNIError, NFTError, OSError) as error:
        yield problem(f"portmap's leftovers were not removed: {error}")
    else:
        yield from map(ok, removed or ["portmap left nothing that can be removed"])


def _verdicts(found: Sequence[Leftover], caches: Sequence[Path]) -> dict[str, tuple[Verdict, list[Leftover]]]:
    of_container: dict[str, list[Leftover]] = {}
    for leftover in found:
        of_container.setdefault(leftover.container_id, []).append(leftover)
    census = Census.take(caches) if found else Census((), (), ())
    return {
        container_id: (census.verdict(container_id, frozenset(ip for one in of for ip in one.addresses)), of)
        for container_id, of in of_container.items()
    }
