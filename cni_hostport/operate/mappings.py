"""The mappings of a node, read from the ruleset alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

from cni_hostport.attachment import COMMENT_BYTES, Attachment, printable
from cni_hostport.kernel.presence import View
from cni_hostport.names import FAMILY, MAPS, PORT_MAPS, TABLE, dnat_chain
from cni_hostport.operate import translation
from cni_hostport.operate.translation import ANY
from cni_hostport.ruleset.installed import Installed

if TYPE_CHECKING:
    from collections.abc import Iterable
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.translation import Translation
    from cni_hostport.ruleset.installed import Element

VERSIONS = {"ipv4": 4, "ipv6": 6, "ip": 4, "ip6": 6}


class Holder(StrEnum):
    """What became of the container that holds a port."""

    ALIVE = "alive"
    GONE = "gone"
    UNKNOWN = "unknown"  # the ruleset does not tell its network namespace, or that cannot be looked at from here


STATES = {True: Holder.ALIVE, False: Holder.GONE, None: Holder.UNKNOWN}


@dataclass(frozen=True, slots=True)
class PortMapping:
    """One host port of one IP family that leads to a pod.

    ``host_ip`` is ``0.0.0.0`` or ``::`` for every local address; ``rule`` is the one that translates, ``None`` where it
    is missing, as ``pod_ip`` and ``pod_port`` are then; ``network`` is a name, or the hash of one that the ruleset does
    not hold.
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
    rule: Translation | None

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.host_ip.version

    @property
    def conditional(self) -> bool:
        """Whether connections have to meet conditions, the host address aside, to be translated."""
        return self.rule is not None and self.rule.conditional

    @property
    def host(self) -> str:
        """The host's side, as in ``[::]:8080/tcp``."""
        return f"{socket(self.host_ip, self.host_port)}/{self.protocol}"

    @property
    def target(self) -> str:
        """The pod's side, as in ``10.88.0.2:80``; ``-`` where no rule translates to one."""
        return "-" if self.pod_ip is None else socket(self.pod_ip, self.pod_port or 0)

    def json(self) -> dict[str, Any]:
        """Return its parts but for the rule, addresses as text."""
        parts = {name: getattr(self, name) for name in self.__slots__ if name != "rule"}
        return parts | {"host_ip": str(self.host_ip), "pod_ip": self.pod_ip and str(self.pod_ip)}

    @property
    def who(self) -> str:
        """The pod, or where its name is not known the container."""
        return f"pod {self.pod}" if self.pod else f"container {self.container_id}"


def read(nft: Nft) -> list[PortMapping]:
    """Return all mappings, sorted by port, protocol and host address; raises ``NFTError`` if nft cannot be asked."""
    listing = nft.listing(f"table {FAMILY} {TABLE}")
    rules = [item["rule"] for item in listing if "rule" in item]
    maps = {item["map"]["name"]: item["map"] for item in listing if "map" in item}
    targets = {f"@{name}": listed.get("elem", ()) for name, listed in maps.items() if name not in MAPS}
    installed = Installed.read(item for item in listing if "map" not in item or item["map"]["name"] in MAPS)
    translations: dict[tuple[str, int, str, int], list[Translation]] = {}
    for rule in rules:
        for of in translation.read(rule["expr"], targets):
            translations.setdefault((rule["chain"], of.pod_ip.version, of.protocol, of.host_port), []).append(of)
    pods = {rule["chain"]: rule["comment"] for rule in reversed(rules) if "comment" in rule}
    networks = {element.holder: element.network for element in installed.elements if element.network}
    view = View()
    state_of = cache(lambda owner: STATES[view.lives(owner)])
    mappings = []
    for element in installed.elements:
        host_ip = _host_ip(element)
        if host_ip is None:
            continue
        protocol, port = element.port
        candidates = translations.get((element.chain, host_ip.version, protocol, port), ())
        met = translation.first(candidates, host_ip, protocol, port)
        netns = element.owner.netns
        mappings.append(
            PortMapping(
                protocol, host_ip, port,
                pod_ip=met.pod_ip if met else None,
                pod_port=met.pod_port if met else None,
                pod=pods.get(dnat_chain(element.holder), ""),
                container_id=element.owner.container_id,
                ifname=element.owner.ifname,
                network=_network(element.holder, networks.get(element.holder, "")),
                netns=netns,
                holder=state_of(element.owner),
                connections=element.connections,
                key=element.holder,
                rule=met,
            )
        )  # fmt: skip
    return sorted(mappings, key=lambda of: (of.host_port, of.protocol, of.version, int(of.host_ip)))


def select(mappings: Iterable[PortMapping], port: tuple[int, str] | None, pod: str, network: str) -> list[PortMapping]:
    """Return the mappings of a port, a pod (with or without its namespace) and a network.

    ``port`` comes with a protocol, or an empty string for each of them; ``None`` or an empty string selects all.
    """
    return [
        mapping
        for mapping in mappings
        if (port is None or port in {(mapping.host_port, mapping.protocol), (mapping.host_port, "")})
        and (not pod or _is_called(mapping.pod, printable(pod)))
        and (not network or network == mapping.network or mapping.key.startswith(f"{Attachment.network_key(network)}-"))
    ]


def _is_called(pod: str, name: str) -> bool:
    names = {pod, pod.rpartition("/")[2]} - {""}
    if len(pod) == COMMENT_BYTES:  # which is where longer ones are cut
        return any(name.startswith(cut) for cut in names)
    return name in names


def _host_ip(element: Element) -> IPv4Address | IPv6Address | None:
    """Return the host address of a port that leads to an attachment, ``None`` for an element of another kind."""
    if element.map not in PORT_MAPS or not element.holder:
        return None
    return element.address or ANY.get(VERSIONS.get(element.key.partition(" ")[0], 0))


def socket(address: IPv4Address | IPv6Address, port: int) -> str:
    """Write an address and a port, as in ``[::]:8080``."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"  # noqa: PLR2004 - IP version


def _network(key: str, name: str) -> str:
    wanted = key.partition("-")[0]
    if Attachment.network_key(name) == wanted:
        return name
    return f"{name}..." if name else wanted  # a name of more than 128 bytes is cut
