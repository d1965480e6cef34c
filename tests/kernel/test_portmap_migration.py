from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from kernel.test_conntrack import Talker
from lab import CLIENT4, NODE4, NODE6, Pod, mapping, wait
from portmap_node import (
    HOSTPORT,
    NFTABLES,
    answers,
    everything,
    flavour,
    mappings,
    on_every_back_end,
    place,
    portmaps,
    traces,
    web,
    without,
)
from tcp_connection import Conversation

if TYPE_CHECKING:
    from compare.plugins import Bench, Plugin

node = on_every_back_end()
WITHOUT_IPTABLES = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /usr/sbin && exec "$@"', "sh")


@pytest.fixture
def portmap(node: Bench) -> Plugin:
    return node.plugin


@pytest.fixture
def other(node: Bench, portmap: Plugin) -> Pod:
    """A pod that portmap set up, and that lives on."""
    assert portmap is not HOSTPORT
    return web(node, 3, 9000)


@pytest.fixture
def old(node: Bench, other: Pod) -> Pod:
    """A pod that portmap set up, on a node that calls hostport now."""
    assert other
    pod = web(node, 2, 8000)
    node.swap(HOSTPORT)
    return pod


def rest(node: Bench, portmap: Plugin, old: Pod) -> list[str]:
    """Return what is expected of others' rules when those of the old pod are gone."""
    current = node.plugin
    node.plugin = portmap
    lines = without(portmaps(node), traces(node, [old], r"800\d"))
    node.plugin = current
    return lines


def test_pods_of_portmap_keep_working_while_pods_of_hostport_come_and_go(node: Bench) -> None:
    old = node.web(name="8000", **place(2))
    node.add(old, mapping(8888, 8888), mapping(8000, 81, "udp"))
    node.swap(HOSTPORT)
    before = portmaps(node)
    with (
        Conversation(node.client, NODE4, 8888, old) as four,
        Conversation(node.client, NODE6, 8888, old) as six,
        Talker(node.client, NODE4, 8000) as talker,
    ):
        assert talker.hears() == "8000-81"
        for _ in range(2):
            new = node.web(name="new")
            node.add(new, mapping(7090), mapping(7091, 80, "udp"))
            assert node.client.ask("tcp", NODE4, 7090) == f"new {CLIENT4}"
            node.delete(new)
            assert node.client.is_silent("tcp", NODE4, 7090)
            assert four.goes_on()
            assert six.goes_on()
            assert talker.hears() == "8000-81"
            with Conversation(node.client, NODE4, 8888, old) as another:
                assert another.goes_on()
    assert portmaps(node) == before


def test_the_del_of_a_pod_of_portmap_removes_its_rules_and_no_others(node: Bench, portmap: Plugin, old: Pod) -> None:
    foreign = "-A PREROUTING -p tcp -m tcp --dport 9 -j DNAT --to-destination 9.9.9.9"
    node.run("iptables-nft", "-t", "nat", *foreign.split())
    expected = rest(node, portmap, old)
    assert portmaps(node) != expected
    for _ in range(2):
        assert node.delete(old).stderr == ""
        assert portmaps(node) == expected
    assert foreign in expected
    assert answers(node, 9000)
    for address in (NODE4, NODE6):
        assert node.client.is_silent("tcp", address, 8000)


@pytest.mark.parametrize("namespace", ["there", "gone", "not told"])
def test_it_does_so_without_a_word_of_mappings_and_whatever_became_of_the_namespace(
    node: Bench, portmap: Plugin, old: Pod, namespace: str
) -> None:
    expected = rest(node, portmap, old)
    if namespace == "gone":
        old.remove()
    variables = {"NETNS": ""} if namespace == "not told" else {}
    bare = {"cniVersion": "1.1.0", "name": "pods"}
    assert node.cni("DEL", old, bare, **variables).status == 0
    assert portmaps(node) == expected


def test_a_del_at_a_time_of_many_pods_removes_all_of_their_rules_and_no_others(
    node: Bench, portmap: Plugin, other: Pod
) -> None:
    assert other
    expected = portmaps(node)
    pods = [web(node, 10 + number, 8000 + 10 * number) for number in range(6)]
    node.swap(HOSTPORT)
    started = [node.start("DEL", pod, {"cniVersion": "1.1.0", "name": "pods"}) for pod in pods for _ in range(2)]
    assert [wait(item).status for item in started] == [0] * 12
    assert portmaps(node) == expected
    assert answers(node, 9000)
    node.swap(portmap)
    late = web(node, 20, 8500)
    assert answers(node, 8500)
    node.delete(late)
    assert portmaps(node) == expected


