from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from lab import NODE4, Node, config, mapping

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("port", [9090, 8080])
def test_an_address_of_a_living_pod_is_not_to_be_had_on_another_network(node: Node, port: int) -> None:
    victim = node.pod()
    victim.serve("tcp", 80, "victim")
    given = config(victim, mapping(8080))
    assert not node.cni("ADD", victim, given, ARGS="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web").status
    before = node.ruleset()
    thief = node.pod(4)
    stolen = config(thief, mapping(port), name="annotated", prevResult={"ips": [{"address": victim.addresses[0]}]})
    refused = node.cni("ADD", thief, stolen)
    assert refused.code == 100
    assert refused.msg == (
        f"pod address {victim.ip4} is that of pod shop/web, container {victim.id[:12]} (eth0) on network pods;"
        f" container {thief.id} (eth0) on network annotated cannot have it"
    )
    assert node.ruleset() == before
    assert not node.cni("DEL", thief, stolen).status
    assert node.client.ask("tcp", NODE4, 8080).startswith("victim ")
    assert not node.cni("CHECK", victim, given).status


def test_an_address_is_not_to_be_had_on_another_network_where_it_cannot_be_told_who_lives(
    node: Node, tmp_path: Path
) -> None:
    unseen, other = node.pod(), node.pod(4)
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    (folder / "netns").symlink_to(unseen.path)
    assert not node.cni("ADD", unseen, config(unseen, mapping(8080)), NETNS=str(folder / "netns")).status
    unseen.remove()
    wanted = config(other, mapping(9090), name="b", prevResult={"ips": [{"address": unseen.addresses[0]}]})
    assert node.cni("ADD", other, wanted).code == 100
    assert node.footprint(unseen)
    node.delete(unseen)
    assert not node.cni("ADD", other, wanted).status
