from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from lab import BRIDGE4, CLIENT4, CLIENT6, LAUNCHER, NODE4, NODE6, Node, Pod, config, mapping

BARE = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}
BOTH = [mapping(8080), mapping(8080, 80, "udp")]
EITHER_ORDER = [("pods", "second"), ("second", "pods")]


def without(capability: str) -> list[str]:
    return ["setpriv", f"--bounding-set=-{capability}", f"--inh-caps=-{capability}", *LAUNCHER]


def test_a_holder_that_the_caller_may_not_look_at_counts_as_alive(node: Node) -> None:
    holder, asking = node.pod(), node.pod()
    with holder.inside():
        process = subprocess.Popen(["sleep", "infinity"])
    try:
        path = f"/proc/{process.pid}/ns/net"
        assert node.cni("ADD", holder, config(holder, mapping(8080)), NETNS=path).code == 0
        assert path in node.ruleset()
        before = node.ruleset()
        node.launcher = without("sys_ptrace")
        assert node.cni("ADD", asking, config(asking, mapping(8080))).code == 100
        assert node.ruleset() == before
    finally:
        process.kill()
        process.wait()
    node.add(asking, mapping(8080))
    assert not node.footprint(holder)


@pytest.mark.parametrize(
    "path", ["netns/{}", "./netns/{}", "/proc/self/cwd/netns/{}", "/proc/thread-self/cwd/netns/{}"]
)
def test_a_path_that_means_something_else_to_others_does_not_make_its_holder_look_dead(
    node: Node, path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    holder, asking = node.pod(), node.pod()
    monkeypatch.chdir("/run")
    assert Path(path.format(holder.name)).exists()
    added = node.cni("ADD", holder, config(holder, *BOTH), NETNS=path.format(holder.name))
    assert added.code == 0
    monkeypatch.chdir(tmp_path)
    before = node.ruleset()
    refused = node.cni("ADD", asking, config(asking, mapping(8080)))
    assert refused.code == 100
    assert holder.id[:12] in refused.msg
    assert node.ruleset() == before
    node.delete(holder)
    node.add(asking, mapping(8080))


@pytest.mark.parametrize("default_route", [True, False])
def test_where_no_route_of_its_own_leads_to_the_pod_loopback_addresses_are_routed_nowhere(
    node: Node, default_route: bool
) -> None:
    if default_route:
        node.ip(f"route add default via {CLIENT4}")
    pod = node.pod()
    added = node.add(pod, mapping(8080), prevResult={"cniVersion": "1.1.0", "ips": [{"address": "10.77.0.5/32"}]})
    (line,) = added.stderr.splitlines()
    assert "127.0.0.1" in line
    assert "10.77.0.5" in line
    assert ("default route" in line) == default_route
    for interface in ("all", "default", "uplink", "cni0", "lo"):
        assert node.get_sysctl(f"net/ipv4/conf/{interface}/route_localnet") == "0"
    assert node.footprint(pod)["hostports"] == 1


@pytest.mark.parametrize(
    ("pods", "nodes", "host", "client"),
    [("10.9.0.2", "10.9.0.1", NODE4, CLIENT4), ("fd00:9::2", "fd00:9::1", NODE6, CLIENT6)],
    ids=["IPv4", "IPv6"],
)
def test_of_a_point_to_point_address_the_pods_end_is_forwarded_to(
    node: Node, pods: str, nodes: str, host: str, client: str
) -> None:
    length = 128 if ":" in pods else 32
    node.ip(f"addr add {nodes}/{length} dev cni0", f"route add {pods}/{length} dev cni0")
    pod = node.pod(addresses=[f"{pods} peer {nodes}/{length}"], gateways=[nodes])
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080), prevResult={"cniVersion": "1.1.0"})
    assert node.client.ask("tcp", host, 8080) == f"web {client}"
    if ":" not in pods:
        assert node.ask("tcp", "127.0.0.1", 8080).startswith("web ")


def test_a_mapping_of_the_ipv6_loopback_address_installs_nothing_and_says_so(node: Node) -> None:
    pod = node.pod()
    (line,) = node.add(pod, mapping(8080, hostIP="::1")).stderr.splitlines()
    assert "8080/tcp on ::1" in line
    assert node.ruleset() == ""


def test_a_mapping_of_the_ipv6_loopback_address_does_not_hinder_the_others(node: Node) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    mappings = [mapping(8080, hostIP="::1"), mapping(8081), mapping(8080, hostIP="127.0.0.1")]
    (line,) = node.add(pod, *mappings).stderr.splitlines()
    assert "8080/tcp on ::1" in line
    assert "::1 ." not in node.ruleset()
    assert node.ask("tcp", "127.0.0.1", 8080) == f"web {BRIDGE4}"
    assert node.client.ask("tcp", NODE6, 8081) == f"web {CLIENT6}"
    assert node.cni("CHECK", pod, config(pod, *mappings)).code == 0


