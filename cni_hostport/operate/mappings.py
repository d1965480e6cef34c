"""The mappings of a node, read from the ruleset alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

from cni_hostport.attachment import Attachment
from cni_hostport.kernel.presence import View
from cni_hostport.names import DYNAMIC, FAMILY, MAPS, PORT_MAPS, TABLE, dnat_chain, network_in
from cni_hostport.operate import translation
from cni_hostport.operate.translation import ANY
from cni_hostport.ruleset.installed import Installed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.operate.translation import Translation
    from cni_hostport.ruleset.elements import Element

# IP versions by what nft prints in an element's key
VERSIONS = {"ipv4": 4, "ipv6": 6, "ip": 4, "ip6": 6}


class HolderState(StrEnum):
    """Whether the container that holds a port exists."""

    ALIVE = "alive"
    GONE = "gone"
    UNKNOWN = "unknown"  # the ruleset does not tell its network namespace, or that cannot be looked at from here


HOLDER_STATES = {True: HolderState.ALIVE, False: HolderState.GONE, None: HolderState.UNKNOWN}


@dataclass(frozen=True, slots=True)
class InstalledMapping:
    """One host port of one IP version that leads to a pod.

    ``host_ip`` is ``0.0.0.0`` or ``::`` for every local address. ``rule`` is the one that translates. Where it is
    missing, ``rule``, ``pod_ip`` and ``pod_port`` are ``None``. Of a dynamic port, ``request`` is what the pod asked
    for, as in ``80/tcp``, and ``pod_id`` its UID, or its container's ID; both are empty for a fixed one. ``network`` is
    a name, or the hash of one that the ruleset does not hold. ``key`` is that of the attachment which holds the port.
    """

    protocol: str
    host_ip: IPv4Address | IPv6Address
    host_port: int
    pod_ip: IPv4Address | IPv6Address | None
    pod_port: int | None
    request: str
    pod: str
    pod_id: str
    container_id: str
    ifname: str
    network: str
    netns: str
    holder: HolderState
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
        return f"{endpoint(self.host_ip, self.host_port)}/{self.protocol}"

    @property
    def target(self) -> str:
        """The pod's side, as in ``10.88.0.2:80``; ``-`` where no rule translates to one."""
        return "-" if self.pod_ip is None else endpoint(self.pod_ip, self.pod_port or 0)

    def json(self) -> dict[str, Any]:
        """Return its parts but for the rule, addresses as text."""
        parts = {name: getattr(self, name) for name in self.__slots__ if name != "rule"}
        return parts | {"host_ip": str(self.host_ip), "pod_ip": self.pod_ip and str(self.pod_ip)}

    @property
    def container(self) -> str:
        """The container, named by its pod, or by its ID where the pod is not known."""
        return f"pod {self.pod}" if self.pod else f"container {self.container_id}"


def table(nft: Nft) -> list[dict[str, Any]]:
    """Return nft's listing of the table; raises ``NFTError`` if nft cannot be asked."""
    return nft.listing(f"table {FAMILY} {TABLE}")


def installed_in(listing: Sequence[dict[str, Any]]) -> Installed:
    """Return what a listing of the table shows of all attachments."""
    return Installed.read(item for item in listing if "map" not in item or item["map"]["name"] in MAPS)


def read(nft: Nft) -> list[InstalledMapping]:
    """Return all mappings, sorted by port, protocol and host address; raises ``NFTError`` if nft cannot be asked."""
    return mappings_in(table(nft))


def mappings_in(listing: Sequence[dict[str, Any]]) -> list[InstalledMapping]:
    """Return the mappings that a listing of the table shows, sorted as ``read`` does."""
    rules = [item["rule"] for item in listing if "rule" in item]
    installed = installed_in(listing)
    translations = _translations(listing)
    pods = {rule["chain"]: rule["comment"] for rule in reversed(rules) if "comment" in rule}
    networks = {element.holder: element.network for element in installed.elements if element.network}
    view = View()
    state_of = cache(lambda owner: HOLDER_STATES[view.lives(owner)])
    mappings = []
    for element in installed.elements:
        host_ip = _host_ip(element)
        if host_ip is None:
            continue
        protocol, port = element.port
        candidates = translations.get((element.chain, host_ip.version, protocol, port), ())
        rule = translation.first(candidates, host_ip, protocol, port)
        reserved = installed.by_key.get((DYNAMIC, element.reservation))
        dynamic = reserved if reserved and reserved.holder == element.holder else None
        mappings.append(
            InstalledMapping(
                protocol, host_ip, port,
                pod_ip=rule.pod_ip if rule else None,
                pod_port=rule.pod_port if rule else None,
                request=dynamic.request if dynamic else "",
                pod=pods.get(dnat_chain(element.holder), ""),
                pod_id=dynamic.pod_id if dynamic else "",
                container_id=element.owner.container_id,
                ifname=element.owner.ifname,
                network=_network(element.holder, networks.get(element.holder, "")),
                netns=element.owner.netns,
                holder=state_of(element.owner),
                connections=element.connections,
                key=element.holder,
                rule=rule,
            )
        )  # fmt: skip
    return sorted(
        mappings, key=lambda mapping: (mapping.host_port, mapping.protocol, mapping.version, int(mapping.host_ip))
    )


def _translations(listing: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int, str, int], list[Translation]]:
    """Return what the rules of a listing translate, by chain, IP version, protocol and host port."""
    maps = (item["map"] for item in listing if "map" in item)
    targets = {f"@{item['name']}": item.get("elem", ()) for item in maps if item["name"] not in MAPS}
    found: dict[tuple[str, int, str, int], list[Translation]] = {}
    for rule in (item["rule"] for item in listing if "rule" in item):
        for translated in translation.read(rule["expr"], targets):
            port = rule["chain"], translated.pod_ip.version, translated.protocol, translated.host_port
            found.setdefault(port, []).append(translated)
    return found


def _host_ip(element: Element) -> IPv4Address | IPv6Address | None:
    """Return the host address of a port that leads to an attachment, ``None`` for an element of another kind."""
    if element.map not in PORT_MAPS or not element.holder:
        return None
    return element.address or ANY.get(VERSIONS.get(element.key.partition(" ")[0], 0))


def endpoint(address: IPv4Address | IPv6Address, port: int) -> str:
    """Write an address and a port, as in ``[::]:8080``."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"  # noqa: PLR2004 - IP version


def _network(key: str, name: str) -> str:
    """Return the name of an attachment's network, as far as it is known: the ruleset cuts one of more than 128 bytes.

    Of a name of which nothing is known, return its hash.
    """
    name_hash = network_in(key)
    if Attachment.network_key(name) == name_hash:
        return name
    return f"{name}..." if name else name_hash
