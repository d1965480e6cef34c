from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cnitool import Chain
from lab import CLIENT4, CLIENT6, NODE4, NODE6, Namespace, Node, mapping

from cni_hostport.dynamic_ports.keys import ANNOTATIONS, CAPABILITY

if TYPE_CHECKING:
    from collections.abc import Iterator

CONF = Path(__file__).parents[2] / "conf"
DUAL, IPV4 = "10-hostport.conflist", "10-hostport-ipv4.conflist"


@pytest.fixture
def container() -> Iterator[Namespace]:
    with Namespace("container") as made:
        yield made


@pytest.fixture
def chain(request: pytest.FixtureRequest, node: Node, cnitool: Path, plugin_dir: Path, tmp_path: Path) -> Chain:
    return Chain.make(node, cnitool, plugin_dir, tmp_path, json.loads((CONF / request.param).read_text()))


@pytest.mark.parametrize(
    ("chain", "reached_at"), [(DUAL, {NODE4: CLIENT4, NODE6: CLIENT6}), (IPV4, {NODE4: CLIENT4})], indirect=["chain"]
)
def test_a_conflist_of_this_project_works_with_cnitool_and_the_packaged_plugins(
    chain: Chain, container: Namespace, reached_at: dict[str, str]
) -> None:
    mappings = [mapping(8080), mapping(0, 9090)]
    added = chain.run("add", container, *mappings)
    assert added.returncode == 0, added
    assert json.loads(added.stdout)["cniVersion"] == "1.0.0"
    container.serve("tcp", 80, "web")
    for address, client in reached_at.items():
        assert chain.node.client.ask("tcp", address, 8080) == f"web {client}"
    assert "9090" not in chain.node.ruleset()

    checked = chain.run("check", container, *mappings)
    assert checked.returncode == 0, checked

    deleted = chain.run("del", container, *mappings)
    assert deleted.returncode == 0, deleted
    assert "dnat-" not in chain.node.ruleset()
    assert chain.node.client.is_silent("tcp", NODE4, 8080)


@pytest.mark.parametrize("chain", [DUAL], indirect=True)
def test_an_error_reaches_the_person_who_runs_the_runtime(chain: Chain, container: Namespace) -> None:
    added = chain.run("add", container, mapping(8080, protocol="icmp"))
    assert added.returncode != 0
    assert "runtimeConfig.portMappings[0].protocol 'icmp' is not tcp, udp or sctp" in added.stderr
    assert chain.node.ruleset() == ""


@pytest.mark.parametrize("name", [DUAL, IPV4])
def test_a_conflist_has_the_plugin_after_the_one_that_makes_the_interface_and_with_its_capabilities(name: str) -> None:
    plugins = json.loads((CONF / name).read_text())["plugins"]
    assert [plugin["type"] for plugin in plugins] == ["bridge", "hostport"]
    assert plugins[-1]["capabilities"] == dict.fromkeys(("portMappings", ANNOTATIONS, CAPABILITY), True)
