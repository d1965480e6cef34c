"""Who is seen as the client of a host port: hairpin, neighbours, masquerading, conditions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compare.cases import case
from compare.cases_packets import set_bridge_nf
from compare.expect import fall_short, reached, silent
from lab import BRIDGE4, BRIDGE6, CLIENT4, CLIENT6, NODE4, NODE6, mapping

if TYPE_CHECKING:
    from compare.plugins import Bench

BOTH = [mapping(8080), mapping(8080, 80, "udp")]
NEIGHBOURS = "pods of one node call each other by the node's address, and br_netfilter is not loaded everywhere"


@case()
def hairpin4(node: Bench) -> None:
    """A pod reaches itself through the node's IPv4 address, TCP and UDP."""
    set_bridge_nf(node, 0)
    pod = node.web()
    node.add(pod, *BOTH)
    for protocol in ("tcp", "udp"):
        reached(pod, NODE4, protocol=protocol, seen_as=BRIDGE4)


@case()
def hairpin6(node: Bench) -> None:
    """A pod reaches itself through the node's IPv6 address, TCP and UDP."""
    set_bridge_nf(node, 0)
    pod = node.web()
    node.add(pod, *BOTH)
    for protocol in ("tcp", "udp"):
        reached(pod, NODE6, protocol=protocol, seen_as=BRIDGE6)


@case()
def hairpin_with_bridge_nf(node: Bench) -> None:
    """A pod reaches itself with bridge-nf-call-iptables 1 and hairpin mode on its bridge port."""
    set_bridge_nf(node, 1)
    pod = node.web()
    node.ip(f"link set {pod.host_end} type bridge_slave hairpin on")
    node.add(pod, *BOTH)
    for address in (NODE4, NODE6):
        reached(pod, address)


@case(NEIGHBOURS)
def neighbour4(node: Bench) -> None:
    """A neighbour on the bridge reaches an IPv4 host port with bridge-nf-call-iptables 0."""
    set_bridge_nf(node, 0)
    node.add(node.web(), *BOTH)
    for protocol in ("tcp", "udp"):
        reached(node.pod(), NODE4, protocol=protocol)


@case(NEIGHBOURS)
def neighbour6(node: Bench) -> None:
    """A neighbour on the bridge reaches an IPv6 host port with bridge-nf-call-iptables 0."""
    set_bridge_nf(node, 0)
    node.add(node.web(), *BOTH)
    for protocol in ("tcp", "udp"):
        reached(node.pod(), NODE6, protocol=protocol)


@case()
def neighbour_with_bridge_nf(node: Bench) -> None:
    """A neighbour on the bridge reaches a host port with bridge-nf-call-iptables 1."""
    set_bridge_nf(node, 1)
    node.add(node.web(), *BOTH)
    for address in (NODE4, NODE6):
        reached(node.pod(), address)


@case()
def neighbour_directly(node: Bench) -> None:
    """A neighbour that calls a pod by the pod's own address is seen with its own."""
    set_bridge_nf(node, 1)
    pod, neighbour = node.web(), node.pod()
    node.add(pod, *BOTH)
    reached(neighbour, pod.ip4, 80, seen_as=neighbour.ip4)
    reached(neighbour, pod.ip6, 80, seen_as=neighbour.ip6)


@case()
def another_network(node: Bench) -> None:
    """A pod of another network reaches a host port and is seen with its own address."""
    node.bridge("cni1", "10.89.0.1/24", "fd00:89::1/64")
    addresses, gateways = ["10.89.0.2/24", "fd00:89::2/64"], ["10.89.0.1", "fd00:89::1"]
    stranger = node.pod(addresses=addresses, gateways=gateways, bridge="cni1")
    node.add(node.web(), *BOTH)
    reached(stranger, NODE4, seen_as="10.89.0.2")
    reached(stranger, NODE6, seen_as="fd00:89::2")


@case()
def snat_off(node: Bench) -> None:
    """With "snat": false nothing is masqueraded and no sysctl is set."""
    pod, neighbour = node.pod(), node.pod()
    node.add(pod, mapping(8080, 80, "udp"), snat=False)
    with pod.socket("udp", pod.ip4) as receiving:
        receiving.bind(("", 80))
        receiving.settimeout(1)
        for asking in (neighbour, node.client):
            with asking.socket("udp", NODE4) as sending:
                sending.connect((NODE4, 8080))
                sending.send(b"?")
                found, own = receiving.recvfrom(1)[1], sending.getsockname()
                if found != own:
                    fall_short(f"{own[0]} is seen as {found[0]}")
    if node.get_sysctl("net/ipv4/conf/cni0/route_localnet") != "0":
        fall_short("route_localnet is set")


@case()
def masq_all(node: Bench) -> None:
    """With "masqAll": true the pod sees an address of the node."""
    node.add(node.web(), mapping(8080), masqAll=True)
    reached(node.client, NODE4, seen_as=BRIDGE4)
    reached(node.client, NODE6, seen_as=BRIDGE6)


@case()
def masq_all_is_for_forwarded_connections(node: Bench) -> None:
    """With "masqAll": true a client that calls the pod by its own address is seen with its own."""
    node.client.ip(f"route add default via {NODE4}")
    pod = node.web()
    node.add(pod, mapping(8080), masqAll=True)
    reached(node.client, pod.ip4, 80, seen_as=CLIENT4)


@case()
def conditions(node: Bench) -> None:
    """Conditions decide who is forwarded."""
    node.client.ip("addr add 192.0.2.200/24 dev uplink")
    node.add(node.web(), mapping(8080), conditionsV4=node.condition("192.0.2.128/25"))
    reached(node.client, NODE4, source="192.0.2.200")
    silent(node.client, NODE4, source=CLIENT4)
    reached(node.client, NODE6, seen_as=CLIENT6)


@case(declined="it is a chain of iptables, which the nftables back ends do not use, and say so")
def external_mark_chain(node: Bench) -> None:
    """With "externalSetMarkChain" another program's iptables chain decides how hairpin is masqueraded."""
    set_bridge_nf(node, 0)
    for rule in ("-N MARK-IT", "-A MARK-IT -j MARK --set-mark 1", "-A POSTROUTING -m mark --mark 1 -j MASQUERADE"):
        for program in ("iptables", "ip6tables"):
            node.run(program, "-t", "nat", *rule.split())
    pod = node.web()
    node.add(pod, mapping(8080), externalSetMarkChain="MARK-IT")
    reached(pod, NODE4)


@case("a network is configured by itself: what it allows is not another's business")
def conditions_of_another_network(node: Bench) -> None:
    """The conditions of one network do not reach another, whichever came last."""
    node.client.ip("addr add 192.0.2.200/24 dev uplink")
    limit = node.condition("192.0.2.128/25")
    for number, order in enumerate((("open", "limited"), ("limited", "open"))):
        ports = {"open": 8080 + number, "limited": 9090 + number}
        for name in order:
            keys = {"conditionsV4": limit} if name == "limited" else {}
            node.add(node.web(name=name), mapping(ports[name]), name=name, **keys)
        reached(node.client, NODE4, ports["open"], by="open", source=CLIENT4)
        silent(node.client, NODE4, ports["limited"], source=CLIENT4)
        reached(node.client, NODE4, ports["limited"], by="limited", source="192.0.2.200")
