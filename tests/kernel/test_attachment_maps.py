from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hostport_list import listed
from lab import CLIENT4, CLIENT6, NODE4, NODE6, Node, config, key_of, mapping

if TYPE_CHECKING:
    from lab import Pod

FEW = [mapping(8080)]
MANY = [mapping(8080), *(mapping(port) for port in range(9000, 9017))]
GIVEN = [mapping(8080), *(mapping(port, hostIP=address) for port in range(9000, 9017) for address in (NODE4, NODE6))]
KINDS = pytest.mark.parametrize("mappings", [MANY, GIVEN], ids=["any address", "given addresses as well"])


def own_maps(node: Node) -> list[str]:
    """Return the names of maps besides everybody's."""
    names = [line.split()[1] for line in node.nft("list table inet hostport").splitlines() if line.startswith("\tmap ")]
    return sorted(name for name in names if "-" in name)


def maps_of(pod: Pod, *kinds: str) -> list[str]:
    return sorted(f"{kind}-{key_of(pod)}" for kind in kinds)


@pytest.fixture
def web(node: Node) -> Pod:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    return pod


@KINDS
def test_a_pod_with_many_mappings_has_maps_that_go_with_it(
    node: Node, web: Pod, mappings: list[dict[str, Any]]
) -> None:
    node.add(web, *mappings)
    kinds = ["any_ip4", "any_ip6"] + (["given_ip4", "given_ip6"] if mappings == GIVEN else [])
    assert own_maps(node) == maps_of(web, *kinds)
    for port in (8080, 9016):
        assert node.client.ask("tcp", NODE4, port) == f"web {CLIENT4}"
        assert node.client.ask("tcp", NODE6, port) == f"web {CLIENT6}"
    assert node.cni("CHECK", web, config(web, *mappings)).status == 0
    assert {(item["host_port"], item["pod_port"]) for item in listed(node)} == {
        (item["hostPort"], 80) for item in mappings
    }
    node.delete(web)
    assert not node.footprint(web)
    assert own_maps(node) == []


@KINDS
@pytest.mark.parametrize("after", [FEW, MANY, GIVEN], ids=["few", "many", "given"])
def test_the_maps_are_those_of_the_last_add(
    node: Node, web: Pod, mappings: list[dict[str, Any]], after: list[dict[str, Any]]
) -> None:
    node.add(web, *mappings)
    node.add(web, *after)
    with Node() as fresh:
        alone = fresh.pod()
        fresh.add(alone, *after)
        kinds = [name.partition("-")[0] for name in own_maps(fresh)]
    assert own_maps(node) == maps_of(web, *kinds)
    assert node.cni("CHECK", web, config(web, *after)).status == 0
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"


def test_other_container_ports_take_the_place_of_those_of_before(node: Node, web: Pod) -> None:
    node.add(web, *MANY)
    web.serve("tcp", 81, "other")
    after = [{**item, "containerPort": 81} for item in MANY]
    node.add(web, *after)
    assert node.client.ask("tcp", NODE4, 8080) == f"other {CLIENT4}"
    assert node.cni("CHECK", web, config(web, *after)).status == 0


def test_a_family_with_few_mappings_has_rules_beside_the_others_map(node: Node, web: Pod) -> None:
    mappings = [mapping(8080), *(mapping(port, hostIP="0.0.0.0") for port in range(9000, 9017))]
    node.add(web, *mappings)
    assert own_maps(node) == maps_of(web, "any_ip4")
    assert node.client.ask("tcp", NODE4, 9001) == f"web {CLIENT4}"
    assert node.client.ask("tcp", NODE6, 8080) == f"web {CLIENT6}"
    node.delete(web)
    assert own_maps(node) == []


def test_gc_and_take_overs_leave_no_maps(node: Node, web: Pod) -> None:
    dead = node.pod()
    node.add(dead, *MANY)
    dead.remove()
    node.add(web, *MANY)
    assert own_maps(node) == maps_of(web, "any_ip4", "any_ip6")
    collected = node.cni("GC", None, {"cniVersion": "1.1.0", "name": "pods", "cni.dev/valid-attachments": []})
    assert collected.status == 0
    assert own_maps(node) == []


@pytest.mark.parametrize("flushed", ["map inet hostport hostports", "chain inet hostport dnat-{key}"])
def test_maps_go_with_an_attachment_of_which_somebody_removed_a_part(node: Node, web: Pod, flushed: str) -> None:
    node.add(web, *MANY)
    node.nft(f"flush {flushed.format(key=key_of(web))}")
    node.delete(web)
    assert own_maps(node) == []


@pytest.mark.parametrize("after", [FEW, MANY], ids=["few", "many"])
def test_an_add_makes_a_map_anew_that_was_left_behind(node: Node, web: Pod, after: list[dict[str, Any]]) -> None:
    node.add(web, *FEW)
    node.delete(web)
    rest = f"any_ip4-{key_of(web)}"
    declaration = "typeof meta l4proto . th dport : ip daddr . th dport; elements = { tcp . 8080 : 10.88.0.99 . 1 }"
    node.nft_file(f"add map inet hostport {rest} {{ {declaration}; }}")
    node.add(web, *after)
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    node.delete(web)
    node.add(web, *MANY)
    node.delete(web)
    assert own_maps(node) == []


@pytest.mark.parametrize(
    "change",
    [
        "delete element inet hostport any_ip4-{key} {{ tcp . 9000 }}",
        "add element inet hostport any_ip4-{key} {{ udp . 9000 : 10.88.0.2 . 80 }}",
        """delete element inet hostport any_ip4-{key} {{ tcp . 9000 }}
        add element inet hostport any_ip4-{key} {{ tcp . 9000 : 10.88.0.2 . 81 }}""",
    ],
    ids=["lacks one", "has one more", "leads elsewhere"],
)
def test_check_tells_of_a_map_that_was_changed_and_add_puts_it_right(node: Node, web: Pod, change: str) -> None:
    node.add(web, *MANY)
    assert node.cni("CHECK", web, config(web, *MANY)).status == 0
    node.nft_file(change.format(key=key_of(web)))
    checked = node.cni("CHECK", web, config(web, *MANY))
    assert (checked.code, f"any_ip4-{key_of(web)}" in checked.msg) == (103, True)
    node.add(web, *MANY)
    assert node.cni("CHECK", web, config(web, *MANY)).status == 0


def test_the_ruleset_has_no_map_without_a_name_and_no_key_by_its_type(node: Node, web: Pod) -> None:
    node.add(web, *GIVEN, conditionsV4=["ip", "saddr", "{", "192.0.2.0/24", ",", "198.51.100.1", "}"])
    listing = node.nft("list table inet hostport")
    assert "map {" not in listing
    assert "\t\ttype " not in listing.replace("\t\ttype nat ", "").replace("\t\ttype filter ", "")
