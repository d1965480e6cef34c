from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from doctor_node import Practice
from lab import CLIENT4, NODE4, NODE6, config, mapping, require
from resident import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab import Node

FORWARD = "type filter hook forward priority 0;"
DROPPING = f"table inet strict {{ chain forward {{ {FORWARD} policy drop; }}; }}"
FIREWALLD = """table inet firewalld {{
    chain filter_FORWARD_dnat {{ {ports} reject with icmpx admin-prohibited; }}
    chain filter_FORWARD {{
        type filter hook forward priority filter + 10; policy accept;
        ct state {{ established, related }} accept
        ct status dnat {verdict}
        reject with icmpx admin-prohibited
    }}
}}"""


@pytest.fixture
def practice(node: Node, tmp_path: Path) -> Practice:
    return Practice(node, tmp_path)


@contextmanager
def owning(node: Node, text: str) -> Iterator[int]:
    """Have a program own the table inet owned, as firewalld 2 does its own, and yield the number of its process."""
    command = ["nsenter", f"--net={node.path}", "nft", "--interactive"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdin
        owner.stdin.write(f"add table inet owned {{ flags owner; }}\n{text}\n")
        owner.stdin.flush()
        eventually(lambda: "forward" in node.run("nft", "list", "ruleset").stdout)
        yield owner.pid
        owner.stdin.close()


def follow(practice: Practice, remedy: str) -> None:
    """Run the command of a remedy, which may say first when to do so."""
    command = remedy.rpartition(": ")[2].partition(" (")[0]
    practice.node.run(*command.split())


def test_a_forward_policy_that_drops_everything_is_a_problem_and_the_remedy_works(practice: Practice) -> None:
    practice.running(mapping(8080))
    practice.node.nft_file(DROPPING)
    assert practice.node.client.is_silent("tcp", NODE4, 8080)
    found = practice.finding()
    assert found.status == "problem"
    assert found.text.startswith("chain inet strict forward drops")
    follow(practice, found.remedy)
    assert practice.node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert practice.finds() == []


@pytest.mark.parametrize("last", ["drop", "counter drop", "reject", "log counter reject"])
def test_a_last_rule_that_drops_the_rest_is_as_a_policy(practice: Practice, last: str) -> None:
    practice.running(mapping(8080))
    rules = f"ct state established,related accept; {last};"
    practice.node.nft_file(f"table inet f {{ chain f {{ {FORWARD} {rules} }}; }}")
    found = practice.finding()
    assert found.status == "note"
    assert "hostport explain PORT" in found.remedy
    follow(practice, found.remedy)
    assert practice.node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert practice.finds() == []


def test_a_rule_that_may_drop_before_all_are_accepted_is_worth_a_note(practice: Practice) -> None:
    practice.running(mapping(8080))
    rules = "ip saddr 203.0.113.0/24 drop; ct status dnat accept; drop;"
    practice.node.nft_file(f"table inet f {{ chain f {{ {FORWARD} {rules} }}; }}")
    assert practice.finding().status == "note"


def test_a_last_rule_that_drops_some_is_not_as_a_policy(practice: Practice) -> None:
    practice.running(mapping(8080))
    practice.node.nft_file(f"table inet f {{ chain f {{ {FORWARD} tcp dport 9 drop; }}; }}")
    assert practice.finds() == []


def test_a_forward_policy_of_the_other_family_is_worth_a_note(practice: Practice) -> None:
    pod = practice.node.pod(4)
    pod.serve("tcp", 80, "web")
    practice.node.add(pod, mapping(8080))
    practice.cache.add(pod, mapping(8080))
    practice.node.nft_file(f"table ip6 f {{ chain f {{ {FORWARD} policy drop; }}; }}")
    found = practice.finding()
    assert (found.status, found.meaning) == ("note", "No connection over IPv6 reaches a pod.")
    assert practice.node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"


@pytest.mark.parametrize(("program", "address"), [("iptables", NODE4), ("ip6tables", NODE6)])
@pytest.mark.parametrize("rules", [[], ["-A FORWARD -i elsewhere -j ACCEPT"]])
def test_the_advice_for_a_table_of_iptables_works_and_leaves_iptables_working(
    practice: Practice, program: str, address: str, rules: list[str]
) -> None:
    practice.running(mapping(8080))
    practice.node.run(program, "-P", "FORWARD", "DROP")
    for rule in rules:
        practice.node.run(program, *rule.split())
    assert practice.node.client.is_silent("tcp", address, 8080)
    found = practice.finding()
    assert found.status == ("note" if rules else "problem")
    assert f"{program} -I FORWARD -m conntrack --ctstate DNAT -j ACCEPT" in found.remedy
    follow(practice, found.remedy)
    assert practice.node.client.ask("tcp", address, 8080).startswith("web ")
    rule = "-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT"
    assert practice.node.run(f"{program}-save").stdout.split("\n").count(rule) == 1
    assert rule in practice.node.run(program, "-S").stdout
    assert practice.finds() == []


def test_a_native_chain_in_a_table_with_a_name_of_iptables_gets_native_advice(practice: Practice) -> None:
    practice.running(mapping(8080))
    practice.node.nft_file(f"table ip filter {{ chain forward {{ {FORWARD} policy drop; }}; }}")
    assert practice.finding().remedy.startswith("nft insert rule ip filter forward ct status dnat accept")


def test_a_table_that_its_owner_alone_can_change_gets_advice_for_the_owner(practice: Practice) -> None:
    pod = practice.running(mapping(8080))
    with owning(practice.node, f"add chain inet owned forward {{ {FORWARD} policy drop; }}") as owner:
        refused = practice.node.run("nft", "insert rule inet owned forward accept", check=False)
        assert "Operation not permitted" in refused.stderr
        found = practice.finding()
        assert found.status == "problem"
        assert found.remedy == (
            f"Only nft (process {owner}) can change table inet owned: have it accept ct status dnat."
        )
        checked = practice.node.cni("CHECK", pod, config(pod, mapping(8080)))
        assert checked.status == 0, checked


@pytest.mark.parametrize("first", [True, False])
def test_damage_is_told_in_the_presence_of_a_table_that_its_owner_alone_can_change(
    practice: Practice, *, first: bool
) -> None:
    owned = f"add chain inet owned forward {{ {FORWARD} }}"
    if first:
        with owning(practice.node, owned):
            tell_damage(practice)
    else:
        pod = practice.running(mapping(9090))
        with owning(practice.node, owned):
            tell_damage(practice)
        practice.node.delete(pod)


def tell_damage(practice: Practice) -> None:
    """Have rules damaged, and see that exactly this is told, by doctor and CHECK."""
    pod = practice.running(*(mapping(port) for port in range(8000, 8020)))
    assert practice.finds() == []
    practice.node.nft("flush chain inet hostport dispatch")
    found = practice.finding()
    assert found.details == ("chain inet hostport dispatch",)
    checked = practice.node.cni("CHECK", pod, config(pod, *(mapping(port) for port in range(8000, 8020))))
    assert checked.code == 103
    practice.node.nft("add table inet hostport { flags dormant; }")
    checked = practice.node.cni("CHECK", pod, config(pod, *(mapping(port) for port in range(8000, 8020))))
    assert "dormant" in checked.json["details"]


def test_firewalld_as_it_is_installed_accepts_host_ports(practice: Practice) -> None:
    practice.running(mapping(8080))
    practice.node.nft_file(FIREWALLD.format(ports="", verdict="accept"))
    assert practice.node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert practice.finds() == []


@pytest.mark.parametrize(
    ("ports", "status"), [("", "problem"), ("meta l4proto tcp ct original proto-dst 9090 accept;", "note")]
)
def test_firewalld_that_accepts_only_its_own_forwards_gets_advice_for_its_configuration(
    practice: Practice, ports: str, status: str
) -> None:
    practice.running(mapping(8080))
    practice.node.nft_file(FIREWALLD.format(ports=ports, verdict="jump filter_FORWARD_dnat"))
    assert practice.node.client.is_silent("tcp", NODE4, 8080)
    found = practice.finding()
    assert (found.status, "filter_FORWARD_dnat drops" in found.text) == (status, True)
    assert "StrictForwardPorts=no into /etc/firewalld/firewalld.conf" in found.remedy
    practice.node.nft("delete table inet firewalld")
    practice.node.nft_file(FIREWALLD.format(ports=ports, verdict="accept"))
    assert practice.node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"


@pytest.mark.parametrize("program", ["iptables", "ip6tables"])
def test_a_policy_of_iptables_is_seen_as_well(practice: Practice, program: str) -> None:
    practice.node.run(f"{program}-nft", "-P", "FORWARD", "DROP")
    assert practice.finding().text.endswith(
        "filter FORWARD drops what is forwarded and not accepted by its rules, and it has none"
    )


def test_tables_of_legacy_iptables_are_worth_a_note(practice: Practice) -> None:
    made = practice.node.run("iptables-legacy", "-A", "FORWARD", "-j", "ACCEPT", check=False)
    require(made.returncode == 0, "needs a kernel with legacy iptables")
    found = practice.finding()
    assert (found.status, found.details) == ("note", ("iptables-legacy -t filter -S",))
