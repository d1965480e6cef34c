from __future__ import annotations

from pathlib import Path

import pytest
from lab import BRIDGE4, BRIDGE6, CLIENT4, CLIENT6, NODE4, NODE6, Node, config, mapping, require

OTHER4, OTHER6 = "198.51.100.1", "2001:db8:1::1"
NODE = {4: (NODE4, OTHER4, BRIDGE4), 6: (NODE6, OTHER6, BRIDGE6)}
CLIENT = {4: CLIENT4, 6: CLIENT6}
BRIDGE = {4: BRIDGE4, 6: BRIDGE6}
BOTH = [mapping(8080), mapping(8080, 80, "udp")]


@pytest.fixture
def node(node: Node) -> Node:
    """Give the node addresses on another interface, and its client a way to all that is behind it."""
    node.bridge("other", f"{OTHER4}/32", f"{OTHER6}/128")
    node.client.ip(f"route add default via {NODE4}", f"route add default via {NODE6}")
    return node


def set_bridge_nf(node: Node, value: int) -> None:
    for setting in ("net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"):
        require(Path("/proc/sys", setting).exists(), "needs the kernel's br_netfilter")
        node.set_sysctl(setting, value)


@pytest.mark.parametrize("families", [(4,), (6,), (4, 6)], ids=["IPv4", "IPv6", "dual-stack"])
def test_outside_reaches_every_address_of_the_node_with_its_own_address_kept(
    node: Node, families: tuple[int, ...]
) -> None:
    pod = node.pod(*families)
    for protocol in ("tcp", "udp"):
        pod.serve(protocol, 80, "web")
    node.add(pod, *BOTH, mapping(0, 81))
    for protocol in ("tcp", "udp"):
        for family in families:
            for address in NODE[family]:
                assert node.client.ask(protocol, address, 8080) == f"web {CLIENT[family]}"
        for family in {4, 6}.difference(families):
            assert node.client.is_silent(protocol, NODE[family][0], 8080)
    node.delete(pod)
    assert not node.holds(pod)
    for family in families:
        assert node.client.is_silent("tcp", NODE[family][0], 8080)


@pytest.mark.parametrize("bridge_nf", [0, 1])
@pytest.mark.parametrize("family", [4, 6])
def test_a_pod_reaches_itself_through_every_address_of_the_node(node: Node, bridge_nf: int, family: int) -> None:
    set_bridge_nf(node, bridge_nf)
    pod = node.pod()
    if bridge_nf:
        # the bridge then does not route the translated packet but bridges it, back to where it came from
        node.ip(f"link set {pod.host_end} type bridge_slave hairpin on")
    for protocol in ("tcp", "udp"):
        pod.serve(protocol, 80, "myself")
    node.add(pod, *BOTH)
    for protocol in ("tcp", "udp"):
        for address in NODE[family]:
            assert pod.ask(protocol, address, 8080) == f"myself {BRIDGE[family]}"


@pytest.mark.parametrize("bridge_nf", [0, 1])
@pytest.mark.parametrize("family", [4, 6])
def test_a_neighbour_on_the_bridge_reaches_a_host_port(node: Node, bridge_nf: int, family: int) -> None:
    set_bridge_nf(node, bridge_nf)
    pod, neighbour = node.pod(), node.pod()
    for protocol in ("tcp", "udp"):
        pod.serve(protocol, 80, "web")
    node.add(pod, *BOTH)
    for protocol in ("tcp", "udp"):
        for address in NODE[family]:
            assert neighbour.ask(protocol, address, 8080) == f"web {BRIDGE[family]}"
    # and what it sends to the pod itself, which the bridge hands to the same hooks, is not masqueraded
    own_listing, its = (neighbour.ip6, pod.ip6) if family == 6 else (neighbour.ip4, pod.ip4)
    assert neighbour.ask("tcp", its, 80) == f"web {own_listing}"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_pod_of_another_network_reaches_a_host_port_with_its_own_address_kept(node: Node, protocol: str) -> None:
    node.bridge("cni1", "10.89.0.1/24", "fd00:89::1/64")
    stranger = node.pod(
        addresses=["10.89.0.2/24", "fd00:89::2/64"], gateways=["10.89.0.1", "fd00:89::1"], bridge="cni1"
    )
    pod = node.pod()
    pod.serve(protocol, 80, "web")
    node.add(pod, *BOTH)
    for address in (*NODE[4], "10.89.0.1"):
        assert stranger.ask(protocol, address, 8080) == "web 10.89.0.2"
    for address in (*NODE[6], "fd00:89::1"):
        assert stranger.ask(protocol, address, 8080) == "web fd00:89::2"


