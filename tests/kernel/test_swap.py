from __future__ import annotations

import json
import shlex
import shutil
from typing import TYPE_CHECKING

import pytest
from compare.plugins import PLUGINS, Bench, Plugin
from conversation import Conversation
from kernel.test_conntrack import Talker
from lab import CLIENT4, CLIENT6, NODE4, NODE6, Pod, mapping, require
from tools import unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

*PORTMAPS, HOSTPORT = PLUGINS
BOTH_BACK_ENDS = pytest.mark.parametrize("node", PORTMAPS, indirect=True, ids=lambda plugin: plugin.name)
MAPPINGS = [mapping(8080), mapping(8888, 8888), mapping(5353, 80, "udp"), mapping(8081, hostIP=NODE4)]
TABLES = {"portmap-iptables": ("ip nat", "ip6 nat"), "portmap-nftables": ("ip cni_hostport", "ip6 cni_hostport")}


@pytest.fixture
def node(request: pytest.FixtureRequest, _kernel: None) -> Iterator[Bench]:
    """A node whose pods are set up by one of portmap's back ends."""
    require(shutil.which("iptables"), "needs the program iptables")
    require(not (need := unavailable("plugins", "portmap")), f"needs {need}")
    with Bench(request.param) as made:
        made.client.ip(f"route add default via {NODE4}", f"route add default via {NODE6}")
        yield made


@pytest.fixture
def portmap(node: Bench) -> Plugin:
    return node.plugin


@pytest.fixture
def old(node: Bench, portmap: Plugin) -> Pod:
    """A pod that portmap set up, on a node that calls hostport now."""
    pod = node.web(name="old")
    node.add(pod, *MAPPINGS)
    node.swap(HOSTPORT)
    assert portmap in PORTMAPS
    return pod


def leftovers(node: Bench, portmap: Plugin) -> str:
    return "".join(node.nft(f"-s list table {table}") for table in TABLES[portmap.name])


@BOTH_BACK_ENDS
def test_pods_of_portmap_keep_working_while_pods_of_hostport_come_and_go(
    node: Bench, portmap: Plugin, old: Pod
) -> None:
    before = leftovers(node, portmap)
    with (
        Conversation(node.client, NODE4, 8888, old) as four,
        Conversation(node.client, NODE6, 8888, old) as six,
        Talker(node.client, NODE4) as talker,
    ):
        assert talker.hears() == "old"
        for _ in range(2):
            new = node.web(name="new")
            node.add(new, mapping(9090), mapping(9091, 80, "udp"))
            assert node.client.ask("tcp", NODE4, 9090) == f"new {CLIENT4}"
            assert node.ask("tcp", "127.0.0.1", 9090).startswith("new ")
            node.delete(new)
            assert node.client.is_silent("tcp", NODE4, 9090)
            assert four.goes_on()
            assert six.goes_on()
            assert talker.hears() == "old"
            assert node.client.ask("tcp", NODE4, 8080) == f"old {CLIENT4}"
            assert node.client.ask("tcp", NODE6, 8080) == f"old {CLIENT6}"
            assert node.client.ask("tcp", NODE4, 8081) == f"old {CLIENT4}"
            assert node.ask("tcp", "127.0.0.1", 8080).startswith("old ")
    assert leftovers(node, portmap) == before


@BOTH_BACK_ENDS
def test_the_del_of_a_pod_of_portmap_succeeds_and_leaves_every_rule_of_portmaps(
    node: Bench, portmap: Plugin, old: Pod
) -> None:
    before = leftovers(node, portmap)
    assert old.ip4 in before
    assert old.ip6 in before
    for _ in range(2):
        node.delete(old)
    assert leftovers(node, portmap) == before
    # so that the old port leads to whoever has the pod's address next
    old.remove()
    heir = node.web(name="heir", addresses=old.addresses, gateways=["10.88.0.1", "fd00:88::1"])
    node.add(heir, mapping(9090))
    assert node.client.ask("tcp", NODE4, 8080) == f"heir {CLIENT4}"


@BOTH_BACK_ENDS
def test_the_del_of_a_pod_of_portmap_says_how_to_remove_its_rules(node: Bench, portmap: Plugin, old: Pod) -> None:
    asked = {"runtimeConfig": {"portMappings": MAPPINGS}}
    (line,) = node.delete(old, **asked).stderr.splitlines()
    command = line.partition("to remove them: ")[2].replace("/opt/cni/bin/portmap", shlex.join(portmap.launcher))
    node.run("sh", "-c", command)
    remaining = leftovers(node, portmap)
    assert old.id not in remaining
    assert old.ip4 not in remaining
    assert node.delete(old, **asked).stderr == ""


