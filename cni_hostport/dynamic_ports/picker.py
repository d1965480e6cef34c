"""The host ports that a pod gets: in its order, the first ones that nobody has, or of which the holders are gone."""

from __future__ import annotations

from functools import cached_property
from itertools import count, islice
from typing import TYPE_CHECKING

from cni_hostport import nf_answers, nf_tables
from cni_hostport.dynamic_ports import order, pod_files
from cni_hostport.dynamic_ports.assignment import Listing, answers
from cni_hostport.dynamic_ports.ranges import written
from cni_hostport.dynamic_ports.request import AssignedPort, named
from cni_hostport.errors import CNIError, Code, shortened
from cni_hostport.kernel import listeners, presence
from cni_hostport.names import ANY_ADDRESS, DYNAMIC, ONE_ADDRESS, dynamic_comment
from cni_hostport.precedence import in_the_way
from cni_hostport.ruleset.commands import reservation

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from cni_hostport.attachment import Attachment
    from cni_hostport.config import NetworkConfig
    from cni_hostport.dynamic_ports.assignment import Assigned
    from cni_hostport.dynamic_ports.request import Block
    from cni_hostport.kernel.nft import Nft
    from cni_hostport.lookup import Lookup
    from cni_hostport.ruleset.plan import Forward, Request

    Port = tuple[str, int]  # protocol and host port

PORT_BYTES = 8  # of protocol and port at the end of a key
# candidates; that many are asked for in less time than it takes to list what 1,000 pods have
ASKED_WITHOUT_LISTING = 32


def given(lookup: Lookup, versions: Iterable[int]) -> dict[int, set[bytes]]:
    """Return the keys of all ports that are mapped for one host address, by IP version; raises ``NFTError``."""
    listed = {version: answers(lookup, ONE_ADDRESS[version]) for version in versions}
    return {
        version: {key for answer in found for key in nf_answers.members(answer)} for version, found in listed.items()
    }


class OvertakenError(Exception):
    """Another of the pod's networks was given ports since it was looked which ones the pod has."""


