"""The dynamic host ports that pods have, read from the ruleset: it alone knows them."""

from __future__ import annotations

import time

from cni_hostport import nf_tables
from cni_hostport.errors import NFTError
from cni_hostport.names import DYNAMIC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cni_hostport.lookup import Lookup


# host ports by what was asked for, as text: {"80/tcp": 40017}
Assigned = dict[str, int]

# seconds between attempts to list; each but the last was spoiled by somebody else's change
PAUSES = (0, 0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)


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
    found: dict[str, Assigned] = {}
    for answer in _listing(lookup):
        if wanted in answer:
            for key, comment in nf_tables.members_with_comments(answer):
                request, _, pod_id = comment.partition(" ")
                found.setdefault(pod_id, {})[request] = nf_tables.port(key)
    return found


def _listing(lookup: Lookup) -> list[bytes]:
    for pause in PAUSES:
        answers = lookup.dump(nf_tables.get_elements(DYNAMIC))
        if answers is not None:
            return answers
        time.sleep(pause)
    raise NFTError([("the dynamic host ports are changed all the time, and cannot be listed", "")])
