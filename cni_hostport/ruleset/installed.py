"""What the kernel holds: from nft's listings to holders of ports, commands that remove them, and differences. Pure."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from cni_hostport.names import (
    ANY_ADDRESS,
    FAMILY,
    LOCALNET_NEEDS,
    MAPS,
    ONE_ADDRESS,
    POD_MAPS,
    PODS,
    PORT_MAPS,
    PROTOCOLS,
    TABLE,
    WAITING_MAPS,
    address_form,
    dnat_chain,
    key_in,
    masq_chain,
    unpacked,
    waiting_map,
)
from cni_hostport.ruleset.commands import create_command, holder_element, target_removal_commands, waiter_element
from cni_hostport.ruleset.comment import Owner

MAP_LISTINGS = [f"map {FAMILY} {TABLE} {name}" for name in MAPS]
EVERYBODYS = (f"chains {FAMILY}", *MAP_LISTINGS)  # what to list, and in which order, for ``Installed.read``


@dataclass(frozen=True, slots=True)
class Element:
    """An installed map element: its map, its key as nft prints it, the chain it leads to, and what it says.

    That of a port says who the owner is and counts the new connections, that of a pod's address names the network. One
    of ``WAITING_MAPS`` is about a ``waiter``, the key of the attachment, which wants the port of the one it leads to.
    """

    map: str
    key: str
    chain: str
    owner: Owner
    connections: int = 0
    network: str = ""
    waiter: str = ""

    @property
    def holder(self) -> str:
        """The key of the attachment it leads to, empty if it leads elsewhere."""
        return key_in(self.chain)

    @property
    def port(self) -> tuple[str, int]:
        """Protocol and host port of an element of ``PORT_MAPS``."""
        _, protocol, port = self.key.split(" . ")
        return protocol, int(port)

    @property
    def place(self) -> tuple[str, bytes | None, int]:
        """Protocol, packed host address if one is given, and host port of an element of ``PORT_MAPS``."""
        protocol, port = self.port
        return protocol, self.address.packed if self.address else None, port

    @property
    def address(self) -> IPv4Address | IPv6Address | None:
        """The host address of an element of ``PORT_MAPS``, the pod address of one of ``POD_MAPS``."""
        return None if self.map == ANY_ADDRESS else ip_address(self.key.partition(" . ")[0])


@dataclass(frozen=True, slots=True)
class Installed:
    """What the table holds of all attachments: the elements, and the names of chains with their handles.

    ``waiting`` are the elements of attachments that wait for a port, in the order in which these attachments came;
    ``interfaces`` the chains of those that attachments, by their keys, need ``route_localnet`` on. ``outdated`` are the
    maps that another version of this plugin declared, without a counter, and their handles.

    The chains have to be listed before the elements. A chain that others replaced in between, by one of the same name,
    then no longer has the handle by which it would be deleted; and an element that leads to a chain not listed is newer
    than this listing, and not touched on the word of it.
    """

    elements: tuple[Element, ...]
    chains: Mapping[str, int]
    outdated: Mapping[str, int] = field(default_factory=dict)
    waiting: tuple[Element, ...] = ()
    interfaces: Mapping[str, str] = field(default_factory=dict)
    _queues: dict[tuple[str, str, str], list[Element]] = field(default_factory=dict, init=False, compare=False)

    @property
    def holders(self) -> set[str]:
        """The keys of all attachments."""
        holders = {key_in(chain) for chain in self.chains} | {element.holder for element in self.elements}
        return holders - {""}

    @property
    def given_ports(self) -> set[tuple[str, bytes, int]]:
        """The (protocol, packed host address, port) of the mappings of a given host address."""
        places = (element.place for element in self.elements if element.map in PORT_MAPS)
        return {(protocol, address, port) for protocol, address, port in places if address}

    def of(self, key: str) -> tuple[Element, ...]:
        """Return the elements that lead to one attachment's chains."""
        return tuple(element for element in self.elements if element.holder == key)

    def owner_of(self, key: str) -> Owner:
        """Return what the elements say of an attachment's owner; that of a pod's address says nothing."""
        waiting = (element for element in self.waiting if element.waiter == key)
        return next((of.owner for of in (*self.of(key), *waiting) if of.owner.container_id), Owner("", ""))

    def heirs(self, element: Element, leaving: Collection[str] = ()) -> list[Element]:
        """Return who waits for the port of an element: the first of them gets it, those that leave as well do not."""
        if not self._queues:
            for waiter in self.waiting:
                self._queues.setdefault((waiter.map, waiter.key, waiter.holder), []).append(waiter)
        queue = self._queues.get((waiting_map(element.map), element.key, element.holder), ())
        return [of for of in queue if of.waiter not in leaving and dnat_chain(of.waiter) in self.chains]

    def detach(self, *leaving: str, wanted: Collection[tuple[str, str]] = ()) -> list[str]:
        """Return the commands that remove attachments and hand their ports on, none where nothing is left of them.

        A port goes to who waits for it, unless it is ``wanted``, as (map, key), by an attachment that comes. The
        commands fail, and change nothing, if the attachments are no longer as they are here.
        """
        left, handed_on = self._left(leaving), self._handed_on(leaving, wanted)
        commands = [f"delete element {FAMILY} {TABLE} {name} {{ {', '.join(keys)} }}" for name, keys in left.items()]
        commands += [create_command(name, ", ".join(elements)) for name, elements in handed_on.items()]
        for key in leaving:
            # the handle tells this chain from one of the same name, the name from one with its handle in another table
            if masq_chain(key) in self.chains:
                commands.append(f"delete chain {FAMILY} {TABLE} {masq_chain(key)}")
            if dnat_chain(key) in self.chains:
                commands.append(f"delete chain {FAMILY} {TABLE} handle {self.chains[dnat_chain(key)]}")
                commands += target_removal_commands(key)
        return commands

    def _left(self, leaving: Collection[str]) -> dict[str, list[str]]:
        """Return the keys, by map, of the elements that go with attachments: their own, and who waits for them."""
        left: dict[str, list[str]] = {}
        for element in self.elements:
            if element.holder in leaving and element.chain in self.chains:
                left.setdefault(element.map, []).append(element.key)
        for waiter in self.waiting:
            if waiter.waiter in leaving or (waiter.holder in leaving and waiter.chain in self.chains):
                left.setdefault(waiter.map, []).append(f"{address_form(waiter.waiter)} . {waiter.key}")
        needing = [address_form(key) for key in leaving if key in self.interfaces]
        return left | ({LOCALNET_NEEDS: needing} if needing else {})

    def _handed_on(self, leaving: Collection[str], wanted: Collection[tuple[str, str]]) -> dict[str, list[str]]:
        """Return the elements, by map, that lead ports to who waited first, and let the others wait for that one."""
        handed_on: dict[str, list[str]] = {}
        for element in self.elements:
            is_left = element.holder in leaving and element.chain in self.chains
            if not is_left or (element.map, element.key) in wanted:
                continue
            heirs = self.heirs(element, leaving)
            for heir in heirs[:1]:
                port = holder_element(heir.key, heir.owner.comment(), heir.waiter)
                handed_on.setdefault(element.map, []).append(port)
            for heir in heirs[1:]:
                waiter = waiter_element(heir.waiter, heir.key, heir.owner.comment(), heirs[0].waiter)
                handed_on.setdefault(heir.map, []).append(waiter)
        return handed_on

    def wait_again(self, key: str, leaving: Collection[str], wanted: Collection[tuple[str, str]]) -> list[str]:
        """Return the commands that let those wait for an attachment that has come, whose ports it has taken over."""
        elements: dict[str, list[str]] = {}
        for element in self.elements:
            if element.holder in leaving and (element.map, element.key) in wanted:
                for heir in self.heirs(element, leaving):
                    waiter = waiter_element(heir.waiter, heir.key, heir.owner.comment(), key)
                    elements.setdefault(heir.map, []).append(waiter)
        return [create_command(name, ", ".join(waiters)) for name, waiters in elements.items()]

    @classmethod
    def read(cls, listing: Iterable[dict[str, Any]]) -> "Installed":
        """Read the objects of ``list map`` and ``list chains`` in JSON."""
        found: list[Element] = []
        chains, outdated = dict[str, int](), {}
        for item in listing:
            if "map" in item:
                declared = item["map"]
                if declared["name"] in PORT_MAPS and "stmt" not in declared:
                    outdated[declared["name"]] = declared["handle"]
                found += elements(declared)
            elif item.get("chain", {}).get("table") == TABLE:
                chains[item["chain"]["name"]] = item["chain"]["handle"]
        interfaces = {element.waiter: element.chain for element in found if element.map == LOCALNET_NEEDS}
        waiting = [element for element in found if element.map in WAITING_MAPS]
        waiting.sort(key=lambda waiter: chains.get(dnat_chain(waiter.waiter), 0))  # handles grow
        installed = tuple(element for element in found if not element.waiter)
        return cls(installed, chains, outdated, tuple(waiting), interfaces)


