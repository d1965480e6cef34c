"""What portmap left of containers that no longer exist: the check of doctor, and the removal on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport.errors import CNIError, NFTError
from cni_hostport.kernel.nft import Nft
from cni_hostport.lookup import Lookup
from cni_hostport.migration import iptables, nftables, removal
from cni_hostport.migration.census import Census, Fate
from cni_hostport.migration.leftover import addresses, by_container
from cni_hostport.operate.statements import note, ok, problem
from cni_hostport.portmap import Rules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cni_hostport.migration.census import Verdict
    from cni_hostport.migration.leftover import Leftover
    from cni_hostport.operate.statements import Statement

    Find = Callable[[Nft], list[Leftover]]

BACK_ENDS: dict[str, Find] = {"nftables": nftables.find, "iptables": iptables.find}


def statements(nft: Nft, caches: Sequence[Path], back_end: str) -> Iterator[Statement]:
    """Say of which containers one of portmap's back ends left rules.

    Raises ``CNIError`` or ``OSError`` if it cannot be told which of them exist, and ``NFTError``.
    """
    found = BACK_ENDS[back_end](nft)
    if not found:
        return
    existing = []
    for container_id, (verdict, leftovers) in _verdicts(found, caches).items():
        lines = tuple(str(port) for leftover in leftovers for port in leftover.ports)
        if verdict.fate is Fate.EXISTS:
            existing.append(f"{container_id}: {verdict.reason}")
        elif verdict.fate is Fate.UNKNOWN:
            yield note(
                f"whether portmap's container {container_id} exists cannot be told: {verdict.reason}", "", "", lines
            )
        else:
            severity = problem if verdict.heirs else note
            yield severity(
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
    found = [leftover for find in BACK_ENDS.values() for leftover in find(nft)]
    verdicts = _verdicts(found, caches)
    dead = {leftover for leftover in found if verdicts[leftover.container_id][0].fate is Fate.GONE}
    if not dead:
        return []
    # finding out who lives takes time, in which others act
    unchanged = [leftover for find in BACK_ENDS.values() for leftover in find(nft) if leftover in dead]
    rules = Rules(Lookup())
    for leftover in unchanged:
        removal.remove(rules, leftover.network, leftover.container_id)
    return [str(leftover) for leftover in unchanged]


def remove_and_tell(caches: Sequence[Path]) -> Iterator[Statement]:
    """Remove what ``remove`` does, and say what that was, or why it was nothing."""
    try:
        removed = remove(caches)
    except (CNIError, NFTError, OSError) as error:
        yield problem(f"portmap's leftovers were not removed: {error}")
    else:
        yield from map(ok, removed or ["portmap left nothing that can be removed"])


def _verdicts(found: Sequence[Leftover], caches: Sequence[Path]) -> dict[str, tuple[Verdict, list[Leftover]]]:
    census = Census.take(caches) if found else Census((), (), ())
    return {
        container_id: (census.verdict(container_id, addresses(leftovers)), leftovers)
        for container_id, leftovers in by_container(found).items()
    }