def test_what_portmap_has_of_a_container_goes_with_what_hostport_has(node: Bench, portmap: Plugin, old: Pod) -> None:
    node.add(old, mapping(8000), mapping(7000))
    node.swap(portmap)
    expected = portmaps(node)
    node.add(old, mapping(8080))
    node.swap(HOSTPORT)
    node.delete(old)
    assert not node.holds(old)
    assert portmaps(node) == expected


def test_an_add_of_a_container_that_portmap_set_up_replaces_its_rules(node: Bench, portmap: Plugin, old: Pod) -> None:
    expected = rest(node, portmap, old)
    assert node.add(old, *mappings(8000)[:2]).stderr == ""
    assert portmaps(node) == expected
    assert node.client.ask("tcp", NODE4, 8000) == f"8000 {CLIENT4}"
    assert node.client.is_silent("tcp", NODE4, 8001)


def test_the_del_of_one_network_leaves_the_iptables_rules_of_another(node: Bench, portmap: Plugin, old: Pod) -> None:
    before = portmaps(node)
    node.delete(old, name="another")
    assert (portmaps(node) == before) == (portmap is not NFTABLES)


def test_iptables_can_save_and_restore_what_a_del_leaves(node: Bench, portmap: Plugin, old: Pod) -> None:
    node.delete(old)
    node.plugin = portmap
    for program in ("iptables", "ip6tables"):
        saved = node.run(f"{program}-{flavour(node)}-save", "-t", "nat").stdout
        node.run(f"{program}-{flavour(node)}-restore", input=saved)
        assert node.run(f"{program}-{flavour(node)}", "-t", "nat", "-S").returncode == 0
    assert answers(node, 9000)


def test_a_jump_of_somebody_elses_into_a_chain_of_portmaps_fails_the_del_and_nothing_is_changed(
    node: Bench, portmap: Plugin, old: Pod
) -> None:
    if portmap is NFTABLES:
        return
    node.plugin = portmap
    chain = next(line.split()[-1] for line in portmaps(node) if old.id in line and line.startswith("-A "))
    node.run(f"iptables-{flavour(node)}", "-t", "nat", "-A", "OUTPUT", "-p", "sctp", "-j", chain)
    node.plugin = HOSTPORT
    outcome = node.cni("DEL", old, node.arguments(old))
    assert outcome.code == (102 if "legacy" in portmap.name else 11)
    assert any(old.id in line for line in portmaps(node))


def test_legacy_iptables_that_is_not_installed_is_told(node: Bench, portmap: Plugin, old: Pod) -> None:
    before = portmaps(node)
    node.confined(*WITHOUT_IPTABLES)
    output = node.delete(old).stderr
    if "legacy" in portmap.name:
        assert re.fullmatch(
            f"hostport: portmap's rules of {old.id} may still be there: .* iptables-legacy-save is not .*\n", output
        )
        assert portmaps(node) == before
    else:
        assert output == ""
        assert not any(old.id in line for line in portmaps(node))


def test_check_and_gc_of_hostport_do_not_take_a_pod_of_portmap_for_their_own(node: Bench, old: Pod) -> None:
    before = everything(node)
    assert node.check(old, *mappings(8000)).code == 103
    assert node.cni("GC", None, node.arguments(old, **{"cni.dev/valid-attachments": []})).code == 0
    assert everything(node) == before
    assert answers(node, 8000)


def test_a_node_ends_as_if_portmap_had_never_set_up_a_pod(node: Bench, old: Pod, other: Pod) -> None:
    for pod in (old, other):
        node.delete(pod)
        pod.remove()
    new = node.web(name="new", **place(2))
    node.add(new, *mappings(8000))
    assert answers(node, 8000, "new")
    node.delete(new)
    left = "\n".join(portmaps(node))
    for trace in ("CNI-DN-", "dnat to", "container", old.ip4, other.ip6):
        assert trace not in left
