from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from cnitool import Chain
from dynamic_ports import given, noted, told
from go_tools import TOOLS, unavailable
from lab import CLIENT4, CLIENT6, NODE4, NODE6, Namespace, Node, mapping, require

from cni_hostport.dynamic_ports import keys

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAPPINGS = [mapping(8080), mapping(5353, 53, "udp"), mapping(0, 9090)]
CAPABILITIES = {"portMappings": True, keys.CAPABILITY: True, keys.ANNOTATIONS: True}
CONFLIST: dict[str, Any] = {
    "cniVersion": "1.1.0",
    "name": "pods",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipMasq": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.88.0.0/24"}], [{"subnet": "fd00:88::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        },
        {"type": "hostport", "capabilities": {"portMappings": True}},
    ],
}


ASKING: dict[str, dict[str, Any]] = {
    "capability": {keys.CAPABILITY: "80/tcp, 53/udp"},
    "annotation": {keys.ANNOTATIONS: {"app": "web", keys.REQUEST: "80/tcp, 53/udp"}},
}


@pytest.fixture(scope="session")
def newest_plugins() -> Path:
    """The folder of the newest reference plugins, which are built with Go on first use."""
    require(not (need := unavailable("plugins", "bridge", "host-local")), f"needs {need}")
    return TOOLS


@pytest.fixture
def chain(node: Node, cnitool: Path, newest_plugins: Path, tmp_path: Path) -> Chain:
    return Chain.make(node, cnitool, newest_plugins, tmp_path, CONFLIST)


@pytest.fixture
def containers() -> Iterator[tuple[Namespace, Namespace]]:
    with Namespace("web") as web, Namespace("other") as other:
        yield web, other


@pytest.mark.parametrize("by", ASKING)
def test_a_container_that_asks_for_dynamic_ports_has_them(
    chain: Chain, containers: tuple[Namespace, ...], by: str
) -> None:
    container, conflist = containers[0], json.loads(json.dumps(CONFLIST))
    conflist["plugins"][1]["capabilities"] = CAPABILITIES
    chain.configure(conflist)
    refused = chain.run("add", container, **ASKING[by])
    assert (refused.returncode, "this network gives none: it has no dynamicPorts" in refused.stderr) == (1, True)
    assert chain.run("del", container, **ASKING[by]).returncode == 0
    conflist["plugins"][1]["dynamicPorts"] = "40000-40063"
    chain.configure(conflist)
    added = chain.run("add", container, mapping(8080), **ASKING[by])
    assert added.returncode == 0, added
    [(container_id, ports)] = given(chain.node).items()
    assert told(container_id) == {text: {"hostPort": port} for text, port in ports.items()}
    assert noted(container) == f"hostport 80/tcp={ports['80/tcp']} 53/udp={ports['53/udp']}"
    container.serve("tcp", 80, "web")
    container.serve("udp", 53, "web")
    for address, client in ((NODE4, CLIENT4), (NODE6, CLIENT6)):
        assert chain.node.client.ask("tcp", address, ports["80/tcp"]) == f"web {client}"
        assert chain.node.client.ask("udp", address, ports["53/udp"]) == f"web {client}"
        assert chain.node.client.ask("tcp", address, 8080) == f"web {client}"
    checked = chain.run("check", container, mapping(8080), **ASKING[by])
    assert checked.returncode == 0, checked
    assert chain.run("del", container, mapping(8080), **ASKING[by]).returncode == 0
    assert (given(chain.node), told(container_id)) == ({}, {})


def test_a_chain_of_cni_1_1_0_is_added_checked_and_deleted(chain: Chain, containers: tuple[Namespace, ...]) -> None:
    container = containers[0]
    added = chain.run("add", container, *MAPPINGS)
    assert added.returncode == 0, added
    result = json.loads(added.stdout)
    assert result["cniVersion"] == "1.1.0"
    assert [ip["address"] for ip in result["ips"]] == ["10.88.0.2/24", "fd00:88::2/64"]
    container.serve("tcp", 80, "web")
    container.serve("udp", 53, "web")
    for protocol, port in (("tcp", 8080), ("udp", 5353)):
        assert chain.node.client.ask(protocol, NODE4, port) == f"web {CLIENT4}"
        assert chain.node.client.ask(protocol, NODE6, port) == f"web {CLIENT6}"

    checked = chain.run("check", container, *MAPPINGS)
    assert (checked.returncode, checked.stdout) == (0, ""), checked
    chain.node.nft("flush map inet hostport hostports")
    checked = chain.run("check", container, *MAPPINGS)
    assert checked.returncode
    assert "hostports" in checked.stderr

    for _ in range(2):
        deleted = chain.run("del", container, *MAPPINGS)
        assert (deleted.returncode, deleted.stdout) == (0, ""), deleted
        assert "dnat-" not in chain.node.ruleset()
        assert chain.node.client.is_silent("tcp", NODE4, 8080)


def test_status_tells_whether_pods_can_come(chain: Chain) -> None:
    asked = chain.run("status", None)
    assert (asked.returncode, asked.stdout) == (0, ""), asked
    assert chain.node.ruleset() == ""
    chain.node.nft_file("table inet hostport { set hostports { type ipv4_addr; }; }")
    asked = chain.run("status", None)
    assert asked.returncode
    assert "host ports are not available" in asked.stderr


@pytest.mark.parametrize("cache", ["kept", "lost"])
def test_gc_removes_what_libcni_remembers_and_nothing_unlisted(
    chain: Chain, containers: tuple[Namespace, ...], cache: str
) -> None:
    for number, container in enumerate(containers):
        added = chain.run("add", container, mapping(8080 + number))
        assert added.returncode == 0, added
        container.serve("tcp", 80, "web")
    if cache == "lost":
        for remembered in (chain.directory / "state" / "results").iterdir():
            remembered.unlink()
    collected = chain.run("gc", None)
    assert (collected.returncode, collected.stdout) == (0, ""), collected
    for number in range(len(containers)):
        if cache == "lost":  # cnitool sends no list of what is valid, and that is not an empty list
            assert chain.node.client.ask("tcp", NODE4, 8080 + number) == f"web {CLIENT4}"
        else:
            assert chain.node.client.is_silent("tcp", NODE4, 8080 + number)
    assert ("dnat-" in chain.node.ruleset()) == (cache == "lost")
