from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lab
import pytest
from lab import Node, Pod, config, mapping

if TYPE_CHECKING:
    from pathlib import Path

BARE = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}
READ_ONLY_SYSCTLS = [
    "unshare", "--mount", "sh", "-c",
    'mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"', "sh",
]  # fmt: skip


def bare_result(*addresses: str) -> dict[str, Any]:
    return {"cniVersion": "1.1.0", "ips": [{"address": address} for address in addresses]}


@pytest.fixture
def first(node: Node) -> Pod:
    pod = node.pod()
    arguments = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=first"
    assert node.cni("ADD", pod, config(pod, mapping(8080), mapping(5353, 53, "udp")), ARGS=arguments).code == 0
    return pod


@pytest.fixture
def second(node: Node) -> Pod:
    return node.pod()


def test_a_taken_port_is_refused_with_its_number_and_its_holders_pod_and_container(
    node: Node, first: Pod, second: Pod
) -> None:
    refused = node.cni("ADD", second, config(second, mapping(8080)))
    assert refused.code == 100
    for name in ("8080/tcp", "shop/first", first.id[:12], "eth0"):
        assert name in refused.msg


@pytest.mark.parametrize(
    "wanted",
    [
        [mapping(8080)],
        [mapping(9001), mapping(9002), mapping(9003, 80, "udp"), mapping(8080)],
        [mapping(9001), mapping(5353, 80, "udp")],
    ],
    ids=["alone", "last of several", "udp"],
)
def test_a_refused_pod_leaves_nothing_behind_and_the_first_as_it_was(
    node: Node, first: Pod, second: Pod, wanted: list[dict[str, Any]]
) -> None:
    first.serve("tcp", 80, "first")
    before = node.ruleset()
    assert node.cni("ADD", second, config(second, *wanted)).code == 100
    assert node.ruleset() == before
    assert node.ask("tcp", "192.0.2.1", 8080).startswith("first")


def test_a_refused_repeated_add_leaves_the_earlier_one_as_it_was(node: Node, first: Pod, second: Pod) -> None:
    node.add(second, mapping(9001))
    before = node.ruleset()
    assert node.cni("ADD", second, config(second, mapping(9002), mapping(8080))).code == 100
    assert node.ruleset() == before
    assert node.footprint(first)


def test_a_dead_holder_is_taken_over_and_that_is_one_line(node: Node, first: Pod, second: Pod) -> None:
    first.remove()
    (line,) = node.add(second, mapping(8080), mapping(5353, 53, "udp")).stderr.splitlines()
    for name in ("8080/tcp", first.id[:12], first.path, second.id):
        assert name in line
    assert not node.footprint(first)
    assert node.footprint(second)["hostports"] == 4


def test_all_ports_of_a_dead_holder_are_freed_when_one_is_wanted(node: Node, first: Pod, second: Pod) -> None:
    first.remove()
    node.add(second, mapping(8080))
    assert not node.footprint(first)
    assert "5353" not in node.ruleset()


def test_a_dead_holders_late_del_does_not_hurt_the_new_one(node: Node, first: Pod, second: Pod) -> None:
    first.remove()
    node.add(second, mapping(8080))
    before = node.ruleset()
    node.delete(first)
    assert node.ruleset() == before


def test_of_a_dead_and_a_living_holder_neither_makes_room(node: Node, first: Pod, second: Pod) -> None:
    node.add(second, mapping(9001))
    third = node.pod()
    first.remove()
    before = node.ruleset()
    assert node.cni("ADD", third, config(third, mapping(8080), mapping(9001))).code == 100
    assert node.ruleset() == before


@pytest.mark.parametrize("own", ["missing", "plain file"])
def test_nobody_is_judged_dead_by_a_caller_that_does_not_see_its_own_namespace(
    node: Node, first: Pod, second: Pod, own: str, tmp_path: Path
) -> None:
    found = tmp_path / "netns"
    if own == "plain file":
        found.touch()
    first.remove()
    before = node.ruleset()
    assert node.cni("ADD", second, config(second, mapping(8080)), NETNS=str(found)).code == 100
    assert node.ruleset() == before


def test_a_holder_whose_path_did_not_fit_counts_as_alive(node: Node, second: Pod, tmp_path: Path) -> None:
    pod = node.pod()
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    (folder / "netns").symlink_to(pod.path)
    assert node.cni("ADD", pod, config(pod, mapping(8080)), NETNS=str(folder / "netns")).code == 0
    assert "longlong" not in node.ruleset()
    pod.remove()
    assert node.cni("ADD", second, config(second, mapping(8080))).code == 100
    node.delete(pod)
    node.add(second, mapping(8080))


@pytest.mark.parametrize("snat", [True, False], ids=["snat", "no snat"])
@pytest.mark.parametrize(("holder", "network"), [("living", "pods"), ("dead", "pods"), ("dead", "another")])
def test_a_reused_pod_address_evicts_the_stale_holder(node: Node, holder: str, snat: bool, network: str) -> None:
    stale = node.pod()
    new = node.pod(addresses=stale.addresses)
    node.add(stale, mapping(8080), snat=snat)
    if holder == "dead":
        stale.remove()
    (line,) = node.add(new, mapping(9090), snat=snat, name=network).stderr.splitlines()
    assert stale.ip4 in line or stale.ip6 in line
    assert new.id in line
    assert not node.footprint(stale)
    assert "8080" not in node.ruleset()
    before = node.ruleset()
    node.delete(stale)
    assert node.ruleset() == before


def test_a_reused_address_of_one_family_is_enough(node: Node) -> None:
    stale, new = node.pod(), node.pod()
    node.add(stale, mapping(8080))
    node.add(new, mapping(9090), prevResult=bare_result(new.addresses[0], stale.addresses[1]))
    assert not node.footprint(stale)
    assert node.footprint(new)["hostports"] == 2


