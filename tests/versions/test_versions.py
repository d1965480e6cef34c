from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from explanation import Explanation
from kernel.test_upgrade import put_ahead
from lab import CLIENT4, NODE4, NODE6, Node, config, key_of, mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lab import Outcome
    from versions.roots import Root
    from versions.systems import System

MANY = [mapping(8080), *(mapping(port) for port in range(9000, 9020))]
BOTH_KINDS = [*MANY, *(mapping(port, hostIP=NODE4) for port in range(9100, 9120)), mapping(9100, hostIP=NODE6)]
PLANS: dict[str, tuple[Sequence[dict[str, Any]], dict[str, Any]]] = {
    "one-port": ([mapping(8080)], {}),
    "every-protocol": ([mapping(8080), mapping(53, 53, "udp"), mapping(9, 9, "sctp")], {}),
    "given-addresses": ([mapping(8080, hostIP=NODE4), mapping(8080, hostIP=NODE6)], {}),
    "many-ports": (MANY, {}),
    "many-ports-of-both-kinds": (BOTH_KINDS, {}),
    "conditions": (
        [mapping(8080)],
        {
            "conditionsV4": ["ip", "saddr", "{", "192.0.2.0/24", ",", "198.51.100.1", "}"],
            "conditionsV6": ["iifname", "!=", '"eth9"'],
        },
    ),
    "many-ports-with-conditions": (MANY, {"conditionsV4": ["ct", "state", "{", "new", ",", "established", "}"]}),
    "host-addresses": ([mapping(8080)], {"hostAddresses": ["192.0.2.0/25", "192.0.2.128/25", "2001:db8::/64"]}),
    "not-masqueraded": ([mapping(8080)], {"snat": False}),
    "all-masqueraded": ([mapping(8080)], {"masqAll": True}),
}


class Holder:
    """A pod of a node with the mappings of a plan, which another system's plugin may have installed."""

    def __init__(self, node: Node, plan: str = "one-port", shift: int = 0, **keys: Any) -> None:
        mappings, own = PLANS[plan]
        self.node, self.pod = node, node.pod()
        self.mappings = [{**item, "hostPort": item["hostPort"] + shift} for item in mappings]
        self.port = 8080 + shift
        self.keys = {**own, **keys}
        self.pod.serve("tcp", 80, self.pod.host_end)

    def call(self, command: str, system: System, **keys: Any) -> Outcome:
        self.node.launcher = system.launcher
        outcome = self.node.cni(command, self.pod, config(self.pod, *self.mappings, **self.keys, **keys))
        assert not outcome.status, outcome
        return outcome

    def answers(self) -> bool:
        asked = {
            NODE4: self.node.client.ask("tcp", NODE4, self.port),
            NODE6: self.node.client.ask("tcp", NODE6, self.port),
        }
        return all(answer.startswith(f"{self.pod.host_end} ") for answer in asked.values())

    @property
    def targets(self) -> set[tuple[Any, ...]]:
        """What ``list`` has to show: port, protocol, host address and pod address of each mapping."""
        found = set[tuple[Any, ...]]()
        for item in self.mappings:
            hosts = [item["hostIP"]] if item.get("hostIP") else ["0.0.0.0", "::"]
            for host in hosts:
                found.add((item["hostPort"], item["protocol"], host, self.pod.ip6 if ":" in host else self.pod.ip4))
        return found

    def is_listed(self, system: System) -> bool:
        listed = system.hostport(self.node, "list", "--json")
        assert listed.returncode == 0, listed
        found = {
            (load["host_port"], load["protocol"], load["host_ip"], load["pod_ip"]) for load in json.loads(listed.stdout)
        }
        return found >= self.targets

    def explanation(self, system: System) -> Explanation:
        command = ["explain", str(self.port), "--from", CLIENT4, "--to", NODE4, "--json", "--cache-dir", "/nonexistent"]
        explained = system.hostport(self.node, *command)
        assert not explained.stderr, explained
        return Explanation(explained.returncode, json.loads(explained.stdout))


def is_empty(node: Node, *holders: Holder) -> bool:
    """Tell whether nothing is left of attachments, with this machine's nft."""
    ruleset = node.nft("list ruleset")
    return not any(key_of(holder.pod) in ruleset or holder.pod.ip4 in ruleset for holder in holders)


@pytest.mark.parametrize("plan", PLANS)
def test_every_operation_works_for_each_kind_of_plan(node: Node, system: System, plan: str) -> None:
    holder = Holder(node, plan)
    holder.call("ADD", system)
    holder.call("CHECK", system)
    assert holder.answers()
    assert holder.is_listed(system)
    assert holder.explanation(system).problems == []
    holder.call("STATUS", system)
    holder.call("DEL", system)
    assert is_empty(node, holder)


def test_the_versions_are_told(node: Node, system: System, record_property: Callable[[str, object], None]) -> None:
    versions = system.versions(node)
    assert set(versions) == {"system", "nftables", "Python"}
    for name, value in versions.items():
        record_property(name, value)


def test_doctor_finds_nothing_wrong_with_nftables_and_the_base(node: Node, system: System) -> None:
    holder = Holder(node)
    holder.call("ADD", system)
    output = system.hostport(node, "doctor", "--json")
    assert not output.stderr, output
    texts = {load["text"]: load["status"] for load in json.loads(output.stdout)}
    assert [status for text, status in texts.items() if "nftables has all that host ports need" in text] == ["ok"]
    assert texts["the rules below all host ports are as they should be"] == "ok"


