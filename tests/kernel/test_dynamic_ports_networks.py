from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from dynamic_ports import BARE, FILES, asking, given, noted, told
from kernel.test_multiple_networks import second_network
from lab import CLIENT4, NODE4, Node, Pod, config, mapping
from libcni_cache import Cache
from restoration import restore

if TYPE_CHECKING:
    from pathlib import Path

ADDRESSES = ["10.89.0.2/24", "fd00:89::2/64"]


@pytest.fixture
def pod(node: Node) -> Pod:
    """A pod on two networks, ``pods`` and ``second``."""
    made = node.pod()
    made.serve("tcp", 80, "web")
    second_network(node, made, *ADDRESSES)
    return made


def on(pod: Pod, network: str, text: str, **keys: Any) -> tuple[dict[str, Any], str]:
    """Return the configuration of one network, and the interface."""
    call = config(pod, name=network) | asking(text, **keys)
    if network == "pods":
        return call, "eth0"
    ips = [{"address": address} for address in ADDRESSES]
    return call | {"prevResult": {"interfaces": [{"name": "eth1", "sandbox": pod.path}], "ips": ips}}, "eth1"


def run(node: Node, command: str, pod: Pod, call: tuple[dict[str, Any], str]) -> str:
    """Run an operation, see it succeed, and return what it says."""
    outcome = node.cni(command, pod, call[0], IFNAME=call[1])
    assert outcome.code == 0, outcome
    return outcome.stderr


@pytest.mark.parametrize("leaving", [("pods", "second"), ("second", "pods")], ids=" ".join)
@pytest.mark.parametrize("coming", [("pods", "second"), ("second", "pods")], ids=" ".join)
def test_a_pod_on_two_networks_is_given_its_ports_once(
    node: Node, pod: Pod, coming: tuple[str, ...], leaving: tuple[str, ...]
) -> None:
    text = "80, 9000-9001/udp, 192.0.2.1:81"
    calls = {network: on(pod, network, text) for network in coming}
    for _ in range(2):
        said = [run(node, "ADD", pod, calls[network]) for network in coming]
        assert [said.count(f" stays with another attachment of {pod.id}") for said in said] == [0, 7]
    ports = given(node)
    assert [*ports] == [pod.id]
    for network in coming:
        assert bool(node.footprint(pod, network, calls[network][1])["dynamic_ports"]) == (network == coming[0])
        run(node, "CHECK", pod, calls[network])
    assert noted(pod, "eth0") == noted(pod, "eth1")
    assert node.ask("tcp", "127.0.0.1", ports[pod.id]["80/tcp"]).startswith("web ")
    run(node, "DEL", pod, (BARE | {"name": leaving[0]}, calls[leaving[0]][1]))
    assert given(node) == ports
    assert told(pod)["80/tcp"] == {"hostPort": ports[pod.id]["80/tcp"]}
    run(node, "CHECK", pod, calls[leaving[1]])
    assert node.ask("tcp", "127.0.0.1", ports[pod.id]["80/tcp"]).startswith("web ")
    other = node.pod()
    refused = node.cni("ADD", other, config(other, mapping(ports[pod.id]["80/tcp"], hostIP="127.0.0.1")))
    assert refused.code == 100
    run(node, "DEL", pod, (BARE | {"name": leaving[1]}, calls[leaving[1]][1]))
    assert (given(node), told(pod)) == ({}, {})
    assert "dnat-" not in node.ruleset()


def test_a_pod_whose_file_is_lost_is_given_its_ports_once_too(node: Node, pod: Pod) -> None:
    listed = []
    for network in ("pods", "second", "pods", "second"):
        run(node, "ADD", pod, on(pod, network, "80, 9000-9001/udp"))
        listed.append(given(node))
        (FILES / pod.id / "dynamic-ports.json").unlink()
    assert listed == listed[:1] * 4


