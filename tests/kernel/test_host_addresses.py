from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hostport_list import targets
from lab import BRIDGE4, BRIDGE6, CLIENT4, NODE4, NODE6, PATIENCE, Node, Pod, config, mapping
from libcni_cache import CAPABLE, Cache
from restoration import restore

if TYPE_CHECKING:
    from pathlib import Path

OTHER4, OTHER6 = "198.51.100.1", "2001:db8:1::1"
EVERY = {4: [NODE4, OTHER4, BRIDGE4], 6: [NODE6, OTHER6, BRIDGE6]}
ALL = [*EVERY[4], *EVERY[6]]
MANY = [mapping(port) for port in range(8080, 8097)]
LISTS = {
    "one address": (["192.0.2.1/32"], [NODE4]),
    "one IPv6 address": (["2001:db8::1/128"], [NODE6]),
    "a network": (["192.0.2.0/24"], [NODE4]),
    "a network, by one of its addresses": (["192.0.2.7/24"], [NODE4]),
    "several": (["192.0.2.0/24", "10.88.0.1/32"], [NODE4, BRIDGE4]),
    "both families": (["198.51.100.0/24", "2001:db8:1::/64"], [OTHER4, OTHER6]),
    "all of IPv4": (["0.0.0.0/0"], EVERY[4]),
    "all of IPv6 and one address": (["::/0", "10.88.0.0/16"], [*EVERY[6], BRIDGE4]),
    "all": (["0.0.0.0/0", "::/0"], ALL),
    "overlapping": (["192.0.2.0/24", "192.0.2.1/32", "192.0.0.0/16"], [NODE4]),
    "none": ([], ALL),
    "addresses that the node does not have": (["203.0.113.0/24"], []),
}
SOME = ["192.0.2.0/24", "2001:db8:1::/64"]


@pytest.fixture
def node(node: Node) -> Node:
    node.bridge("other", f"{OTHER4}/32", f"{OTHER6}/128")
    node.client.ip(f"route add default via {NODE4}", f"route add default via {NODE6}")
    return node


@pytest.fixture
def web(node: Node) -> Pod:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    pod.serve("tcp", 81, "web-81")
    return pod


def answering(node: Node, port: int = 8080) -> list[str]:
    """Return the addresses of the node that answer outside."""
    return [address for address in ALL if not node.client.is_silent("tcp", address, port, timeout=PATIENCE)]


@pytest.mark.parametrize("mappings", [[mapping(8080)], MANY], ids=["one-port", "many-ports"])
@pytest.mark.parametrize("case", LISTS)
def test_a_host_port_answers_on_the_given_addresses_alone(
    node: Node, web: Pod, mappings: list[dict[str, Any]], case: str
) -> None:
    networks, answers = LISTS[case]
    node.add(web, *mappings, hostAddresses=networks)
    assert answering(node) == [address for address in ALL if address in answers]
    if mappings == MANY:
        assert answering(node, 8096) == [address for address in ALL if address in answers]
    checked = node.cni("CHECK", web, config(web, *mappings, hostAddresses=networks))
    assert not checked.status, checked
    node.delete(web)
    assert not node.footprint(web)


@pytest.mark.parametrize(("host_ip", "answers"), [("0.0.0.0", [NODE4]), ("::", [OTHER6])])
def test_an_unspecified_host_address_counts_as_none(node: Node, web: Pod, host_ip: str, answers: list[str]) -> None:
    node.add(web, mapping(8080, hostIP=host_ip), hostAddresses=SOME)
    assert answering(node) == answers


def test_a_given_host_address_need_not_be_in_the_list(node: Node, web: Pod) -> None:
    mappings = [mapping(8080), mapping(8080, 81, hostIP=OTHER4), mapping(8081, hostIP="127.0.0.1")]
    node.add(web, *mappings, hostAddresses=["192.0.2.0/24"])
    assert answering(node) == [NODE4, OTHER4]
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert node.client.ask("tcp", OTHER4, 8080) == f"web-81 {CLIENT4}"
    assert node.ask("tcp", "127.0.0.1", 8081).startswith("web ")
    assert node.is_silent("tcp", "127.0.0.1", 8080)


@pytest.mark.parametrize("asking", ["node", "neighbour", "pod"])
def test_the_list_is_about_the_address_and_not_about_who_asks(node: Node, web: Pod, asking: str) -> None:
    node.ip(f"link set {web.host_end} type bridge_slave hairpin on")
    node.add(web, mapping(8080), hostAddresses=["192.0.2.0/24", "127.0.0.2/32"])
    holder = {"node": node, "neighbour": node.pod(), "pod": web}[asking]
    assert holder.ask("tcp", NODE4, 8080).startswith("web ")
    assert holder.is_silent("tcp", BRIDGE4, 8080)
    if asking == "node":
        assert node.ask("tcp", "127.0.0.2", 8080).startswith("web ")
        assert node.is_silent("tcp", "127.0.0.1", 8080)