@pytest.mark.parametrize(
    ("ifname", "network"), [("eth1", "pods"), ("eth0", "another"), ("eth1", "another")], ids=lambda part: part
)
def test_two_attachments_of_one_container_do_not_mix(node: Node, first: Pod, ifname: str, network: str) -> None:
    first.ip("link add eth1 type veth peer name other", "addr add 10.88.0.201/24 dev eth1")
    other = config(first, mapping(9090), name=network, prevResult=bare_result("10.88.0.201/24"))
    assert node.cni("ADD", first, other, IFNAME=ifname).code == 0
    whole = node.footprint(first, network, ifname)
    assert whole["hostports"] == 1
    node.delete(first)
    assert not node.footprint(first)
    assert node.footprint(first, network, ifname) == whole
    assert node.cni("CHECK", first, other, IFNAME=ifname).code == 0
    assert node.cni("DEL", first, {**BARE, "name": network}, IFNAME=ifname).code == 0
    assert "9090" not in node.ruleset()


def test_a_port_stays_with_the_first_of_two_attachments_of_one_container(node: Node, first: Pod) -> None:
    ports = node.nft("-s list map inet hostport hostports")
    other = config(first, mapping(8080), prevResult=bare_result("10.88.0.201/24"))
    outcome = node.cni("ADD", first, other, IFNAME="eth1")
    assert outcome.code == 0
    assert outcome.stderr == f"hostport: host port 8080/tcp stays with another attachment of {first.id}\n"
    assert node.nft("-s list map inet hostport hostports") == ports


def test_a_repeated_add_that_maps_nothing_any_more_removes_what_was_mapped(node: Node, first: Pod) -> None:
    node.add(first, mapping(8080, hostIP="::1"))
    assert not node.footprint(first)


@pytest.mark.parametrize("keys", [{}, {"runtimeConfig": {}}, {"runtimeConfig": None}], ids=["none", "absent", "null"])
@pytest.mark.parametrize("mappings", [[], [mapping(0)], [mapping(0), mapping(0, 53, "udp")]], ids=len)
def test_a_repeated_add_without_a_host_port_removes_what_was_mapped(
    node: Node, first: Pod, mappings: list[dict[str, Any]], keys: dict[str, Any]
) -> None:
    other = node.pod()
    node.add(other, mapping(7070))
    assert node.add(first, *mappings, **keys).stderr == ""
    assert not node.footprint(first)
    assert node.footprint(other)["hostports"] == 2


def test_an_add_without_a_host_port_succeeds_where_nftables_cannot_be_asked(node: Node) -> None:
    pod = node.pod()
    node.launcher = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", *lab.LAUNCHER]
    assert "were not looked for: Operation not permitted" in node.add(pod).stderr


def test_a_repeated_add_with_other_ports_replaces(node: Node, first: Pod, second: Pod) -> None:
    outcome = node.add(first, mapping(9090))
    assert outcome.stderr == ""
    assert "8080" not in node.ruleset()
    assert node.footprint(first)["hostports"] == 2
    node.add(second, mapping(8080))


def test_an_add_after_a_flush_of_the_whole_ruleset_succeeds(node: Node, first: Pod, second: Pod) -> None:
    node.nft("flush ruleset")
    node.add(second, mapping(8080))
    assert node.cni("ADD", first, config(first, mapping(8080))).code == 100
    node.delete(first)
    assert node.footprint(second)["hostports"] == 2


@pytest.mark.parametrize("port", [9090, 8080], ids=["free port", "dead holder's port"])
def test_a_failing_later_step_rolls_back(
    node: Node, first: Pod, second: Pod, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if port == 8080:
        first.remove()
    node.set_sysctl("net/ipv4/conf/cni0/route_localnet", 0)
    with monkeypatch.context() as patched:
        patched.setattr(lab, "LAUNCHER", [*READ_ONLY_SYSCTLS, *lab.LAUNCHER])
        failed = node.cni("ADD", second, config(second, mapping(port)))
    assert failed.code == 102
    assert not node.footprint(second)
    assert bool(node.footprint(first)) == (port != 8080)
    node.add(second, mapping(port))


@pytest.mark.parametrize("command", ["ADD", "DEL"])
@pytest.mark.parametrize("path", ["{node}", "/proc/self/ns/net"])
def test_the_plugins_own_namespace_is_refused_before_anything_is_done(
    node: Node, first: Pod, command: str, path: str
) -> None:
    before = node.ruleset()
    own = path.format(node=node.path)
    assert node.cni(command, first, config(first, mapping(9090)), NETNS=own).code == 8
    assert node.ruleset() == before
    assert node.cni(command, first, config(first, mapping(9090)), NETNS=own, NETNS_OVERRIDE="true").code == 0
    assert node.ruleset() != before


@pytest.mark.parametrize(
    "result",
    [
        {"cniVersion": "1.1.0"},
        {"cniVersion": "1.1.0", "ips": None, "interfaces": None},
        {"interfaces": [{"name": "eth9", "sandbox": "/x"}], "ips": [{"address": "10.9.9.9/24", "interface": 0}]},
    ],
    ids=["no ips", "null", "another interface's"],
)
def test_a_result_without_the_pods_addresses_makes_add_read_them_from_its_namespace(
    node: Node, result: dict[str, Any]
) -> None:
    pod = node.pod()
    node.add(pod, mapping(8080))
    expected = node.ruleset()
    node.delete(pod)
    node.add(pod, mapping(8080), prevResult=result)
    assert node.ruleset() == expected
