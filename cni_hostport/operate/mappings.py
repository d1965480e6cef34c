"""The mappings of a node, read from the ruleset alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

from cni_hostport import host
from cni_hostport.attachment import Attachment
from cni_hostport.installed import PROTOCOLS, Installed
from cni_hostport.plan import EVERYWHERE
from cni_hostport.table import FAMILY, PORT_MAPS, TABLE, dnat_chain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from cni_hostport.nft import Nft

    Listing = Iterable[Mapping[str, Any]]

ANY: dict[int, IPv4Address | IPv6Address] = {
    network.version: network.network_address for network in EVERYWHERE.values()
}
VERSIONS = {"ipv4": 4, "ipv6": 6, "ip": 4, "ip6": 6}


class Holder(StrEnum):
    """What became of the container that holds a port."""

    ALIVE = "alive"
    GONE = "gone"
    UNKNOWN = "unknown"  # the ruleset does not tell its network namespace, or that cannot be looked at


@dataclass(frozen=True, slots=True)
class PortMapping:
    """One host port of one IP family that leads to a pod.

    ``host_ip`` is ``0.0.0.0`` or ``::`` for every local address; ``pod_ip`` and ``pod_port`` are ``None`` where the
    rule that translates to them is missing; ``network`` is a name, or the hash of one that the ruleset does not hold.
    """

    protocol: str
    host_ip: IPv4Address | IPv6Address
    host_port: int
    pod_ip: IPv4Address | IPv6Address | None
    pod_port: int | None
    pod: str
    container_id: str
    ifname: str
    network: str
    netns: str
    holder: Holder
    connections: int
    key: str

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.host_ip.version

    @property
    def host(self) -> str:
        """The host's side, as in ``[::]:8080/tcp``."""
        return f"{_socket(self.host_ip, self.host_port)}/{self.protocol}"

    @property
    def target(self) -> str:
        """The pod's side, as in ``10.88.0.2:80``; ``-`` where no rule translates to one."""
        return "-" if self.pod_ip is None else _socket(self.pod_ip, self.pod_port or 0)

    def json(self) -> dict[str, Any]:
        """Return its parts, addresses as text."""
        parts = {name: getattr(self, name) for name in self.__slots__}
        return parts | {"host_ip": str(self.host_ip), "pod_ip": self.pod_ip and str(self.pod_ip)}

    @property
    def who(self) -> str:
        """The pod, or where its name is not known the container."""
        return f"pod {self.pod}" if self.pod else f"container {self.container_id}"


def read(nft: Nft) -> list[PortMapping]:
    """Return all mappings, sorted by port, protocol and host address; raises ``NFTError`` if nft cannot be asked."""
    listing = nft.listing(f"table {FAMILY} {TABLE}")
    installed = Installed.read(listing)
    targets = dict(_targets(listing))
    pods = {item["rule"]["chain"]: item["rule"]["comment"] for item in listing if "comment" in item.get("rule", {})}
    networks = {element.holder: element.network for element in installed.elements if element.network}
    holder_of = cache(_holder)
    mappings = []
    for element in installed.elements:
        if element.map not in PORT_MAPS or not element.holder:
            continue
        protocol, port = element.port
        host_ip = element.address or ANY[VERSIONS[element.key.partition(" ")[0]]]
        pod_ip, pod_port = targets.get((element.chain, host_ip, protocol, port), (None, None))
        netns = element.owner.netns
        mappings.append(
            PortMapping(
                protocol, host_ip, port, pod_ip, pod_port,
                pod=pods.get(dnat_chain(element.holder), ""),
                container_id=element.owner.container_id,
                ifname=element.owner.ifname,
                network=_network(element.holder, networks.get(element.holder, "")),
                netns=netns,
                holder=holder_of(netns),
                connections=element.connections,
                key=element.holder,
            )
        )  # fmt: skip
    return sorted(mappings, key=lambda of: (of.host_port, of.protocol, of.version, int(of.host_ip)))


def select(mappings: Iterable[PortMapping], port: str, pod: str, network: str) -> list[PortMapping]:
    """Return the mappings of a port (``8080`` or ``8080/udp``), a pod (with or without its namespace) and a network.

    An empty string selects all.
    """
    number, _, protocol = port.partition("/")
    return [
        mapping
        for mapping in mappings
        if (not port or (str(mapping.host_port) == number and protocol.lower() in {"", mapping.protocol}))
        and (not pod or pod in {mapping.pod, mapping.pod.rpartition("/")[2]})
        and (not network or mapping.key.startswith(f"{Attachment.network_key(network)}-"))
    ]


def _socket(address: IPv4Address | IPv6Address, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"  # noqa: PLR2004 - IP version


def _holder(netns: str) -> Holder:
    if not netns:
        return Holder.UNKNOWN
    if host.is_namespace(netns):
        return Holder.ALIVE
    return Holder.GONE if host.is_gone(netns) else Holder.UNKNOWN


def _network(key: str, name: str) -> str:
    wanted = key.partition("-")[0]
    if Attachment.network_key(name) == wanted:
        return name
    return f"{name}..." if name else wanted  # a name of more than 128 bytes is cut


def _targets(listing: Listing) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Return what the rules of attachments translate.

    Each is (chain, host address, protocol, host port), as far as the rule compares them, and (pod address, port).
    """
    for item in listing:
        rule = item.get("rule", {})
        if rule.get("chain", "").startswith(dnat_chain("")):
            for key, target in _translations(rule["expr"]):
                yield (rule["chain"], *key), target


def _translations(expressions: Listing) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    protocol, port, host_ip = None, None, None
    for expression in expressions:
        match = expression.get("match", {})
        if match.get("op") == "==":
            left, right = match["left"], match["right"]
            payload = left.get("payload", {})
            if left.get("meta", {}).get("key") == "l4proto":
                protocol = PROTOCOLS.get(right, right)
            elif payload.get("field") == "dport":
                port = right
                protocol = protocol if payload["protocol"] == "th" else payload["protocol"]
            elif payload.get("field") == "daddr" and isinstance(right, str):
                host_ip = ip_address(right)
        dnat = expression.get("dnat")
        if dnat:
            anywhere = ANY[VERSIONS[dnat["family"]]]
            if isinstance(dnat["addr"], str):
                yield (host_ip or anywhere, protocol, port), (ip_address(dnat["addr"]), dnat["port"])
            else:
                for key, data in dnat["addr"]["map"]["data"]["set"]:
                    *address, number, to = key["concat"]
                    target_ip, target_port = data["concat"]
                    yield (
                        (ip_address(address[0]) if address else anywhere, PROTOCOLS.get(number, number), to),
                        (ip_address(target_ip), target_port),
                    )
