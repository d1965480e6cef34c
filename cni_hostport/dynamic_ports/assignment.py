"""The dynamic host ports that pods have, read from the ruleset: it alone knows them."""

from __future__ import annotations

from cni_hostport import nf_tables
from cni_hostport.names import DYNAMIC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cni_hostport.lookup import Lookup


# host ports by what was asked for, as text: {"80/tcp": 40017}
Assigned = dict[str, int]

ATTEMPTS = 5  # of a listing; each but the last was spoiled by somebody else's change


def assigned(lookup: Lookup, pod_id: str) -> Assigned:
    """Return the host ports of one pod, whichever of its attachments has them; raises ``NFTError``."""
    return _read(lookup, pod_id.encode()).get(pod_id, {})


def all_assigned(lookup: Lookup) -> dict[str, Assigned]:
    """Return the host ports of each pod that has some, by its ID; raises ``NFTError``."""
    return _read(lookup, b"")


def pods(lookup: Lookup, keys: Iterable[bytes]) -> set[str]:
    """Return the IDs of the pods that have ports, which are given by their keys in the kernel; raises ``NFTError``."""
    answers = lookup.ask(*(nf_tables.get_element((DYNAMIC, key)) for key in keys))
    elements = (element for answer in answers if answer for element in nf_tables.members_with_comments(answer))
    return {comment.partition(" ")[2] for _, comment in elements} - {""}


def _read(lookup: Lookup, wanted: bytes) -> dict[str, Assigned]:
    """Read those parts of the listing that have some bytes in them: to take all apart can take longer than an ADD."""
    answers = None
    for _ in range(ATTEMPTS):
        answers = lookup.dump(nf_tables.get_elements(DYNAMIC))
        if answers is not None:
            break
    found: dict[str, Assigned] = {}
    for answer in answers or ():
        if wanted in answer:
            for key, comment in nf_tables.members_with_comments(answer):
                request, _, pod_id = comment.partition(" ")
                found.setdefault(pod_id, {})[request] = nf_tables.port(key)
    return found