def test_networks_with_ranges_of_their_own_give_a_pod_what_the_other_has_not_given(node: Node, pod: Pod) -> None:
    first, second = on(pod, "pods", "80"), on(pod, "second", "80, 81", dynamicPorts="41000-41063")
    run(node, "ADD", pod, first)
    run(node, "ADD", pod, second)
    ports = given(node)[pod.id]
    assert (ports["80/tcp"] < 41000, ports["81/tcp"] >= 41000) == (True, True)
    assert node.client.ask("tcp", NODE4, ports["80/tcp"]) == f"web {CLIENT4}"
    for call in (first, second):
        run(node, "CHECK", pod, call)
    assert {*told(pod)} == {"80/tcp", "81/tcp"}
    without = on(pod, "second", "80", dynamicPorts=None)
    run(node, "ADD", pod, without)  # it gives none, and has to give none
    run(node, "DEL", pod, (BARE, "eth0"))
    assert given(node) == {pod.id: {"80/tcp": ports["80/tcp"]}}
    run(node, "CHECK", pod, without)


def test_a_network_of_one_family_each_gives_both_the_same_port(node: Node, pod: Pod) -> None:
    first, second = on(pod, "pods", "80"), on(pod, "second", "80")
    first[0]["prevResult"]["ips"] = [{"address": pod.addresses[0], "interface": 2}]
    second[0]["prevResult"]["ips"] = [{"address": ADDRESSES[1]}]
    run(node, "ADD", pod, first)
    run(node, "ADD", pod, second)
    [ports] = given(node).values()
    for call in (first, second):
        run(node, "CHECK", pod, call)
    run(node, "DEL", pod, (BARE, "eth0"))
    assert given(node) == {pod.id: ports}
    assert told(pod) == {"80/tcp": {"hostPort": ports["80/tcp"]}}


def test_a_dynamic_port_is_not_shared_with_who_asks_for_its_number(node: Node, pod: Pod) -> None:
    first, (second, ifname) = on(pod, "pods", "80"), on(pod, "second", "")
    run(node, "ADD", pod, first)
    second["runtimeConfig"] = {"portMappings": [mapping(given(node)[pod.id]["80/tcp"])]}
    before = node.ruleset()
    refused = node.cni("ADD", pod, second, IFNAME=ifname)
    assert (refused.code, f"is taken by container {pod.id[:12]}" in refused.msg) == (100, True)
    assert node.ruleset() == before


def test_a_dynamic_port_that_another_network_waits_for_is_not_kept_by_its_number(node: Node, pod: Pod) -> None:
    first, second = on(pod, "pods", "80, 81"), on(pod, "second", "80, 81")
    for call in (first, second):
        run(node, "ADD", pod, call)
    before = given(node)
    changed = config(pod, mapping(before[pod.id]["81/tcp"])) | {"name": "pods"}
    refused = node.cni("ADD", pod, changed)
    assert (refused.code, f"is taken by container {pod.id[:12]}" in refused.msg) == (100, True)
    run(node, "DEL", pod, (BARE, "eth0"))
    assert given(node) == before
    run(node, "CHECK", pod, second)


def test_both_networks_are_restored_with_the_first_ones_ports(node: Node, pod: Pod, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cni")
    for network in ("pods", "second"):
        call, ifname = on(pod, network, "80, 81/udp")
        run(node, "ADD", pod, (call, ifname))
        plugin = {"type": "hostport", "dynamicPorts": "40000-40063", "capabilities": {"dynamicPorts": True}}
        cache.add(pod, network=network, ifname=ifname, plugin=plugin, result=call["prevResult"],
                  capabilityArgs={"dynamicPorts": "80, 81/udp"})  # fmt: skip
    before = given(node)
    node.run("ip", "-n", pod.name, "link", "set", "eth1", "alias", "")
    node.lose_ruleset()
    assert restore(node, cache) == "2 restored\n"
    assert given(node) == before
    assert node.footprint(pod)["dynamic_ports"] == 4
    assert node.footprint(pod, "second", "eth1")["dynamic_ports"] == 0
    assert json.loads(json.dumps(told(pod))) == {text: {"hostPort": port} for text, port in before[pod.id].items()}