def test_what_listens_on_an_address_that_is_not_in_the_list_is_reached(node: Node, web: Pod) -> None:
    node.serve("tcp", 8080, "mine", BRIDGE4)
    node.add(web, mapping(8080), hostAddresses=["192.0.2.0/24"])
    assert node.client.ask("tcp", BRIDGE4, 8080) == f"mine {CLIENT4}"
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"


@pytest.mark.parametrize("mappings", [[mapping(8080)], MANY], ids=["one-port", "many-ports"])
def test_the_list_and_the_conditions_both_have_to_be_met(node: Node, web: Pod, mappings: list[dict[str, Any]]) -> None:
    neighbour = node.pod()
    keys = {"hostAddresses": ["192.0.2.0/24"], "conditionsV4": ["ip", "saddr", CLIENT4]}
    node.add(web, *mappings, **keys)
    assert answering(node) == [NODE4]
    assert neighbour.is_silent("tcp", NODE4, 8080)
    assert node.cni("CHECK", web, config(web, *mappings, **keys)).status == 0


def test_a_family_that_has_no_network_in_the_list_is_told_where_nothing_else_is_mapped(node: Node) -> None:
    pod = node.pod(6)
    added = node.add(pod, mapping(8080), hostAddresses=["192.0.2.0/24"])
    assert "host port 8080/tcp is not mapped: hostAddresses has no network of IPv6" in added.stderr
    assert not node.footprint(pod)


CHANGED = [([], SOME), (SOME, []), (SOME, SOME[:1]), (SOME, ["192.0.2.0/25", SOME[1]]), (["192.0.2.1/32"], SOME)]


@pytest.mark.parametrize("mappings", [[mapping(8080)], MANY], ids=["one-port", "many-ports"])
@pytest.mark.parametrize(("before", "after"), CHANGED)
def test_check_tells_of_another_list_until_it_is_added_again(
    node: Node, web: Pod, mappings: list[dict[str, Any]], before: list[str], after: list[str]
) -> None:
    node.add(web, *mappings, hostAddresses=before)
    assert node.cni("CHECK", web, config(web, *mappings, hostAddresses=before)).status == 0
    assert node.cni("CHECK", web, config(web, *mappings, hostAddresses=after)).code == 103
    node.add(web, *mappings, hostAddresses=after)
    assert node.cni("CHECK", web, config(web, *mappings, hostAddresses=after)).status == 0


@pytest.mark.parametrize("networks", [SOME, ["192.0.2.1/32"]])
@pytest.mark.parametrize("mappings", [[mapping(8080)], MANY], ids=["one-port", "many-ports"])
def test_list_shows_where_it_leads(node: Node, web: Pod, mappings: list[dict[str, Any]], networks: list[str]) -> None:
    node.add(web, *mappings, hostAddresses=networks)
    assert targets(node)["0.0.0.0:8080/tcp"] == f"{web.ip4}:80"
    assert len(targets(node)) == len(mappings) * len({":" in network for network in networks})


@pytest.mark.parametrize("mappings", [[mapping(8080)], MANY], ids=["one-port", "many-ports"])
def test_what_is_restored_answers_there_alone_too(
    node: Node, web: Pod, tmp_path: Path, mappings: list[dict[str, Any]]
) -> None:
    cache = Cache(tmp_path)
    node.add(web, *mappings, hostAddresses=SOME)
    cache.add(web, *mappings, plugin=CAPABLE | {"hostAddresses": SOME})
    before = node.footprint(web)
    node.nft("flush ruleset")
    assert answering(node) == []
    restore(node, cache)
    assert answering(node) == [NODE4, OTHER6]
    assert node.footprint(web) == before
    assert node.cni("CHECK", web, config(web, *mappings, hostAddresses=SOME)).status == 0


@pytest.mark.parametrize("value", [["192.0.2.1"], ["192.0.2.0/33"], ["all"], [7], [None], "192.0.2.0/24", {}])
def test_a_wrong_list_is_refused_and_changes_nothing(node: Node, web: Pod, value: object) -> None:
    refused = node.cni("ADD", web, config(web, mapping(8080), hostAddresses=value))
    assert (refused.status, refused.code) == (1, 7)
    assert refused.msg.startswith("hostAddresses")
    assert node.nft("list ruleset") == ""
