"""What DEL removes, and whatever it is called with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compare.cases import case
from compare.expect import fall_short, reached, silent, succeeded
from compare.plugins import PLUGINS
from lab import NODE4, NODE6, config, mapping, wait

if TYPE_CHECKING:
    from compare.plugins import Bench, Plugin

SWITCHED = "a person who switches over does not want to delete every pod before, or rules by hand afterwards"
FORGOTTEN = "runtimes call DEL with what they still know: after a lost cache that is the name of the network"


def removes(node: Bench, keys: dict[str, Any], **variables: str) -> None:
    pod, other = node.web(), node.web(name="other")
    node.add(pod, mapping(8080), mapping(8080, 80, "udp"))
    node.add(other, mapping(9090))
    succeeded(node.cni("DEL", pod, node.arguments(pod, **keys), **variables), "DEL")
    for address in (NODE4, NODE6):
        for protocol in ("tcp", "udp"):
            silent(node.client, address, protocol=protocol)
    reached(node.client, NODE4, 9090, by="other")


@case()
def del_removes(node: Bench) -> None:
    """DEL closes a pod's ports and no others."""
    removes(node, {})


@case()
def del_without_result(node: Bench) -> None:
    """DEL without prevResult removes everything."""
    removes(node, {"prevResult": None})


@case()
def del_without_namespace(node: Bench) -> None:
    """DEL without CNI_NETNS removes everything."""
    removes(node, {}, NETNS="")


@case()
def del_with_a_plain_file(node: Bench) -> None:
    """DEL with a plain file as CNI_NETNS removes everything."""
    removes(node, {}, NETNS="/etc/hostname")


@case()
def del_with_a_changed_config(node: Bench) -> None:
    """DEL with changed snat and conditions removes everything."""
    removes(node, {"snat": False, "conditionsV4": node.condition("192.0.2.0/24")})


@case()
def del_with_other_mappings(node: Bench) -> None:
    """DEL with other mappings than ADD's removes everything."""
    removes(node, {"runtimeConfig": {"portMappings": [mapping(7777)]}})


@case(FORGOTTEN)
def del_without_mappings(node: Bench) -> None:
    """DEL without runtimeConfig removes everything."""
    removes(node, {"runtimeConfig": None})


@case("an operator edits a conflist while pods run; their DEL must work all the same")
def del_with_an_invalid_config(node: Bench) -> None:
    """DEL with a configuration that no longer validates removes everything."""
    removes(node, {"markMasqBit": 77, "conditionsV4": list(node.plugin.foreign_condition)})


@case()
def del_twice(node: Bench) -> None:
    """DEL succeeds any number of times."""
    pod = node.web()
    node.add(pod, mapping(8080))
    for _ in range(3):
        node.delete(pod)


@case()
def del_before_add(node: Bench) -> None:
    """DEL succeeds on a node that has seen no ADD."""
    pod = node.pod()
    succeeded(node.cni("DEL", pod, config(pod, mapping(8080))), "DEL")


@case("DEL is repeated by runtimes that were restarted, also while the first one runs")
def dels_at_once(node: Bench) -> None:
    """Ten DELs of one pod at once all succeed."""
    pod, other = node.web(), node.web(name="other")
    node.add(pod, mapping(8080))
    node.add(other, mapping(9090))
    started = [node.start("DEL", pod, node.arguments(pod)) for _ in range(10)]
    failures = [outcome for outcome in map(wait, started) if outcome.status]
    silent(node.client, NODE4)
    reached(node.client, NODE4, 9090, by="other")
    if failures:
        fall_short(f"{len(failures)} of 10 fail")


@case()
def foreign_tables(node: Bench) -> None:
    """Tables of other programs are left as they are."""
    node.nft_file("table inet foreign { chain c { type filter hook input priority 5; tcp dport 9 drop; }; }")
    before = node.nft("list table inet foreign")
    pod = node.web()
    node.add(pod, mapping(8080))
    node.delete(pod)
    node.expect_foreign(before)


def removes_of_another(node: Bench, plugin: Plugin) -> None:
    own, pod, other = node.plugin, node.web(), node.web(name="other")
    node.swap(plugin)
    node.add(pod, mapping(8080))
    node.add(other, mapping(9090))
    node.swap(own)
    node.delete(pod)
    silent(node.client, NODE4)
    reached(node.client, NODE4, 9090, by="other")


@case(SWITCHED)
def del_of_a_pod_of_portmaps_iptables_back_end(node: Bench) -> None:
    """DEL closes the ports of a pod that portmap's iptables back end set up, before the configuration was changed."""
    removes_of_another(node, PLUGINS[0])


@case(SWITCHED)
def del_of_a_pod_of_portmaps_nftables_back_end(node: Bench) -> None:
    """DEL closes the ports of a pod that portmap's nftables back end set up, before the configuration was changed."""
    removes_of_another(node, PLUGINS[1])
