"""Sets and conditions on which libnftables crashes, found and put into words."""

from __future__ import annotations

from cni_hostport.errors import LibraryEndedError, NFTError
from cni_hostport.kernel.nft import Nft
from cni_hostport.lookup import Lookup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from cni_hostport.errors import UnavailableError

CONDITIONS = ("conditionsV4", "conditionsV6")
MAX_TRIED = 32  # sets; libnftables is started anew for each on which it crashes
REMEDY = (
    "bring the nftables of this node (libnftables) to 1.1.3 or later, or have whoever owns that set declare it with"
    " an older version"
)


def sets() -> list[str]:
    """Return the sets and maps of this network namespace that libnftables cannot list without crashing.

    Each is named as in ``set inet filter blocked``. With each set, nftables stores notes for its other versions, and
    it crashes on those: of the sets with the same notes, one is tried. Raises ``NFTError`` where nf_tables or
    libnftables cannot be used.
    """
    by_notes: dict[bytes, list[str]] = {}
    for name, notes in Lookup().notes_at_sets():
        by_notes.setdefault(notes, []).append(name)
    nft = Nft()
    return [name for alike in list(by_notes.values())[:MAX_TRIED] if _crashes(nft, alike[0]) for name in alike]


def _crashes(nft: Nft, name: str) -> bool:
    try:
        nft.listing(name)
    except LibraryEndedError as end:
        return end.is_crash
    except NFTError:  # gone, or of a family that this version does not know
        return False
    return False


def explained(error: UnavailableError, config: Mapping[str, Any]) -> str:
    """Return the reason of an error for a person, with a remedy, in a call with this network configuration."""
    reason = str(error)
    if not isinstance(error, LibraryEndedError) or not error.is_crash:
        return reason
    try:
        found = sets() if error.knew_sets else []
    except NFTError:
        found = []
    if found:
        return f"{reason} on {found[0]}: {REMEDY}"
    tokens = {key: config[key] for key in CONDITIONS if isinstance(config.get(key), list)}  # a DEL takes anything
    conditions = [f"{key} '{' '.join(map(str, words))}'" for key, words in tokens.items() if words]
    if conditions:
        return f"{reason}, most likely on {' or '.join(conditions)}: write it in another way"
    return f"{reason}: bring the nftables of this node (libnftables) to a newer version"
