from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from lab import BRIDGE4, NODE4, Namespace, Node, config, mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Pod

ROUTE_LOCALNET = "net/ipv4/conf/{}/route_localnet"


@pytest.fixture
def beside(node: Node) -> Iterator[Namespace]:
    with other_loopback(node) as made:
        yield made


@contextmanager
def other_loopback(node: Node) -> Iterator[Namespace]:
    """Have a neighbour on an interface on which another program lets 127.0.0.0/8 through, as WSL2's loopback0."""
    with Namespace("beside") as made:
        node.ip(f"link add loopback0 type veth peer name eth0 netns {made.name}")
        node.ip("addr add 192.168.77.1/24 dev loopback0", "link set loopback0 up")
        made.ip("addr del 127.0.0.1/8 dev lo", "addr add 192.168.77.2/24 dev eth0", "link set eth0 up")
        made.ip("route add 127.0.0.0/8 via 192.168.77.1")
        made.set_sysctl("net/ipv4/conf/eth0/route_localnet", 1)
        node.set_sysctl(ROUTE_LOCALNET.format("loopback0"), 1)
        yield made


def routed(pod: Pod, gateway: str) -> Pod:
    pod.ip("addr del 127.0.0.1/8 dev lo", f"route add 127.0.0.0/8 via {gateway}")
    pod.set_sysctl("net/ipv4/conf/all/route_localnet", 1)
    return pod


def guarded(node: Node) -> set[str]:
    listed = node.nft("list set inet hostport localnet")
    return {name for name in ("cni0", "loopback0", "uplink", "cni1") if f'"{name}"' in listed}


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_what_others_let_through_on_their_interfaces_goes_on(node: Node, beside: Namespace, protocol: str) -> None:
    node.serve(protocol, 9000, "theirs", "127.0.0.1")
    assert beside.ask(protocol, "127.0.0.1", 9000) == "theirs 192.168.77.2"
    pod = node.pod()
    node.add(pod, mapping(8080))
    assert beside.ask(protocol, "127.0.0.1", 9000) == "theirs 192.168.77.2"
    node.delete(pod)
    assert beside.ask(protocol, "127.0.0.1", 9000) == "theirs 192.168.77.2"
    assert node.get_sysctl(ROUTE_LOCALNET.format("loopback0")) == "1"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_published_on_localhost_is_not_reached_where_others_let_it_through(
    node: Node, beside: Namespace, protocol: str
) -> None:
    pod = node.pod()
    pod.serve(protocol, 80, "private")
    node.add(pod, mapping(8080, 80, protocol, hostIP="127.0.0.1"), mapping(8081, 80, protocol))
    for port in (8080, 8081):
        assert node.ask(protocol, "127.0.0.1", port).startswith("private ")
        assert beside.is_silent(protocol, "127.0.0.1", port)
        assert node.client.is_silent(protocol, "127.0.0.1", port)
    assert beside.is_silent(protocol, "192.168.77.1", 8080)
    assert beside.is_silent(protocol, NODE4, 8080)


def test_the_last_attachment_of_an_interface_takes_guard_and_opening_with_it(node: Node) -> None:
    first, second, neighbour = node.pod(), node.pod(), routed(node.pod(4), BRIDGE4)
    node.serve("tcp", 9000, "private", "127.0.0.1")
    for pod in (first, second):
        node.add(pod, mapping(8080 if pod is first else 9090))
    assert guarded(node) == {"cni0"}
    node.delete(first)
    assert guarded(node) == {"cni0"}
    assert node.get_sysctl(ROUTE_LOCALNET.format("cni0")) == "1"
    assert neighbour.is_silent("tcp", "127.0.0.1", 9000)
    node.delete(second)
    assert guarded(node) == set()
    assert "chain localnet" not in node.ruleset()
    assert node.get_sysctl(ROUTE_LOCALNET.format("cni0")) == "0"
    assert neighbour.is_silent("tcp", "127.0.0.1", 9000)


def test_what_somebody_else_opened_stays_open_and_guarded(node: Node) -> None:
    node.set_sysctl(ROUTE_LOCALNET.format("cni0"), 1)
    pod = node.pod()
    for _ in range(2):
        node.add(pod, mapping(8080))
        assert guarded(node) == {"cni0"}
    node.delete(pod)
    assert guarded(node) == {"cni0"}
    assert node.get_sysctl(ROUTE_LOCALNET.format("cni0")) == "1"
    node.set_sysctl(ROUTE_LOCALNET.format("cni0"), 0)
    node.add(pod, mapping(8080))
    node.delete(pod)
    assert node.get_sysctl(ROUTE_LOCALNET.format("cni0")) == "1"