@pytest.mark.parametrize(("one", "two"), [(NODE4, OTHER4), (NODE6, OTHER6)])
def test_two_pods_share_a_port_on_different_addresses_of_the_node(node: Node, one: str, two: str) -> None:
    pods = {}
    for name, address in (("one", one), ("two", two)):
        pods[name] = node.pod()
        pods[name].serve("tcp", 80, name)
        node.add(pods[name], mapping(8080, hostIP=address))
    assert node.client.ask("tcp", one, 8080).startswith("one ")
    assert node.client.ask("tcp", two, 8080).startswith("two ")
    assert node.client.is_silent("tcp", BRIDGE4, 8080)
    node.delete(pods["one"])
    assert node.client.is_silent("tcp", one, 8080)
    assert node.client.ask("tcp", two, 8080).startswith("two ")


@pytest.mark.parametrize("given_first", [True, False])
@pytest.mark.parametrize(
    ("given", "others", "wildcard"),
    [
        (NODE4, (OTHER4, NODE6), ""),
        (NODE6, (NODE4, OTHER6), ""),
        (NODE4, (OTHER4,), "0.0.0.0"),
        (NODE6, (OTHER6,), "::"),
    ],
)
def test_a_given_address_beats_the_wildcard_in_either_order(
    node: Node, given: str, others: tuple[str, ...], wildcard: str, given_first: bool
) -> None:
    specific, general = node.pod(), node.pod()
    specific.serve("tcp", 80, "specific")
    general.serve("tcp", 80, "general")
    wanted = [(specific, given), (general, wildcard)]
    for pod, address in wanted if given_first else reversed(wanted):
        node.add(pod, mapping(8080, hostIP=address))
    assert node.client.ask("tcp", given, 8080).startswith("specific ")
    for address in others:
        assert node.client.ask("tcp", address, 8080).startswith("general ")
    node.delete(specific)
    assert node.client.ask("tcp", given, 8080).startswith("general ")


@pytest.mark.parametrize(("wildcard", "answers", "silent"), [("0.0.0.0", 4, 6), ("::", 6, 4)])
def test_a_wildcard_address_maps_its_own_family_only(node: Node, wildcard: str, answers: int, silent: int) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080, hostIP=wildcard))
    for address in NODE[answers]:
        assert node.client.ask("tcp", address, 8080) == f"web {CLIENT[answers]}"
    for address in NODE[silent]:
        assert node.client.is_silent("tcp", address, 8080)


def test_a_port_leads_to_different_targets_by_protocol_and_address(node: Node) -> None:
    pod = node.pod()
    for protocol, port in (("tcp", 80), ("udp", 53), ("tcp", 81)):
        pod.serve(protocol, port, f"{protocol}{port}")
    node.add(
        pod, mapping(8080), mapping(8081), mapping(8080, 53, "udp"), mapping(8080, 81, hostIP=OTHER4)
    )  # fmt: skip
    assert node.client.ask("tcp", NODE4, 8080).startswith("tcp80 ")
    assert node.client.ask("tcp", NODE4, 8081).startswith("tcp80 ")
    assert node.client.ask("udp", NODE4, 8080).startswith("udp53 ")
    assert node.client.ask("tcp", OTHER4, 8080).startswith("tcp81 ")


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_routed_traffic_to_the_same_port_number_is_left_alone(node: Node, protocol: str) -> None:
    pod, other = node.pod(), node.pod()
    pod.serve(protocol, 80, "mapped")
    for namespace, name in ((pod, "pod"), (other, "other"), (node.client, "outside")):
        namespace.serve(protocol, 8080, name)
    node.add(pod, *BOTH)
    for family in (4, 6):
        own_listing, its = (pod.ip4, other.ip4) if family == 4 else (pod.ip6, other.ip6)
        client = CLIENT[family]
        assert pod.ask(protocol, client, 8080) == f"outside {own_listing}"
        assert other.ask(protocol, client, 8080) == f"outside {its}"
        assert node.client.ask(protocol, own_listing, 8080) == f"pod {client}"
        assert node.client.ask(protocol, its, 8080) == f"other {client}"
        assert node.ask(protocol, client, 8080) == f"outside {NODE[family][0]}"
        assert node.ask(protocol, own_listing, 80) == f"mapped {BRIDGE[family]}"


