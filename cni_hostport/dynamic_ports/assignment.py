"""The dynamic host ports that pods have, read from the ruleset: it alone knows them."""

from __future__ import annotations

import time
from functools import reduce

from cni_hostport import nf_answers, nf_tables
from cni_hostport.errors import NFTError
from cni_hostport.names import DYNAMIC, dnat_chain, key_in, request_and_pod

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cni_hostport.lookup import Lookup


# host ports by what was asked for, as text: {"80/tcp": 40017}
Assigned = dict[str, int]

# seconds between attempts to list; each but the last was spoiled by somebody else's change
PAUSES = (0, 0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
# in each element that leads to an attachment; others keep a port from being given, whatever their comment is
LEADS_TO_HOLDER = dnat_chain("").encode()


class Listing:
    """All dynamic host ports, as they were at one time; raises ``NFTError``."""

    def __init__(self, lookup: Lookup) -> None:
        """List them."""
        self._lookup, self._answers = lookup, answers(lookup, DYNAMIC)

    def keys(self) -> set[bytes]:
        """Return the ports, by their keys in the kernel."""
        return set().union(*map(nf_answers.dynamic_port_keys, self._answers))

    def by_pod(self, wanted: bytes = LEADS_TO_HOLDER) -> dict[str, Assigned]:
        """Return the host ports of each pod that has some, by its ID; perhaps only those with the ``wanted`` bytes.

        Of two with the same request, as while a pod's former sandbox is still there, the newer one counts.
        """
        return {pod_id: self._newest(keys) for pod_id, keys in self._keys(wanted).items()}

    def _keys(self, wanted: bytes) -> dict[str, dict[str, list[bytes]]]:
        """Return the keys of each request of each pod; those of one host port once."""
        found: dict[str, dict[str, list[bytes]]] = {}
        for answer in self._answers:
            if wanted in answer:  # to take all apart can take longer than an ADD
                for key, comment in nf_answers.members_with_comments(answer, wanted):
                    request, pod_id = request_and_pod(comment)
                    if not pod_id:
                        continue
                    keys = found.setdefault(pod_id, {}).setdefault(request, [])
                    if nf_tables.port(key) not in map(nf_tables.port, keys):
                        keys.append(key)
        return found

    def _newest(self, keys: Mapping[str, list[bytes]]) -> Assigned:
        """Return the host port of each request that was given last."""
        newest = {request: reduce(self._newer, some) for request, some in keys.items()}
        return {request: nf_tables.port(key) for request, key in newest.items()}

    def _newer(self, *keys: bytes) -> bytes:
        """Return that of two ports which was given after the other; the handles of chains grow."""
        elements = self._lookup.ask(*(nf_tables.get_element((DYNAMIC, key)) for key in keys))
        holders = [key_in(nf_answers.target(element)) if element else "" for element in elements]
        tokens = self._lookup.tokens(holders)
        first, second = (tokens.get(holder, b"") for holder in holders)
        return keys[first <= second]

    def assigned(self, pod_id: str, key: str = "") -> Assigned:
        """Return the host ports of one pod, whichever of its attachments has them.

        Of two with the same request, the one counts whose ``key`` is given, if it is one of them.
        """
        keys = self._keys(pod_id.encode()).get(pod_id, {})
        is_ambiguous = any(len(some) > 1 for some in keys.values())
        return self._newest(keys) | (self.held_by(key) if key and is_ambiguous else {})

    def held_by(self, key: str) -> Assigned:
        """Return the host ports that lead to one attachment, or to another one of its container until that leaves."""
        verdicts = self._lookup.elements(key, self._lookup.rules(dnat_chain(key))).values()
        others = {key_in(nf_answers.chain(verdict)) for verdict in verdicts} - {"", key}
        holders = *others, key  # its own ports go before those for which it waits
        pods = (ports for holder in holders for ports in self.by_pod(dnat_chain(holder).encode()).values())
        return {request: port for ports in pods for request, port in ports.items()}


def assigned(lookup: Lookup, pod_id: str, key: str = "") -> Assigned:
    """Return the host ports of one pod as ``Listing.assigned`` does; raises ``NFTError``."""
    return Listing(lookup).assigned(pod_id, key)


def all_assigned(lookup: Lookup) -> dict[str, Assigned]:
    """Return the host ports of each pod that has some, by its ID; raises ``NFTError``."""
    return Listing(lookup).by_pod()


def pods(lookup: Lookup, keys: Iterable[bytes]) -> set[str]:
    """Return the IDs of the pods that have ports, which are given by their keys in the kernel; raises ``NFTError``."""
    found = lookup.ask(*(nf_tables.get_element((DYNAMIC, key)) for key in keys))
    elements = (element for answer in found if answer for element in nf_answers.members_with_comments(answer))
    return {request_and_pod(comment)[1] for _, comment in elements} - {""}


def answers(lookup: Lookup, name: str) -> list[bytes]:
    """Return the answers for all elements of a map of ports, as they were at one time; raises ``NFTError``."""
    for pause in PAUSES:
        listed = lookup.dump(nf_tables.get_elements(name))
        if listed is not None:
            return listed
        time.sleep(pause)
    raise NFTError([(f"the elements of {name} are changed all the time, and cannot be listed", "")])
