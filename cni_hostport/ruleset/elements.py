"""Elements of the table's maps, as nft's listings have them. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from cni_hostport.names import (
    ANY_ADDRESS,
    DYNAMIC,
    LOCALNET_NEEDS,
    ONE_ADDRESS,
    POD_MAPS,
    PODS,
    PROTOCOLS,
    WAITING_MAPS,
    key_in,
    request_and_pod,
    unpacked,
    waiting_map,
)
from cni_hostport.ruleset.comment import Owner

UNOWNED = {*POD_MAPS, DYNAMIC}  # maps whose elements do not name an owner
IPV6_MAPS = {ONE_ADDRESS[6], waiting_map(ONE_ADDRESS[6]), PODS[6]}  # those whose keys have an IPv6 address


@dataclass(frozen=True, slots=True)
class Element:
    """An element of a verdict map: the map's name, the key as nft prints it, and the chain that it leads to.

    An element of ``PORT_MAPS`` names the owner of the port, and counts the new connections to it. One of ``POD_MAPS``
    names the network, one of ``DYNAMIC`` the request that it fulfils, and the pod. One of ``WAITING_MAPS`` belongs to
    an attachment, whose key is ``waiter``: this attachment wants the port of the attachment to which the element leads.
    """

    map: str
    key: str
    chain: str
    owner: Owner
    connections: int = 0
    network: str = ""
    request: str = ""
    pod_id: str = ""
    waiter: str = ""

    @property
    def holder(self) -> str:
        """The key of the attachment to which it leads, empty if it leads elsewhere."""
        return key_in(self.chain)

    @property
    def port(self) -> tuple[str, int]:
        """Protocol and host port of an element of ``PORT_MAPS`` or ``DYNAMIC``."""
        _, protocol, port = self.key.split(" . ")
        return protocol, int(port)

    @property
    def reservation(self) -> str:
        """The key in ``DYNAMIC`` of an element of ``PORT_MAPS`` or ``DYNAMIC``, if its port is a dynamic one."""
        address, protocol, port = self.key.split(" . ")
        if self.map in ONE_ADDRESS.values():
            address = "ipv6" if ":" in address else "ipv4"
        return f"{address} . {protocol} . {port}"

    @property
    def endpoint(self) -> tuple[str, bytes | None, int]:
        """Protocol, packed host address if one is given, and host port of an element of ``PORT_MAPS``."""
        protocol, port = self.port
        return protocol, self.address.packed if self.address else None, port

    @property
    def address(self) -> IPv4Address | IPv6Address | None:
        """The host address of an element of ``PORT_MAPS``, the pod address of one of ``POD_MAPS``."""
        return None if self.map == ANY_ADDRESS else ip_address(self.key.partition(" . ")[0])


def elements(declaration: dict[str, Any]) -> Iterable[Element]:
    """Return the elements of a map from its object in a listing."""
    name = declaration["name"]
    for key, verdict in declaration.get("elem", ()):
        value, properties = key, dict[str, Any]()
        if isinstance(key, dict) and "elem" in key:
            value, properties = key["elem"]["val"], key["elem"]
        comment = properties.get("comment", "")
        parts = [*value["concat"]] if isinstance(value, dict) else [value]
        begins_with_waiter = name in WAITING_MAPS or name == LOCALNET_NEEDS
        waiter = unpacked(ip_address(parts.pop(0)).packed) if begins_with_waiter else ""
        parts[1:2] = [PROTOCOLS.get(part, part) for part in parts[1:2]]
        if name in IPV6_MAPS:
            parts = [ip_address(parts[0]), *parts[1:]]  # Python's and nft's spelling of an address can differ
        request, pod_id = request_and_pod(comment) if name == DYNAMIC else ("", "")
        yield Element(
            name,
            " . ".join(str(part) for part in parts),
            verdict.get("goto", {}).get("target", ""),
            Owner("", "") if name in UNOWNED else Owner.parse(comment),
            connections=properties.get("counter", {}).get("packets", 0),
            network=comment if name in POD_MAPS else "",
            request=request,
            pod_id=pod_id,
            waiter=waiter,
        )