def second_network(node: Node, pod: Pod, *addresses: str) -> None:
    node.bridge("cni1", "10.89.0.1/24", "fd00:89::1/64")
    node.ip("link add second type veth peer name second-pod", "link set second master cni1 up")
    node.ip(f"link set second-pod netns {pod.name}")
    pod.ip("link set second-pod name eth1", "link set eth1 up")
    pod.ip(*(f"addr add {address} dev eth1" + (" nodad" if ":" in address else "") for address in addresses))


def attachments(pod: Pod, *addresses: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Return each network's configuration and interface."""
    second = {"interfaces": [{"name": "eth1", "sandbox": pod.path}], "ips": [{"address": a} for a in addresses]}
    first = config(pod, *BOTH)
    return {"pods": (first, "eth0"), "second": (first | {"name": "second", "prevResult": second}, "eth1")}


@pytest.mark.parametrize("leaving", EITHER_ORDER, ids=" ".join)
@pytest.mark.parametrize("coming", EITHER_ORDER, ids=" ".join)
def test_a_container_on_two_networks_has_its_host_port_once(
    node: Node, coming: tuple[str, ...], leaving: tuple[str, ...]
) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    pod.serve("udp", 80, "web")
    addresses = ["10.89.0.2/24", "fd00:89::2/64"]
    second_network(node, pod, *addresses)
    calls = attachments(pod, *addresses)
    for _ in range(2):
        for network in coming:
            call, ifname = calls[network]
            added = node.cni("ADD", pod, call, IFNAME=ifname)
            assert added.code == 0, added
            assert ("host port 8080/tcp stays" in added.stderr) == (network != coming[0])
    for network, ifname in (("pods", "eth0"), ("second", "eth1")):
        assert bool(node.footprint(pod, network, ifname)["hostports"]) == (network == coming[0])
        checked = node.cni("CHECK", pod, calls[network][0], IFNAME=ifname)
        assert checked.code == 0, checked
    for protocol in ("tcp", "udp"):
        assert node.ask(protocol, "127.0.0.1", 8080).startswith("web ")
        if coming[0] == "pods":
            assert node.client.ask(protocol, NODE4, 8080) == f"web {CLIENT4}"
    for network in leaving:
        if network == leaving[1] == coming[0]:
            assert node.ask("tcp", "127.0.0.1", 8080).startswith("web ")
        deleted = node.cni("DEL", pod, BARE | {"name": network}, IFNAME=calls[network][1])
        assert deleted.code == 0, deleted
    assert not node.holds(pod)
    assert "dnat-" not in node.ruleset()
    assert node.client.is_silent("tcp", NODE4, 8080)
    other = node.pod()
    node.add(other, *BOTH)


def test_of_a_container_on_two_networks_the_second_has_what_the_first_has_not(node: Node) -> None:
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    second_network(node, pod, "10.89.0.2/24", "fd00:89::2/64")
    pod.ip("route add default via fd00:89::1")
    for call, ifname in attachments(pod, "10.89.0.2/24", "fd00:89::2/64").values():
        assert node.cni("ADD", pod, call, IFNAME=ifname).code == 0
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert node.client.ask("tcp", NODE6, 8080) == f"web {CLIENT6}"
    for call, ifname in attachments(pod, "10.89.0.2/24", "fd00:89::2/64").values():
        assert node.cni("CHECK", pod, call, IFNAME=ifname).code == 0
    node.delete(pod)
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert node.client.ask("tcp", NODE6, 8080) == f"web {CLIENT6}"
    assert node.cni("DEL", pod, BARE | {"name": "second"}, IFNAME="eth1").code == 0
    assert "dnat-" not in node.ruleset()


def test_status_refuses_the_back_end_that_add_refuses(node: Node) -> None:
    refused = node.cni("STATUS", None, BARE | {"backend": "iptables"})
    assert refused.code == 7
    assert "iptables" in refused.msg
    assert node.ruleset() == ""


@pytest.mark.parametrize("key", ["conditionsV4", "conditionsV6"])
@pytest.mark.parametrize("condition", [["no-such-match"], ["ip", "saddr", "@nope"]], ids=" ".join)
def test_status_is_not_available_with_a_condition_that_nft_refuses(node: Node, key: str, condition: list[str]) -> None:
    refused = node.cni("STATUS", None, BARE | {key: condition})
    assert refused.code == 50
    assert condition[-1].lstrip("@") in refused.json["details"]
    assert node.ruleset() == ""
    assert node.cni("STATUS", None, BARE | {"conditionsV4": ["ip", "saddr", "192.0.2.0/24"]}).code == 0


def test_gc_without_the_right_to_change_the_network_is_refused_by_nftables(node: Node) -> None:
    pod = node.pod()
    node.add(pod, mapping(8080))
    before = node.nft("-sa list ruleset")
    node.launcher = without("net_admin")
    refused = node.cni("GC", None, BARE | {"cni.dev/valid-attachments": []})
    assert refused.code == 101
    assert "Operation not permitted" in refused.stdout
    assert "Traceback" not in refused.stderr
    assert node.nft("-sa list ruleset") == before
