from __future__ import annotations

import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from explanation import explain, serving_pod
from lab import CLIENT4, LAUNCHER, Node, Pod, config, mapping, require

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def owned(node: Node, rest: str) -> Iterator[None]:
    """Have a program that lives own a table with a forward chain."""
    command = ["nsenter", f"--net={node.path}", "nft", "--interactive"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdin
        owner.stdin.write("add table inet owned { flags owner; }\n")
        owner.stdin.write(f"add chain inet owned forward {{ type filter hook forward priority 0; {rest}; }}\n")
        owner.stdin.flush()
        until = time.monotonic() + 30
        while "forward" not in node.nft("list ruleset") and time.monotonic() < until:
            time.sleep(0.02)
        yield
        owner.stdin.close()


@pytest.fixture
def pod(node: Node) -> Pod:
    """A pod with a server and host port 8080."""
    return serving_pod(node, mapping(8080))


def test_a_table_that_has_an_owner_breaks_nothing(node: Node, pod: Pod) -> None:
    with owned(node, "policy accept"):
        assert explain(node, "8080", "--from", CLIENT4).status == 0
        assert node.cni("CHECK", pod, config(pod, mapping(8080))).status == 0
        listed = json.loads(node.run(*LAUNCHER, "list", "--json").stdout)
        assert [row["host_port"] for row in listed] == [8080]


@pytest.mark.usefixtures("pod")
def test_what_an_owned_table_drops_only_its_owner_can_let_pass(node: Node) -> None:
    with owned(node, "policy drop"):
        explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems[0].endswith("is dropped by inet owned forward: no rule there accepts it,"
                                     " and the chain's policy is drop")  # fmt: skip
    assert explanation.last["remedy"].startswith("Only nft (process ")


@pytest.mark.usefixtures("pod")
def test_advice_for_a_table_of_iptables_is_in_its_words(node: Node) -> None:
    require(shutil.which("iptables-nft"), "needs the program iptables-nft")
    node.run("iptables-nft", "-P", "FORWARD", "DROP")
    explanation = explain(node, "8080", "--from", CLIENT4)
    assert explanation.problems[0].endswith("is dropped by ip filter FORWARD: no rule there accepts it, and the chain's"
                                     " policy is drop")  # fmt: skip
    command = explanation.last["remedy"].partition(" (")[0]
    assert command == "iptables -I FORWARD -m conntrack --ctstate DNAT -j ACCEPT"
    node.run(*command.replace("iptables", "iptables-nft").split())
    assert explain(node, "8080", "--from", CLIENT4).status == 0
    assert "-A FORWARD" in node.run("iptables-nft", "-S").stdout
