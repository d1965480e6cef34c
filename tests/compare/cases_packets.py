"""Where packets to a host port go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compare.cases import case
from compare.expect import fall_short, reached, silent, succeeded
from kernel.test_sctp import INIT, packet, raw, received
from lab import BRIDGE4, BRIDGE6, CLIENT4, CLIENT6, NODE4, NODE6, mapping

if TYPE_CHECKING:
    from compare.plugins import Bench

OTHER4, OTHER6 = "198.51.100.1", "2001:db8:1::1"
BOTH = [mapping(8080), mapping(8080, 80, "udp")]
READ_ONLY_SYSCTLS = [
    "unshare", "--mount", "sh", "-c",
    'mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"', "sh",
]  # fmt: skip


def set_bridge_nf(node: Bench, value: int) -> None:
    for setting in ("net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"):
        node.set_sysctl(setting, value)


def another_interface(node: Bench) -> None:
    node.bridge("other", f"{OTHER4}/32", f"{OTHER6}/128")
    node.client.ip(f"route add default via {NODE4}", f"route add default via {NODE6}")


@case()
def outside_tcp4(node: Bench) -> None:
    """TCP over IPv4 from outside arrives, with the client's address."""
    node.add(node.web(), *BOTH)
    reached(node.client, NODE4, seen_as=CLIENT4)


@case()
def outside_tcp6(node: Bench) -> None:
    """TCP over IPv6 from outside arrives, with the client's address."""
    node.add(node.web(), *BOTH)
    reached(node.client, NODE6, seen_as=CLIENT6)


@case()
def outside_udp4(node: Bench) -> None:
    """UDP over IPv4 from outside arrives, with the client's address."""
    node.add(node.web(), *BOTH)
    reached(node.client, NODE4, protocol="udp", seen_as=CLIENT4)


@case()
def outside_udp6(node: Bench) -> None:
    """UDP over IPv6 from outside arrives, with the client's address."""
    node.add(node.web(), *BOTH)
    reached(node.client, NODE6, protocol="udp", seen_as=CLIENT6)


@case()
def outside_sctp(node: Bench) -> None:
    """SCTP over IPv4 and IPv6 from outside arrives."""
    pod = node.pod()
    node.add(pod, mapping(8080, 80, "sctp"))
    for address in (NODE4, NODE6):
        with raw(node.client, address) as outside, raw(pod, address) as inside:
            outside.sendto(packet(4000, 8080, INIT, 0, 7), (address, 0))
            try:
                received(inside)
            except TimeoutError:
                fall_short(f"nothing arrives by {address}")


@case()
def ipv4_only_pod(node: Bench) -> None:
    """A pod with IPv4 alone is reached by IPv4 alone."""
    node.add(node.web(4), *BOTH)
    reached(node.client, NODE4)
    silent(node.client, NODE6)


@case()
def ipv6_only_pod(node: Bench) -> None:
    """A pod with IPv6 alone is reached by IPv6 alone."""
    node.add(node.web(6), *BOTH)
    reached(node.client, NODE6)
    silent(node.client, NODE4)


@case()
def every_address(node: Bench) -> None:
    """Every address of the node answers, those of other interfaces too."""
    another_interface(node)
    node.add(node.web(), *BOTH)
    for address in (OTHER4, OTHER6, BRIDGE4, BRIDGE6):
        for protocol in ("tcp", "udp"):
            reached(node.client, address, protocol=protocol)


@case()
def two_host_ports(node: Bench) -> None:
    """Two host ports lead to one container port."""
    node.add(node.web(), mapping(8080), mapping(8081))
    for port in (8080, 8081):
        reached(node.client, NODE4, port)


@case()
def targets_by_protocol(node: Bench) -> None:
    """One port number leads to one place for TCP and to another for UDP."""
    node.add(node.web(), mapping(8080, 80), mapping(8080, 81, "udp"))
    reached(node.client, NODE4)
    reached(node.client, NODE4, protocol="udp", by="web-81")


@case()
def many_mappings(node: Bench) -> None:
    """A pod with 200 mappings is reached on the first and on the last."""
    pod = node.web()
    node.add(pod, *(mapping(port) for port in range(20000, 20200)))
    for port in (20000, 20199):
        reached(node.client, NODE4, port)
    node.delete(pod)
    silent(node.client, NODE4, 20199)


@case()
def node_to_itself(node: Bench) -> None:
    """The node reaches a host port on its own addresses."""
    node.add(node.web(), *BOTH)
    for address in (NODE4, NODE6, BRIDGE4, BRIDGE6):
        for protocol in ("tcp", "udp"):
            reached(node, address, protocol=protocol)


