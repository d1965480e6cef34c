"""What the table holds: from nft's listings to elements, holders of ports, and the commands that remove them. Pure."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cni_hostport.names import (
    DYNAMIC,
    FAMILY,
    LOCALNET_NEEDS,
    MAPS,
    PORT_MAPS,
    TABLE,
    WAITING_MAPS,
    address_form,
    dnat_chain,
    dynamic_comment,
    key_in,
    masq_chain,
    waiting_map,
)
from cni_hostport.ruleset.commands import (
    create_command,
    holder_element,
    target_removal_commands,
    waiter_element,
)
from cni_hostport.ruleset.comment import Owner
from cni_hostport.ruleset.elements import Element, elements

MAP_LISTINGS = [f"map {FAMILY} {TABLE} {name}" for name in MAPS]
LISTINGS = (f"chains {FAMILY}", *MAP_LISTINGS)  # what ``Installed.read`` has to be given, in this order


@dataclass(frozen=True)
class Installed:
    """What the table holds of all attachments: the elements, and the handles of the chains by their names.

    ``waiters`` are the elements of attachments that wait for a port; the attachment that came first has the first ones.
    ``localnet_chains`` has, by the keys of attachments, the chain of the interface on which each needs
    ``route_localnet``. ``outdated_maps`` has the handles of the maps that another version of this plugin declared,
    without a counter.

    nft has to list the chains before the elements. Others may change the ruleset in between. If they replace a chain
    by one of the same name, that one does not have the handle that was listed, and is not deleted by mistake. An
    element that leads to a chain that was not listed is newer than the listing, and is left alone.
    """

    elements: tuple[Element, ...]
    chains: Mapping[str, int]
    outdated_maps: Mapping[str, int] = field(default_factory=dict)
    waiters: tuple[Element, ...] = ()
    localnet_chains: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def by_key(self) -> Mapping[tuple[str, str], Element]:
        """The elements by their map and their key."""
        return {(element.map, element.key): element for element in self.elements}

    @cached_property
    def by_holder(self) -> Mapping[str, Sequence[Element]]:
        """The keys of all attachments, with the elements that lead to their chains."""
        found: dict[str, list[Element]] = {key: [] for chain in self.chains if (key := key_in(chain))}
        for element in self.elements:
            if element.holder:
                found.setdefault(element.holder, []).append(element)
        return found

    @cached_property
    def _queues(self) -> Mapping[tuple[str, str, str], Sequence[Element]]:
        """The elements that wait for a port, by its map, its key and its holder."""
        found: dict[tuple[str, str, str], list[Element]] = {}
        for waiter in self.waiters:
            found.setdefault((waiter.map, waiter.key, waiter.holder), []).append(waiter)
        return found

    @cached_property
    def by_reservation(self) -> Mapping[str, Sequence[Element]]:
        """The elements of ``PORT_MAPS`` by the key that their port would have in ``DYNAMIC``: for whichever address."""
        found: dict[str, list[Element]] = {}
        for element in self.elements:
            if element.map in PORT_MAPS:
                found.setdefault(element.reservation, []).append(element)
        return found

    @property
    def holders(self) -> AbstractSet[str]:
        """The keys of all attachments."""
        return self.by_holder.keys()

    @property
    def given_ports(self) -> set[tuple[str, bytes, int]]:
        """The (protocol, packed host address, port) of the mappings of a given host address."""
        endpoints = (element.endpoint for element in self.elements if element.map in PORT_MAPS)
        return {(protocol, address, port) for protocol, address, port in endpoints if address}

    def elements_to(self, key: str) -> tuple[Element, ...]:
        """Return the elements that lead to an attachment's chains."""
        return tuple(self.by_holder.get(key, ()))

    def _elements_to_all(self, keys: Iterable[str]) -> Iterator[Element]:
        return (element for key in keys for element in self.by_holder.get(key, ()))

    def owner(self, key: str) -> Owner:
        """Return the owner that an attachment's elements name; that of a pod's address names none."""
        waiters = (element for element in self.waiters if element.waiter == key)
        owners = (element.owner for element in (*self.elements_to(key), *waiters))
        return next((owner for owner in owners if owner.container_id), Owner("", ""))

    def heirs(self, element: Element, leaving: Collection[str] = ()) -> list[Element]:
        """Return the elements of those that wait for the port of an element: the first of them gets the port.

        Attachments that are ``leaving`` as well are not among them.
        """
        port = self._port_of(element)
        queue = self._queues.get((waiting_map(port.map), port.key, port.holder), ())
        return [heir for heir in queue if heir.waiter not in leaving and dnat_chain(heir.waiter) in self.chains]

    def _port_of(self, element: Element) -> Element:
        """Return the port's element for one of ``DYNAMIC``, where its holder has it; each other element itself."""
        if element.map != DYNAMIC:
            return element
        ports = self.by_reservation.get(element.key, ())
        return next((port for port in ports if port.holder == element.holder), element)

    def detach_commands(self, *leaving: str, wanted: Collection[tuple[str, str]] = ()) -> list[str]:
        """Return the commands that remove attachments and hand their ports on, none if they have nothing.

        A port goes to the attachment that waits for it first, unless a new attachment has the port among those that it
        ``wanted``, as (map, key). The commands fail, and change nothing, if the attachments are no longer as they are
        here.
        """
        removed, handed_on = self._removed_keys(leaving), self._handed_on_elements(leaving, wanted)
        commands = [f"delete element {FAMILY} {TABLE} {name} {{ {', '.join(keys)} }}" for name, keys in removed.items()]
        commands += [create_command(name, ", ".join(elements)) for name, elements in handed_on.items()]
        for key in leaving:
            # the handle tells this chain from one of the same name, the name from one with its handle in another table
            if masq_chain(key) in self.chains:
                commands.append(f"delete chain {FAMILY} {TABLE} {masq_chain(key)}")
            if dnat_chain(key) in self.chains:
                commands.append(f"delete chain {FAMILY} {TABLE} handle {self.chains[dnat_chain(key)]}")
                commands += target_removal_commands(key)
        return commands

    def _removed_keys(self, leaving: Collection[str]) -> dict[str, list[str]]:
        """Return, by map, the keys of the elements that go with attachments: theirs, and those that wait there."""
        removed: dict[str, list[str]] = {}
        for element in self._elements_to_all(leaving):
            if element.chain in self.chains:
                removed.setdefault(element.map, []).append(element.key)
        for waiter in self.waiters:
            if waiter.waiter in leaving or (waiter.holder in leaving and waiter.chain in self.chains):
                removed.setdefault(waiter.map, []).append(f"{address_form(waiter.waiter)} . {waiter.key}")
        needs = [address_form(key) for key in leaving if key in self.localnet_chains]
        return removed | ({LOCALNET_NEEDS: needs} if needs else {})

    def _handed_on_elements(
        self, leaving: Collection[str], wanted: Collection[tuple[str, str]]
    ) -> dict[str, list[str]]:
        """Return, by map, the elements that lead each port to its first heir, and let the other heirs wait for that."""
        handed_on: dict[str, list[str]] = {}
        for element in self._elements_to_all(leaving):
            is_dynamic = element.map == DYNAMIC
            ports = element, self._port_of(element)
            if element.chain not in self.chains or any((port.map, port.key) in wanted for port in ports):
                continue
            heirs = self.heirs(element, leaving)
            for heir in heirs[:1]:
                comment = dynamic_comment(element.request, element.pod_id) if is_dynamic else heir.owner.comment()
                handed_on.setdefault(element.map, []).append(holder_element(element.key, comment, heir.waiter))
            for heir in () if is_dynamic else heirs[1:]:
                waiter = waiter_element(heir.waiter, heir.key, heir.owner.comment(), heirs[0].waiter)
                handed_on.setdefault(heir.map, []).append(waiter)
        return handed_on

    def waiter_commands(self, key: str, leaving: Collection[str], wanted: Collection[tuple[str, str]]) -> list[str]:
        """Return the commands that let heirs wait for a new attachment, which has ``wanted`` and got their ports."""
        waiters: dict[str, list[str]] = {}
        for element in self._elements_to_all(leaving):
            if element.map != DYNAMIC and (element.map, element.key) in wanted:
                for heir in self.heirs(element, leaving):
                    waiter = waiter_element(heir.waiter, heir.key, heir.owner.comment(), key)
                    waiters.setdefault(heir.map, []).append(waiter)
        return [create_command(name, ", ".join(elements)) for name, elements in waiters.items()]

    @classmethod
    def read(cls, listing: Iterable[dict[str, Any]]) -> "Installed":
        """Read the objects of the listings of ``LISTINGS`` in libnftables' JSON."""
        found: list[Element] = []
        chains, outdated_maps = dict[str, int](), {}
        for item in listing:
            if "map" in item:
                declared = item["map"]
                if declared["name"] in PORT_MAPS and "stmt" not in declared:
                    outdated_maps[declared["name"]] = declared["handle"]
                found += elements(declared)
            elif item.get("chain", {}).get("table") == TABLE:
                chains[item["chain"]["name"]] = item["chain"]["handle"]
        localnet_chains = {element.waiter: element.chain for element in found if element.map == LOCALNET_NEEDS}
        waiters = [element for element in found if element.map in WAITING_MAPS]
        waiters.sort(key=lambda waiter: chains.get(dnat_chain(waiter.waiter), 0))  # handles grow
        installed = tuple(element for element in found if not element.waiter)
        return cls(installed, chains, outdated_maps, tuple(waiters), localnet_chains)


def token_listing(key: str) -> str:
    """Return what nft has to list to show the rules that translate an attachment's connections."""
    return f"chain {FAMILY} {TABLE} {dnat_chain(key)}"


def pod_label(listing: Iterable[dict[str, Any]]) -> str:
    """Return the pod's name from the objects of ``token_listing``, empty if its rules have none."""
    return next((item["rule"]["comment"] for item in listing if "comment" in item.get("rule", {})), "")