@pytest.mark.parametrize(
    "plan", ["every-protocol", "given-addresses", "many-ports-of-both-kinds", "conditions", "host-addresses"]
)
def test_what_another_version_wrote_is_checked_and_listed_and_explained_and_deleted(
    node: Node, pair: tuple[System, System], plan: str
) -> None:
    writer, reader = pair
    holder = Holder(node, plan)
    holder.call("ADD", writer)
    holder.call("CHECK", reader)
    assert holder.is_listed(reader)
    assert holder.explanation(reader).problems == []
    holder.call("ADD", reader)
    holder.call("CHECK", writer)
    assert holder.is_listed(writer)
    assert holder.answers()
    holder.call("DEL", reader)
    assert is_empty(node, holder)


def test_nftables_is_upgraded_under_running_pods_and_put_back(node: Node, pair: tuple[System, System]) -> None:
    before, after = pair
    old = [Holder(node, plan, 100 * number) for number, plan in enumerate(("one-port", "conditions", "host-addresses"))]
    many = Holder(node, "many-ports-of-both-kinds", 20000)
    for holder in (*old, many):
        holder.call("ADD", before)
    new = Holder(node, "one-port", 5000)
    for system in (after, before):
        new.call("ADD", system)
        for holder in (*old, many, new):
            holder.call("CHECK", system)
            assert holder.answers()
        new.call("DEL", system)
    valid = [{"containerID": old[0].pod.id, "ifname": "eth0"}]
    old[0].call("GC", after, **{"cni.dev/valid-attachments": valid})
    assert is_empty(node, *old[1:], many)
    old[0].call("CHECK", before)
    old[0].call("DEL", before)
    assert is_empty(node, *old)


def test_no_other_nft_crashes_on_what_the_plugin_wrote(node: Node, pair: tuple[System, System]) -> None:
    writer, other = pair
    for number, plan in enumerate(PLANS):
        Holder(node, plan, 200 * number).call("ADD", writer)
    for command in (
        "add table ip own",
        "add chain ip own ours { type filter hook input priority 0; }",
        "add rule ip own ours tcp dport { 22, 80 } counter",
        "list ruleset",
        "-j list ruleset",
        "delete table ip own",
    ):
        ran = other.nft(node, *command.split(" "))
        assert ran.returncode == 0, ran


TYPES = {
    "meta nfproto": "nf_proto",
    "meta l4proto": "inet_proto",
    "th dport": "inet_service",
    "ip daddr": "ipv4_addr",
    "ip6 daddr": "ipv6_addr",
    "iif": "iface_index",
}


def declare_by_type(node: Node, system: System) -> None:
    """Put the table into the form that an older release gave it, which had no maps of attachments' own."""
    listed = system.nft(node, "list", "table", "inet", "hostport").stdout
    lines = []
    for line in listed.splitlines():
        if line.startswith("\t\ttypeof "):
            key, colon, data = line.removeprefix("\t\ttypeof ").partition(" : ")
            types = " . ".join(TYPES[part] for part in key.split(" . "))
            lines.append(f"\t\ttype {types}{colon}{data}")
        else:
            lines.append(line)
    system.nft(node, "delete", "table", "inet", "hostport")
    loaded = node.run(*system.prefix, "nft", "-f", "-", input="\n".join(lines), check=False)
    assert loaded.returncode == 0, loaded


def notes(node: Node, system: System) -> str:
    output = system.hostport(node, "doctor", "--json")
    return " ".join(load["text"] for load in json.loads(output.stdout))


def test_a_table_of_an_older_release_works_as_before(node: Node, system: System) -> None:
    old, new = Holder(node, "every-protocol"), Holder(node, "one-port", 100)
    old.call("ADD", system)
    declare_by_type(node, system)
    old.call("CHECK", system)
    new.call("ADD", system)
    for holder in (old, new):
        holder.call("CHECK", system)
        assert holder.is_listed(system)
        assert holder.answers()
        holder.call("DEL", system)
    assert system.nft(node, "list", "map", "inet", "hostport", "hostports").stdout.count("elements") == 0


def test_a_table_of_a_release_with_other_hooks_is_upgraded(node: Node, system: System) -> None:
    old, new = Holder(node, "given-addresses"), Holder(node, "one-port", 100)
    old.call("ADD", system)
    put_ahead(node)
    new.call("STATUS", system)
    new.call("ADD", system)
    for holder in (old, new):
        holder.call("CHECK", system)
        assert holder.answers()


def test_doctor_tells_how_to_rid_older_nft_of_what_they_crash_on(
    node: Node, suite: str, system_called: Callable[[str], System]
) -> None:
    holder, system = Holder(node), system_called(suite)
    crashes = "nft 1.1.1 and earlier crashes on table inet hostport"
    holder.call("ADD", system)
    assert crashes not in notes(node, system)
    declare_by_type(node, system)
    assert crashes in notes(node, system)
    assert system.nft(node, "delete", "table", "inet", "hostport").returncode == 0
    holder.call("ADD", system)
    assert crashes not in notes(node, system)
    assert node.nft("list ruleset")


def test_the_demonstration_runs(root: Callable[[str], Root], suite: str) -> None:
    shown = root(suite).install("--demo")
    assert "Done: the namespaces of this demonstration" in shown.stdout
    assert "Hello 192.0.2.2, this is the pod." in shown.stdout