class Picker:
    """Picks host ports by what there is in the ruleset now."""

    def __init__(
        self, nft: Nft, lookup: Lookup, request: Request, attachment: Attachment, taken: Collection[Port]
    ) -> None:
        """Take what the ports are for, and those that are certainly somebody else's."""
        self._nft, self._lookup, self._request, self._attachment = nft, lookup, request, attachment
        self._taken = {*taken, *((mapping.protocol, mapping.host_port) for mapping in request.config.mappings)}
        self._known: set[bytes] | None = None  # the dynamic host ports that ``present`` has seen

    @cached_property
    def _listing(self) -> Listing:
        """The dynamic host ports that there are: the more pods have some, the longer it takes."""
        return Listing(self._lookup)

    def present(self, *, may_be_new: bool = True) -> Assigned:
        """Return the host ports that the pod has already.

        A new pod is known by the lack of its files' directory. If another of its networks could not make that, or has
        not yet, ``pick`` meets that one's ports.
        """
        attachment = self._attachment
        if may_be_new and pod_files.is_new(attachment.pod_id) and not self._lookup.tokens([attachment.key]):
            self._known = set()
            return {}
        self._known = self._listing.keys()
        return self._listing.assigned(attachment.pod_id, attachment.key)

    def pick(self, kept: Assigned) -> Assigned:
        """Return the host port of each request: those that are ``kept``, unless somebody has taken them, and others.

        Raises ``OvertakenError`` where it meets ports of the same pod that ``present`` has not seen.
        """
        picked: Assigned = {}
        lacking: list[Block] = []
        for block in self._request.blocks:
            ports = [kept.get(str(request), 0) for request in block]
            if ports == [*range(ports[0], ports[0] + len(block))] and ports[0] and not self._are_taken(block, ports[0]):
                self._note(block, ports[0], picked)
            else:
                lacking.append(block)
        if lacking:
            _check_allowance(self._request.config)
        for block in sorted(lacking, key=len, reverse=True):  # a single port may part the only neighbours that are left
            self._note(block, self._first_port(block), picked)
        return picked

    def _note(self, block: Block, first: int, picked: Assigned) -> None:
        for request, port in zip(block, range(first, first + len(block)), strict=True):
            picked[str(request)] = port
            self._taken.add((request.protocol, port))

    def _are_taken(self, block: Block, first: int) -> bool:
        protocol = block[0].protocol
        return not self._taken.isdisjoint([(protocol, port) for port in range(first, first + len(block))])

    def _first_port(self, block: Block) -> int:
        """Return the first port of the first candidate that is free, or that nobody else has who lives."""
        for candidates in (self._free(block), self._reclaimable(block)):
            first = self._first_quiet(block, candidates)
            if first:
                return first
        raise CNIError(Code.PORT_TAKEN, _nothing_free(self._request.config, block))

    def _candidates(self, block: Block) -> Iterator[int]:
        """Yield what may be the first port of a block."""
        seed = self._attachment.pod or self._attachment.pod_id
        ports = order.first_ports(self._request.config.dynamic_ports, len(block), seed, named(block))
        return (first for first in ports if not self._are_taken(block, first))

    def _first_quiet(self, block: Block, candidates: Iterable[int]) -> int:
        """Return the first of some candidates on whose ports no program of the node listens, 0 if there is none."""
        for some in _growing(candidates):
            try:
                busy = listeners.busy(block[0].protocol, {first + n for first in some for n in range(len(block))})
            except OSError:
                busy = set()  # as for ports that are asked for by their numbers
            for first in some:
                if busy.isdisjoint(range(first, first + len(block))):
                    return first
        return 0

    def _free(self, block: Block) -> Iterator[int]:
        """Yield the candidates of which nobody has any port, for whichever address."""
        starts, length, mapped = self._key_starts(block), len(block), self._given_as_dynamic
        own = dynamic_comment("", self._attachment.pod_id).encode()

        def keys(first: int) -> list[bytes]:
            return [start + port.to_bytes(2) + b"\0\0" for port in range(first, first + length) for start in starts]

        candidates = (
            first
            for number, first in enumerate(self._candidates(block))
            if number < ASKED_WITHOUT_LISTING or self._dynamic.isdisjoint(keys(first))
        )
        for some in _growing(candidates):
            left = some
            for name in (DYNAMIC, ANY_ADDRESS):  # in a range, what is held most often is a dynamic port
                asked = [(first, (name, key)) for first in left for key in keys(first)]
                found = self._lookup.ask(*(nf_tables.get_element(element) for _, element in asked))
                met = {key for (_, (_, key)), answer in zip(asked, found, strict=True) if answer and own in answer}
                if name == DYNAMIC and self._known is not None and not met <= self._known:
                    raise OvertakenError
                held = {first for (first, _), answer in zip(asked, found, strict=True) if answer}
                left = [first for first in left if first not in held]
            yield from (first for first in left if mapped.isdisjoint(keys(first)))

    def _key_starts(self, block: Block) -> list[bytes]:
        """Return what the keys of a block's ports begin with, before the port, by the IP versions that it gets."""
        forwards = self._forwards(block, 0)
        return list({nf_tables.packed_port(reservation(forward)[1])[:-4]: None for forward in forwards})

    @cached_property
    def _dynamic(self) -> set[bytes]:
        """The keys of the dynamic host ports that there are."""
        if self._known == set() and self._listing.assigned(self._attachment.pod_id):
            raise OvertakenError
        return self._listing.keys()

    @cached_property
    def _given_as_dynamic(self) -> set[bytes]:
        """The ports that are mapped for one host address, by the keys that they would have as dynamic ones."""
        return {
            nf_tables.packed_port(f"ipv{version} . tcp . 0")[:-PORT_BYTES] + key[-PORT_BYTES:]
            for version, keys in given(self._lookup, self._request.pods).items()
            for key in keys
        }

    def _forwards(self, block: Block, first: int) -> list[Forward]:
        ports = [AssignedPort(request, first + n) for n, request in enumerate(block)]
        return [forward for port in ports for forward in self._request.forwards(port)]

    def _reclaimable(self, block: Block) -> Iterator[int]:
        """Yield the candidates that are free by now, or whose holders all are gone or leave with this very request.

        An attachment's older plan leaves, with the ports that it had for other requests.
        """
        presence.note(self._attachment)
        key, sees = self._attachment.key, bool(self._attachment.identity)  # else everybody would seem to be gone
        installed, view = self._nft.installed(), presence.View()
        for first in self._candidates(block):
            forwards = self._forwards(block, first)
            holders = [element for forward in forwards for element in in_the_way(installed, forward)]
            if all(element.holder == key or (sees and view.is_gone(element.owner)) for element in holders):
                yield first


def _growing(candidates: Iterable[int]) -> Iterator[list[int]]:
    """Yield the first one, then two, then three, and so on: most often the first one will do."""
    left = iter(candidates)
    for size in count(1):
        some = [*islice(left, size)]
        if not some:
            return
        yield some


def _check_allowance(config: NetworkConfig) -> None:
    """Raise ``CNIError`` with ``INVALID_CONFIG`` if a network gives no dynamic host ports, or not as many."""
    count, allowed = sum(map(len, config.requests)), config.dynamic_ports_per_pod
    if config.dynamic_ports and count <= allowed:
        return
    asked = f"the container asks for dynamic host ports, {shortened(', '.join(map(named, config.requests)))}"
    if not config.dynamic_ports:
        raise CNIError(Code.INVALID_CONFIG, f"{asked}, and this network gives none: it has no dynamicPorts")
    raise CNIError(Code.INVALID_CONFIG, f"{asked}: these are {count}, and dynamicPortsPerPod allows {allowed}")


def _nothing_free(config: NetworkConfig, block: Block) -> str:
    lack = "port is free" if len(block) == 1 else f"{len(block)} neighbouring ports are free"
    return f"the range of dynamic host ports {written(config.dynamic_ports)} is full: no {lack} for {named(block)}"