def elements(declaration: dict[str, Any]) -> Iterable[Element]:
    """Return the elements of a map from its object in a listing."""
    name = declaration["name"]
    for key, verdict in declaration.get("elem", ()):
        value, told = key, dict[str, Any]()
        if isinstance(key, dict) and "elem" in key:
            value, told = key["elem"]["val"], key["elem"]
        comment = told.get("comment", "")
        parts = value["concat"] if isinstance(value, dict) else [value]
        waiter = unpacked(ip_address(parts.pop(0)).packed) if name in WAITING_MAPS or name == LOCALNET_NEEDS else ""
        parts[1:2] = [PROTOCOLS.get(part, part) for part in parts[1:2]]
        if name in {PODS[6], ONE_ADDRESS[6], waiting_map(ONE_ADDRESS[6])}:
            parts = [ip_address(parts[0]), *parts[1:]]  # Python's and nft's spelling of an address can differ
        yield Element(
            name,
            " . ".join(str(part) for part in parts),
            verdict.get("goto", {}).get("target", ""),
            Owner("", "") if name in POD_MAPS else Owner.parse(comment),
            told.get("counter", {}).get("packets", 0),
            comment if name in POD_MAPS else "",
            waiter,
        )


def token_of(key: str) -> str:
    """Return what to list to see the rules that translate an attachment's connections."""
    return f"chain {FAMILY} {TABLE} {dnat_chain(key)}"


def label(listing: Iterable[dict[str, Any]]) -> str:
    """Return the pod's name from the objects of ``list chain`` of an attachment's chain, empty if it has none."""
    return next((item["rule"]["comment"] for item in listing if "comment" in item.get("rule", {})), "")
