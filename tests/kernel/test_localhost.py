from __future__ import annotations

import lab
import pytest
from lab import BRIDGE4, BRIDGE6, CLIENT4, NODE4, NODE6, Node, config, mapping

BOTH = [mapping(8080), mapping(8080, 80, "udp")]
READ_ONLY_SYSCTLS = [
    "unshare", "--mount", "sh", "-c",
    'mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"', "sh",
]  # fmt: skip


@pytest.mark.parametrize("rp_filter", [0, 1, 2])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_the_node_reaches_a_host_port_on_each_of_its_addresses(node: Node, protocol: str, rp_filter: int) -> None:
    for interface in ("all", "uplink", "cni0"):
        node.set_sysctl(f"net/ipv4/conf/{interface}/rp_filter", rp_filter)
    pod = node.pod()
    pod.serve(protocol, 80, "web")
    node.add(pod, *BOTH)
    for address in ("127.0.0.1", "127.1.2.3"):
        assert node.ask(protocol, address, 8080) == f"web {BRIDGE4}"
    for address in (NODE4, BRIDGE4, NODE6, BRIDGE6):
        assert node.ask(protocol, address, 8080) == f"web {address}"
    assert node.client.ask(protocol, NODE4, 8080) == f"web {CLIENT4}"
    assert pod.ask(protocol, "127.0.0.1", 80) == "web 127.0.0.1"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("host_ip", ["", "::", "::1"])
def test_the_ipv6_loopback_address_refuses_at_once(node: Node, protocol: str, host_ip: str) -> None:
    pod = node.pod()
    pod.serve(protocol, 80, "web")
    node.add(pod, *(entry | {"hostIP": host_ip} for entry in BOTH))
    with pytest.raises(ConnectionRefusedError):
        node.ask(protocol, "::1", 8080)
    node.serve(protocol, 8080, "own", "::1")
    assert node.ask(protocol, "::1", 8080) == "own ::1"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_pods_share_a_port_on_different_loopback_addresses(node: Node, protocol: str) -> None:
    for address in ("127.0.0.1", "127.0.0.2"):
        pod = node.pod()
        pod.serve(protocol, 80, f"pod-of-{address}")
        node.add(pod, mapping(8080, 80, protocol, hostIP=address))
    for address in ("127.0.0.1", "127.0.0.2"):
        assert node.ask(protocol, address, 8080) == f"pod-of-{address} {BRIDGE4}"
    for address in ("127.0.0.3", NODE4):
        with pytest.raises(ConnectionRefusedError):
            node.ask(protocol, address, 8080)
    assert node.client.is_silent(protocol, NODE4, 8080)


def test_only_the_interface_towards_the_pods_may_route_loopback_addresses(node: Node) -> None:
    before = {name: node.get_sysctl(f"net/ipv4/conf/{name}/route_localnet") for name in ("all", "default", "uplink")}
    node.add(node.pod(6), mapping(8080))
    assert node.get_sysctl("net/ipv4/conf/cni0/route_localnet") == "0"
    node.add(node.pod(4), mapping(8081))
    assert node.get_sysctl("net/ipv4/conf/cni0/route_localnet") == "1"
    assert before == {name: node.get_sysctl(f"net/ipv4/conf/{name}/route_localnet") for name in before}


@pytest.mark.parametrize(
    ("families", "already_set", "snat"),
    [((4, 6), True, True), ((4, 6), False, False), ((6,), False, True)],
    ids=["already-set", "snat-off", "IPv6-only"],
)
def test_read_only_sysctls_are_fine_where_none_needs_writing(
    node: Node, monkeypatch: pytest.MonkeyPatch, families: tuple[int, ...], already_set: bool, snat: bool
) -> None:
    monkeypatch.setattr(lab, "LAUNCHER", [*READ_ONLY_SYSCTLS, *lab.LAUNCHER])
    node.set_sysctl("net/ipv4/conf/cni0/route_localnet", int(already_set))
    pod = node.pod(*families)
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080), snat=snat)
    for address in [{4: NODE4, 6: NODE6}[family] for family in families]:
        assert node.client.ask("tcp", address, 8080).startswith("web ")


def test_read_only_sysctls_fail_the_pod_that_needs_one_and_leave_nothing_behind(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "LAUNCHER", [*READ_ONLY_SYSCTLS, *lab.LAUNCHER])
    pod = node.pod()
    refused = node.cni("ADD", pod, config(pod, *BOTH))
    assert refused.code == 102
    assert "/proc/sys/net/ipv4/conf/cni0/route_localnet" in refused.msg
    assert not node.footprint(pod)
    assert node.client.is_silent("tcp", NODE4, 8080)


def test_a_pod_whose_route_comes_later_gets_its_ports_with_a_word_on_localhost(node: Node) -> None:
    pod = node.pod(addresses=["10.99.0.2/24"], gateways=["10.99.0.1"])
    pod.serve("tcp", 80, "web")
    assert "127.0.0.1" in node.add(pod, mapping(8080)).stderr
    node.ip("addr add 10.99.0.1/24 dev cni0")
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
