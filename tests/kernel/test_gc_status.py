from __future__ import annotations

import ctypes.util
import json
import os
import re
from typing import Any

import pytest
from lab import LAUNCHER, Node, Outcome, Pod, config, mapping, require, wait

BARE = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}
VALID = "cni.dev/valid-attachments"
BIND_EMPTY = 'for library in $(find / -xdev -name "libnftables.so*"); do mount --bind /dev/null "$library"; done'


def named(pod: Pod, ifname: str = "eth0") -> dict[str, str]:
    return {"containerID": pod.id, "ifname": ifname}


@pytest.fixture
def pods(node: Node) -> list[Pod]:
    made = [node.pod() for _ in range(3)]
    for number, pod in enumerate(made):
        node.add(pod, mapping(8080 + number), mapping(8080 + number, 53, "udp"))
    return made


@pytest.fixture
def foreign(node: Node) -> Pod:
    pod = node.pod()
    node.add(pod, mapping(9090), name="another")
    return pod


def gc(node: Node, valid: Any) -> Outcome:
    return node.cni("GC", None, {**BARE, VALID: valid})


def test_gc_keeps_the_valid_and_removes_the_others_of_its_network(node: Node, pods: list[Pod], foreign: Pod) -> None:
    kept, whole = node.footprint(pods[0]), node.footprint(foreign, "another")
    collected = gc(node, [named(pods[0]), named(pods[1], "eth1"), {"containerID": "never-was", "ifname": "eth0"}])
    assert (collected.status, collected.stdout) == (0, "")
    assert [node.footprint(pod) for pod in pods] == [kept, {}, {}]
    assert node.footprint(foreign, "another") == whole
    assert node.cni("CHECK", pods[0], config(pods[0], mapping(8080), mapping(8080, 53, "udp"))).code == 0


@pytest.mark.parametrize("valid", [None, []], ids=["null", "empty"])
def test_gc_with_no_valid_attachment_removes_all_of_its_network(
    node: Node, pods: list[Pod], foreign: Pod, valid: Any
) -> None:
    whole = node.footprint(foreign, "another")
    assert gc(node, valid).code == 0
    assert not any(node.footprint(pod) for pod in pods)
    assert node.footprint(foreign, "another") == whole


def test_gc_without_the_key_removes_nothing(node: Node, pods: list[Pod]) -> None:
    before = node.nft("-sa list ruleset")
    assert node.cni("GC", None, BARE).code == 0
    assert node.nft("-sa list ruleset") == before
    assert pods[0].ip4 in before


@pytest.mark.parametrize(
    "valid",
    [
        *("web eth0", "", 0, 7, False, True, {}, {"containerID": "web", "ifname": "eth0"}),
        *([None], ["web"], [{}], [{"containerID": "web"}], [{"containerID": 7, "ifname": "eth0"}]),
        [{"containerID": "web", "ifname": None}],
    ],
    ids=json.dumps,
)
def test_gc_with_a_malformed_list_is_refused_and_removes_nothing(node: Node, valid: Any) -> None:
    pod = node.pod()
    node.add(pod, mapping(8080))
    before = node.nft("-sa list ruleset")
    refused = gc(node, valid)
    assert refused.code == 7
    assert VALID in refused.msg
    assert node.nft("-sa list ruleset") == before


def test_gc_goes_on_after_an_error_and_reports_it(node: Node, pods: list[Pod]) -> None:
    chain = min(re.findall(r"chain (dnat-\S+)", node.ruleset()))  # the first in GC's order
    (held,) = (pod for pod in pods if chain in node.ruleset().split(f"{pod.id} eth0@")[1].split("\n")[0])
    whole = node.footprint(held)
    node.nft_file(f"add chain inet hostport mine; add rule inet hostport mine jump {chain}")
    collected = gc(node, [])
    assert collected.code
    assert chain.removeprefix("dnat-") in collected.json["details"]
    assert [node.footprint(pod) for pod in pods] == [whole if pod is held else {} for pod in pods]
    node.nft("delete chain inet hostport mine")
    assert gc(node, []).code == 0
    assert not node.footprint(held)


def test_gc_removes_an_attachment_that_only_chains_are_left_of(node: Node, pods: list[Pod]) -> None:
    for name in ("hostports", "pods_ip4", "pods_ip6"):
        node.nft(f"flush map inet hostport {name}")
    assert gc(node, [named(pods[0])]).code == 0
    assert [bool(node.footprint(pod)) for pod in pods] == [True, False, False]


def test_gc_on_a_fresh_node_succeeds_and_makes_no_table(node: Node) -> None:
    assert gc(node, []).code == 0
    assert node.nft("list ruleset") == ""


def test_gcs_and_dels_at_once_all_succeed(node: Node, pods: list[Pod]) -> None:
    whole = node.footprint(pods[0])
    call = {**BARE, VALID: [named(pods[0])]}
    started = [node.start("GC", None, call) for _ in range(5)] + [node.start("DEL", pod, BARE) for pod in pods[1:]]
    assert [wait(item).code for item in started] == [0] * len(started)
    assert [node.footprint(pod) for pod in pods] == [whole, {}, {}]


def status(node: Node, *confined: str) -> Outcome:
    environment = {"CNI_COMMAND": "STATUS", "CNI_PATH": "/opt/cni/bin", "PATH": os.environ["PATH"]}
    done = node.run(*confined, *LAUNCHER, env=environment, input=json.dumps(BARE), check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_status_succeeds_and_leaves_nothing_behind_on_a_fresh_node(node: Node) -> None:
    done = node.cni("STATUS", None, BARE)
    assert (done.status, done.stdout, done.stderr) == (0, "", "")
    assert node.nft("list ruleset") == ""


def test_status_succeeds_and_changes_nothing_on_a_node_with_pods(node: Node, pods: list[Pod]) -> None:
    before = node.nft("-sa list ruleset")
    started = [node.start("STATUS", None, BARE) for _ in range(4)]
    assert [wait(item).code for item in started] == [0] * 4
    assert node.nft("-sa list ruleset") == before
    assert pods[0].ip4 in before


def test_status_without_the_right_to_change_the_network_is_not_available(node: Node) -> None:
    refused = status(node, "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    assert refused.code == 50
    assert "Operation not permitted" in refused.json["details"]


def test_status_without_libnftables_is_not_available(node: Node) -> None:
    require(ctypes.util.find_library("nftables"), "needs libnftables as a file of its own")
    refused = status(node, "unshare", "--mount", "sh", "-c", f'{BIND_EMPTY}; exec "$@"', "sh")
    assert refused.code == 50
    assert "libnftables" in refused.json["details"]


def test_status_with_another_kind_of_object_in_the_way_is_not_available(node: Node) -> None:
    node.nft_file("table inet hostport { set hostports { type ipv4_addr; }; }")
    before = node.nft("-sa list ruleset")
    refused = node.cni("STATUS", None, BARE)
    assert refused.code == 50
    assert "hostports" in refused.json["details"]
    assert node.nft("-sa list ruleset") == before