@BOTH_BACK_ENDS
def test_check_and_gc_of_hostport_do_not_take_a_pod_of_portmap_for_their_own(
    node: Bench, portmap: Plugin, old: Pod
) -> None:
    before = leftovers(node, portmap)
    assert node.check(old, *MAPPINGS).code == 103
    assert node.cni("GC", None, node.arguments(old, **{"cni.dev/valid-attachments": []})).code == 0
    assert leftovers(node, portmap) == before
    assert node.client.ask("tcp", NODE4, 8080) == f"old {CLIENT4}"


def reaches_everywhere(node: Bench, name: str) -> bool:
    asked = [("tcp", NODE4, 8080), ("tcp", NODE6, 8080), ("udp", NODE4, 5353), ("tcp", NODE4, 8081)]
    answers = [node.client.ask(*one, timeout=1) for one in asked] + [node.ask("tcp", "127.0.0.1", 8080, timeout=1)]
    return all(answer.startswith(f"{name} ") for answer in answers)


@BOTH_BACK_ENDS
def test_a_new_pod_gets_a_port_that_a_leftover_claims(node: Bench, portmap: Plugin, old: Pod) -> None:
    node.delete(old)
    old.remove()
    new = node.web(name="new")
    node.add(new, *MAPPINGS)
    assert old.ip4 in leftovers(node, portmap)
    assert reaches_everywhere(node, "new")


@BOTH_BACK_ENDS
@pytest.mark.usefixtures("old")
def test_a_new_pod_gets_a_port_that_a_living_pod_of_portmap_has(node: Bench) -> None:
    assert reaches_everywhere(node, "old")
    new = node.web(name="new")
    node.add(new, *MAPPINGS)
    assert reaches_everywhere(node, "new")
    node.delete(new)
    assert reaches_everywhere(node, "old")


@BOTH_BACK_ENDS
def test_a_new_pod_gets_a_port_that_a_leftover_of_a_younger_table_claims(node: Bench, portmap: Plugin) -> None:
    node.swap(HOSTPORT)
    node.add(node.pod(), mapping(7000))
    node.swap(portmap)
    old, new = node.web(name="old"), node.web(name="new")
    node.add(old, *MAPPINGS)
    node.swap(HOSTPORT)
    node.delete(old)
    old.remove()
    node.add(new, *MAPPINGS)
    assert reaches_everywhere(node, "new")


@BOTH_BACK_ENDS
def test_a_del_of_portmaps_removes_the_leftovers_of_one_pod(node: Bench, portmap: Plugin, old: Pod) -> None:
    node.swap(portmap)
    other = node.web(name="other")
    node.add(other, mapping(9090))
    node.swap(HOSTPORT)
    node.delete(old)
    old.remove()
    # what is known after the runtime forgot the pod: its container ID, which stands in the rules, and the network
    any_port = {"portMappings": [mapping(1, 1)]}
    call = {"cniVersion": "1.0.0", "name": "pods", "runtimeConfig": any_port, **portmap.keys}
    environment = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": old.id, "CNI_IFNAME": "eth0", "CNI_PATH": "/opt/cni/bin"}
    node.run(*portmap.launcher, env=environment, input=json.dumps(call))
    remaining = leftovers(node, portmap)
    for trace in (old.id, old.ip4, "8080", "8081", "5353"):
        assert trace not in remaining
    assert node.client.is_silent("tcp", NODE4, 8080)
    assert node.client.ask("tcp", NODE4, 9090) == f"other {CLIENT4}"


REMOVE_ALL = {
    "portmap-nftables": "nft delete table ip cni_hostport; nft delete table ip6 cni_hostport",
    "portmap-iptables": "for i in iptables ip6tables; do"
    " $i-save -t nat | grep -v -e CNI-HOSTPORT- -e CNI-DN- | $i-restore --table=nat; done",
}


@BOTH_BACK_ENDS
def test_all_leftovers_are_removed_by_one_line(node: Bench, portmap: Plugin, old: Pod) -> None:
    foreign = "-A PREROUTING -d 203.0.113.1/32 -p tcp -m tcp --dport 9 -j DNAT --to-destination 203.0.113.2:9"
    node.run("iptables", "-t", "nat", *foreign.split())
    node.delete(old)
    new = node.web(name="new")
    node.add(new, mapping(9090))
    node.run("sh", "-c", f"PATH=$PATH:/usr/sbin; {REMOVE_ALL[portmap.name]}")
    everything = node.nft("list ruleset")
    for trace in ("CNI-", "cni_hostport", old.ip4, old.ip6):
        assert trace not in everything
    assert foreign in node.run("iptables-save", "-t", "nat").stdout
    assert node.client.ask("tcp", NODE4, 9090) == f"new {CLIENT4}"
    assert node.client.is_silent("tcp", NODE4, 8080)