def test_after_a_flush_it_is_not_left_open_without_its_guard(node: Node) -> None:
    pod, neighbour = node.pod(), routed(node.pod(4), BRIDGE4)
    node.serve("tcp", 9000, "private", "127.0.0.1")
    node.add(pod, mapping(8080))
    node.nft("flush ruleset")
    node.add(pod, mapping(8080))
    node.delete(pod)
    assert neighbour.is_silent("tcp", "127.0.0.1", 9000)


def test_a_neighbour_does_not_get_in_after_a_flush_either(node: Node) -> None:
    pod, neighbour = node.pod(), routed(node.pod(4), BRIDGE4)
    node.serve("tcp", 9000, "private", "127.0.0.1")
    node.add(pod, mapping(8080))
    node.nft("flush ruleset")
    for _ in range(2):
        node.add(pod, mapping(8080))
        assert neighbour.is_silent("tcp", "127.0.0.1", 9000)
        node.delete(pod)
        assert neighbour.is_silent("tcp", "127.0.0.1", 9000)


@pytest.mark.parametrize("way", ["GC", "take-over", "many mappings"])
def test_however_the_last_one_goes_the_guard_goes(node: Node, way: str) -> None:
    node.bridge("cni1", "10.89.0.1/24")
    pod = node.pod(addresses=["10.89.0.2/24"], gateways=["10.89.0.1"], bridge="cni1")
    count = 20 if way == "many mappings" else 1
    node.add(pod, *(mapping(8080 + number) for number in range(count)))
    assert guarded(node) == {"cni1"}
    if way == "GC":
        collected = node.cni("GC", None, config(pod) | {"cni.dev/valid-attachments": []})
        assert not collected.status, collected
    elif way == "take-over":
        pod.remove()
        node.add(node.pod(), mapping(8080))
    else:
        node.delete(pod)
    assert guarded(node) == ({"cni0"} if way == "take-over" else set())
    assert node.get_sysctl(ROUTE_LOCALNET.format("cni1")) == "0"


def test_without_snat_nothing_is_opened_or_guarded(node: Node) -> None:
    node.add(node.pod(), mapping(8080), snat=False)
    assert guarded(node) == set()
    assert node.get_sysctl(ROUTE_LOCALNET.format("cni0")) == "0"


def test_an_interface_that_is_gone_does_not_hinder(node: Node) -> None:
    node.bridge("cni1", "10.89.0.1/24")
    pod = node.pod(addresses=["10.89.0.2/24"], gateways=["10.89.0.1"], bridge="cni1")
    node.add(pod, mapping(8080))
    node.ip("link del cni1")
    deleted = node.delete(pod)
    assert deleted.stderr == ""
    assert "chain localnet" not in node.ruleset()
    assert "elements" not in node.nft("list set inet hostport localnet")


def test_check_misses_the_guard(node: Node) -> None:
    pod = node.pod()
    node.add(pod, mapping(8080))
    assert not node.cni("CHECK", pod, config(pod, mapping(8080))).status
    node.nft("flush set inet hostport localnet")
    refused = node.cni("CHECK", pod, config(pod, mapping(8080)))
    assert refused.code == 103
    assert "localnet" in refused.msg
    node.add(pod, mapping(8080))
    assert not node.cni("CHECK", pod, config(pod, mapping(8080))).status


def test_adds_and_dels_at_once_leave_it_open_for_who_is_left(node: Node) -> None:
    pods = [node.pod(4) for _ in range(6)]
    for _ in range(4):
        started = [node.start("ADD", pod, config(pod, mapping(8000 + n))) for n, pod in enumerate(pods)]
        assert [item.wait() for item in started] == [0] * 6
        ended = [node.start("DEL", pod, config(pod)) for pod in pods[:-1]]
        ended.append(node.start("ADD", pods[-1], config(pods[-1], mapping(8005))))
        assert [item.wait() for item in ended] == [0] * 6
        for item in started + ended:
            item.communicate()
        assert node.get_sysctl(ROUTE_LOCALNET.format("cni0")) == "1"
        assert guarded(node) == {"cni0"}
        node.delete(pods[-1])
        assert node.get_sysctl(ROUTE_LOCALNET.format("cni0")) == "0"
        assert guarded(node) == set()