@case()
def localhost(node: Bench) -> None:
    """The node reaches a host port on 127.0.0.1."""
    node.add(node.web(), *BOTH)
    for protocol in ("tcp", "udp"):
        reached(node, "127.0.0.1", protocol=protocol)


@case()
def all_of_localhost(node: Bench) -> None:
    """The node reaches a host port on 127.1.2.3."""
    node.add(node.web(), *BOTH)
    reached(node, "127.1.2.3")


@case("what a program binds to 127.0.0.2 is as local as what it binds to 127.0.0.1")
def from_another_localhost(node: Bench) -> None:
    """A program on the node that is bound to 127.0.0.2 reaches a host port on 127.0.0.1."""
    node.add(node.web(), *BOTH)
    reached(node, "127.0.0.1", source="127.0.0.2")


@case("a client that tries ::1 before 127.0.0.1 for localhost goes on after a refusal, and waits minutes in a silence")
def ipv6_localhost(node: Bench) -> None:
    """A connection to ::1, which the kernel cannot translate, is refused at once."""
    node.add(node.web(), *BOTH)
    try:
        node.ask("tcp", "::1", 8080, timeout=1)
    except ConnectionRefusedError:
        return
    except TimeoutError:
        fall_short("it hangs")


@case()
def strict_reverse_path(node: Bench) -> None:
    """Host ports work from everywhere with strict rp_filter."""
    for interface in ("all", "uplink", "cni0"):
        node.set_sysctl(f"net/ipv4/conf/{interface}/rp_filter", 1)
    set_bridge_nf(node, 0)
    pod = node.web()
    node.add(pod, *BOTH)
    for asking, address in ((node.client, NODE4), (node, NODE4), (node, "127.0.0.1"), (pod, NODE4)):
        reached(asking, address)


@case()
def routed_traffic(node: Bench) -> None:
    """Routed traffic to the same port number of other hosts and pods is left alone."""
    another_interface(node)
    pod, other = node.web(), node.pod()
    for namespace, name in ((pod, "pod"), (other, "other"), (node.client, "outside")):
        namespace.serve("tcp", 8080, name)
    node.add(pod, *BOTH)
    reached(other, CLIENT4, by="outside", seen_as=other.ip4)
    reached(pod, CLIENT6, by="outside", seen_as=pod.ip6)
    reached(node.client, other.ip4, by="other", seen_as=CLIENT4)
    reached(node.client, pod.ip6, by="pod", seen_as=CLIENT6)


@case("a plugin that runs within a daemon's container has a read-only /proc/sys, and here no need to write")
def read_only_sysctls_that_are_set(node: Bench) -> None:
    """A read-only /proc/sys is no obstacle where nothing needs writing."""
    node.set_sysctl("net/ipv4/conf/cni0/route_localnet", 1)
    node.confined(*READ_ONLY_SYSCTLS)
    node.add(node.web(), *BOTH)
    reached(node.client, NODE4)
    reached(node, "127.0.0.1")


@case("CNI has no half ADD: after an error nothing of the pod is to be on the node")
def read_only_sysctls_that_are_not_set(node: Bench) -> None:
    """With a read-only /proc/sys, ADD either fails and leaves nothing or offers all but 127.0.0.1."""
    node.confined(*READ_ONLY_SYSCTLS)
    if node.attempt(node.web(), *BOTH).status:
        silent(node.client, NODE4)
    else:
        reached(node.client, NODE4)


@case()
def route_localnet_is_narrow(node: Bench) -> None:
    """route_localnet is set on the interface towards the pod only."""
    node.add(node.web(), *BOTH)
    for interface, wanted in (("cni0", "1"), ("uplink", "0"), ("all", "0"), ("default", "0")):
        if node.get_sysctl(f"net/ipv4/conf/{interface}/route_localnet") != wanted:
            fall_short(f"route_localnet of {interface} is not {wanted}")


@case()
def after_a_flush(node: Bench) -> None:
    """After "nft flush ruleset" the next pod gets its ports."""
    node.add(node.web(name="old"), mapping(8080))
    node.nft("flush ruleset")
    node.add(node.web(), mapping(8081))
    reached(node.client, NODE4, 8081)


@case()
def add_repairs_itself(node: Bench) -> None:
    """After "nft flush ruleset" a repeated ADD brings a pod's ports back."""
    pod = node.web()
    node.add(pod, mapping(8080))
    node.nft("flush ruleset")
    succeeded(node.attempt(pod, mapping(8080)), "ADD")
    reached(node.client, NODE4)