@pytest.mark.parametrize("count", [3, 16, 17, 1000])
def test_any_number_of_mappings_answers_from_the_first_to_the_last(node: Node, count: int) -> None:
    pod = node.pod()
    for port in (80, 81, 82):
        pod.serve("tcp", port, f"port{port}")
    ports = range(20000, 20000 + count - 1)  # of each family, with the two below
    mappings = [mapping(port, 81 if port == ports[-1] else 80) for port in ports]
    mappings += [mapping(ports[0], 82, hostIP=OTHER4), mapping(ports[-1], 82, hostIP=OTHER6)]
    node.add(pod, *mappings)
    for addresses, first, last in (((NODE4, NODE6), 80, 81), ((OTHER4,), 82, 81), ((OTHER6,), 80, 82)):
        for address in addresses:
            assert node.client.ask("tcp", address, ports[0]).startswith(f"port{first} ")
            assert node.client.ask("tcp", address, ports[-1]).startswith(f"port{last} ")
    checked = node.cni("CHECK", pod, config(pod, *mappings))
    assert not checked.status, checked
    node.delete(pod)
    assert not node.holds(pod)
    for port in (ports[0], ports[-1]):
        assert node.client.is_silent("tcp", NODE4, port)


def test_snat_off_leaves_every_source_as_it_is(node: Node) -> None:
    pod, neighbour = node.pod(), node.pod()
    node.add(pod, mapping(8080, 80, "udp"), snat=False)
    for family, asking in ((4, neighbour), (6, neighbour), (4, node.client), (6, node.client)):
        with pod.socket("udp", pod.ip4 if family == 4 else pod.ip6) as receiving:
            receiving.bind(("", 80))
            receiving.settimeout(3)
            with asking.socket("udp", NODE[family][0]) as sending:
                sending.connect((NODE[family][0], 8080))
                sending.send(b"?")
                assert receiving.recvfrom(1)[1][:2] == sending.getsockname()[:2]
    assert node.get_sysctl("net/ipv4/conf/cni0/route_localnet") == "0"


def test_masq_all_shows_the_pod_the_nodes_address(node: Node) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080), masqAll=True)
    for asking in (node.client, node.pod(), node):
        assert asking.ask("tcp", NODE4, 8080) == f"web {BRIDGE4}"
        assert asking.ask("tcp", NODE6, 8080) == f"web {BRIDGE6}"
    assert node.client.ask("tcp", pod.ip4, 80) == f"web {CLIENT4}"


def test_conditions_reach_no_other_network_and_no_other_family(node: Node) -> None:
    node.client.ip("addr add 192.0.2.200/24 dev uplink")
    limited, open_to_all = node.pod(), node.pod()
    limited.serve("tcp", 80, "limited")
    open_to_all.serve("tcp", 80, "open")
    node.add(limited, mapping(8080), name="limited", conditionsV4=["ip", "saddr", "192.0.2.128/25"])
    node.add(open_to_all, mapping(8081))
    assert node.client.ask("tcp", NODE4, 8080, source="192.0.2.200") == "limited 192.0.2.200"
    assert node.client.is_silent("tcp", NODE4, 8080, source=CLIENT4)
    assert node.client.ask("tcp", NODE6, 8080) == f"limited {CLIENT6}"
    assert node.client.ask("tcp", NODE4, 8081, source=CLIENT4) == f"open {CLIENT4}"
