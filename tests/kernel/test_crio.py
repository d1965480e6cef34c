"""A node whose runtime is CRI-O, which makes host ports itself: only its socket and its rules are made up here."""

from __future__ import annotations

import shutil
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from doctor_node import Practice
from lab import CLIENT4, NODE4, Namespace, Node, Pod, mapping, require, result

if TYPE_CHECKING:
    from pathlib import Path

# internal/hostport of cri-o/cri-o: a table for each family since 1.32, and chains of iptables before that
NFTABLES = """table ip crio-hostports {{
    map hostports {{
        type inet_proto . inet_service : ipv4_addr . inet_service
        elements = {{ tcp . 8080 comment "QWERTYUIOPASDFGH" : {0} . 80 }}
    }}
    set hairpins {{ type ipv4_addr . ipv4_addr; elements = {{ {0} . {0} }}; }}
    chain hostports {{ dnat ip addr . port to meta l4proto . th dport map @hostports; }}
    chain prerouting {{ type nat hook prerouting priority dstnat; fib daddr type local goto hostports; }}
    chain output {{ type nat hook output priority -100; fib daddr type local goto hostports; }}
    chain masquerading {{
        type nat hook postrouting priority srcnat
        ct status & (dnat | snat) == dnat ip saddr . ip daddr @hairpins masquerade
    }}
}}"""
IPTABLES = (
    "-N KUBE-HOSTPORTS", "-N KUBE-HP-QWERTYUIOPASDFGH", "-N CRIO-HOSTPORTS-MASQ", "-N CRIO-MASQ-QWERTYUIOPASDFGH",
    "-A PREROUTING -m addrtype --dst-type LOCAL -j KUBE-HOSTPORTS",
    "-A OUTPUT -m addrtype --dst-type LOCAL -j KUBE-HOSTPORTS",
    "-A POSTROUTING -m conntrack --ctstate DNAT -j CRIO-HOSTPORTS-MASQ",
    "-A KUBE-HOSTPORTS -p tcp --dport 8080 -j KUBE-HP-QWERTYUIOPASDFGH",
    "-A KUBE-HP-QWERTYUIOPASDFGH -p tcp -j DNAT --to-destination {0}:80",
    "-A CRIO-HOSTPORTS-MASQ -j CRIO-MASQ-QWERTYUIOPASDFGH",
    "-A CRIO-MASQ-QWERTYUIOPASDFGH -m conntrack --ctorigdstport 8080 -p tcp --dport 80 -s {0} -d {0} -j MASQUERADE",
)  # fmt: skip
# what it has for a chain; a plugin is sent those whose capability its object declares
SENT = {
    "io.kubernetes.cri.pod-annotations": {"example.com/team": "shop"},
    "bandwidth": {"ingressRate": 1000000, "ingressBurst": 8000, "egressRate": 0, "egressBurst": 0},
    "cgroupPath": "/kubepods/pod1/crio-1",
}
ARGUMENTS = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u1"


@pytest.fixture
def pod(node: Node, request: pytest.FixtureRequest) -> Pod:
    """A pod with host port 8080 by CRI-O's own rules, of one back end or the other."""
    made = node.pod()
    made.serve("tcp", 80, "web")
    if request.param == "nftables":
        node.nft_file(NFTABLES.format(made.ip4))
    else:
        require(shutil.which("iptables-nft"), "needs the program iptables-nft")
        for rule in IPTABLES:
            node.run("iptables-nft", "-t", "nat", *rule.format(made.ip4).split())
    return made


@pytest.mark.parametrize("pod", ["nftables", "iptables"], indirect=True)
@pytest.mark.parametrize("runtime_config", [{}, {"runtimeConfig": SENT}], ids=["not declared", "declared"])
def test_calls_without_mappings_succeed_and_leave_all_rules_alone(
    node: Node, pod: Pod, runtime_config: dict[str, Any]
) -> None:
    config = {
        "cniVersion": "1.1.0", "name": "pods", "type": "hostport",
        "capabilities": {"portMappings": True, **dict.fromkeys(runtime_config.get("runtimeConfig", ()), True)},
        **runtime_config,
    }  # fmt: skip
    previous = {"prevResult": result(*pod.addresses, sandbox=pod.path)}
    valid = {"cni.dev/valid-attachments": [{"containerID": pod.id, "ifname": "eth0"}]}
    before = node.nft("-s list ruleset")
    for command, called, keys in (
        ("STATUS", None, {}),
        ("ADD", pod, previous),
        ("CHECK", pod, previous),
        ("GC", None, valid),
        ("GC", None, {"cni.dev/valid-attachments": None}),
        ("DEL", pod, previous),
        ("DEL", pod, {}),
    ):
        outcome = node.cni(command, called, {**config, **keys}, ARGS=ARGUMENTS)
        assert (outcome.status, outcome.stderr) == (0, ""), (command, outcome)
        assert node.nft("-s list ruleset") == before, command
        assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"


@pytest.fixture
def practice(node: Node, tmp_path: Path) -> Practice:
    return Practice(node, tmp_path)


def bound(namespace: Namespace, path: Path) -> socket.socket:
    """Return a socket with a name in the file system, on which nobody listens yet."""
    path.parent.mkdir()
    with namespace.inside():
        made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    return made


def test_a_node_on_which_it_runs_is_told_that_its_host_ports_are_its_own(practice: Practice, tmp_path: Path) -> None:
    practice.running(mapping(8080))
    with closing(bound(practice.node, tmp_path / "crio" / "crio.sock")) as crio:
        crio.listen()
        found = practice.finding()
        assert (found.status, "CRI-O runs on this node" in found.text) == ("note", True)
        assert "Nothing is broken" in found.meaning
        assert "a pod asks for them by its annotation hostport/dynamic-ports" in found.meaning
    assert practice.finds() == []


def test_nothing_is_said_of_one_that_does_not_run_or_runs_elsewhere(practice: Practice, tmp_path: Path) -> None:
    with closing(bound(practice.node, tmp_path / "crio" / "crio.sock")):
        assert practice.finds() == []  # nobody listens
    assert (tmp_path / "crio" / "crio.sock").exists()
    assert practice.finds() == []  # left behind
    with closing(bound(practice.node.pod(), tmp_path / "container" / "crio.sock")) as crio:
        crio.listen()
        assert practice.finds() == []
    with closing(bound(practice.node, tmp_path / "other" / "notcrio.sock")) as other:
        other.listen()
        assert practice.finds() == []


def test_what_cannot_be_told_is_not_said_to_be_absent(
    practice: Practice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cni_hostport.operate.doctor.crio.UNIX_SOCKETS", tmp_path / "absent")
    found = next(item for item in practice.says() if item.status != "ok")
    assert found.text.startswith("runtimes that make host ports themselves could not be checked: ")
