from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from cache import CAPABLE, Cache
from lab import CLIENT4, LAUNCHER, NODE4, NODE6, Node, config, mapping, wait

from cni_hostport.attachment import Attachment

if TYPE_CHECKING:
    from pathlib import Path

    from lab import Pod

MAPPINGS = [mapping(8080), mapping(5353, 53, "udp", hostIP=NODE4), mapping(8443, 443)]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cni")


def restore(node: Node, *caches: Cache, options: tuple[str, ...] = (), status: int = 0) -> str:
    """Restore on a node, see it end with this status, and return what it says."""
    places = [f"--cache-dir={of.directory}" for of in caches]
    ran = node.run(*LAUNCHER, "restore", *places, *options, check=False)
    assert ran.returncode == status, ran
    return ran.stdout if options else ran.stderr


def running(node: Node, cache: Cache, *mappings: dict[str, Any], **keys: Any) -> Pod:
    """Have a pod with host ports, as a runtime leaves it behind."""
    pod = node.pod()
    call = config(pod, *mappings, name=keys.get("network", "pods"))
    added = node.cni("ADD", pod, call, ARGS=f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME={pod.host_end}")
    assert added.status == 0, added
    cache.add(pod, *mappings, **keys)
    return pod


def test_five_hundred_mappings_answer_again_after_the_ruleset_was_flushed(node: Node, cache: Cache) -> None:
    pods = [node.pod(4) for _ in range(50)]
    ports = {pod.id: range(8000 + 10 * number, 8010 + 10 * number) for number, pod in enumerate(pods)}
    for pod in pods:
        pod.serve("tcp", 80, pod.host_end, "0.0.0.0")
        cache.add(pod, *(mapping(port) for port in ports[pod.id]))
    started = [node.start("ADD", pod, config(pod, *(mapping(port) for port in ports[pod.id]))) for pod in pods]
    assert [wait(one).status for one in started] == [0] * 50
    node.nft("flush ruleset")
    assert node.client.is_silent("tcp", NODE4, 8000)
    assert restore(node, cache) == "50 restored\n"
    answers = {port: node.client.ask("tcp", NODE4, port) for pod in pods for port in ports[pod.id]}
    assert answers == {port: f"{pod.host_end} {CLIENT4}" for pod in pods for port in ports[pod.id]}


def test_what_is_restored_is_what_add_installs(node: Node, cache: Cache) -> None:
    pod = running(node, cache, *MAPPINGS)
    before = node.ruleset()
    node.nft("flush ruleset")
    restore(node, cache)
    assert _without_deleted(node.ruleset()) == _without_deleted(before)
    assert node.cni("CHECK", pod, config(pod, *MAPPINGS)).status == 0


def _without_deleted(ruleset: str) -> str:
    before, _, rest = ruleset.partition("\tset deleted {")
    return before + rest.partition("\n\t}\n")[2]


def test_what_is_there_is_left_as_it_is(node: Node, cache: Cache) -> None:
    pod = running(node, cache, *MAPPINGS)
    pod.serve("tcp", 80, "web")
    node.client.ask("tcp", NODE4, 8080)
    before = node.nft("-a list map inet hostport hostports")
    assert restore(node, cache) == restore(node, cache) == "1 present\n"
    assert node.nft("-a list map inet hostport hostports") == before
    assert "counter packets 1 " in before


@pytest.mark.parametrize(
    "damage",
    [
        "delete table inet hostport",
        "flush table inet hostport",
        "flush chain inet hostport DNAT",
        "flush chain inet hostport MASQ",
        "flush chain inet hostport dispatch",
        "flush map inet hostport hostports",
        "delete element inet hostport hostports { ipv4 . tcp . 8080 }",
        "flush map inet hostport pods_ip4",
        "insert rule inet hostport DNAT tcp dport 8080 dnat ip to 10.9.9.9:80",
    ],
)
def test_damage_is_repaired(node: Node, cache: Cache, damage: str) -> None:
    pod, other = running(node, cache, *MAPPINGS), running(node, cache, mapping(9090))
    pod.serve("tcp", 80, "web")
    other.serve("tcp", 80, "other")
    key = Attachment("pods", pod.id, "eth0").key
    node.nft(damage.replace("DNAT", f"dnat-{key}").replace("MASQ", f"masq-{key}"))
    restore(node, cache)
    for checked, mappings in ((pod, MAPPINGS), (other, [mapping(9090)])):
        outcome = node.cni("CHECK", checked, config(checked, *mappings))
        assert outcome.status == 0, outcome
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert node.client.ask("tcp", NODE4, 9090) == f"other {CLIENT4}"


def test_localhost_and_udp_work_again(node: Node, cache: Cache) -> None:
    pod = running(node, cache, *MAPPINGS)
    pod.serve("tcp", 80, "web")
    pod.serve("udp", 53, "dns")
    node.nft("flush ruleset")
    node.set_sysctl("net/ipv4/conf/cni0/route_localnet", 0)
    # this flow finds no mapping, and would never find one while it goes on
    assert node.client.is_silent("udp", NODE4, 5353, source_port=40000)
    restore(node, cache)
    assert node.client.ask("udp", NODE4, 5353, source_port=40000) == f"dns {CLIENT4}"
    assert node.ask("tcp", "127.0.0.1", 8080).startswith("web")
    assert node.client.ask("tcp", NODE6, 8080).startswith("web")


def test_a_pod_whose_namespace_is_gone_does_not_come_back(node: Node, cache: Cache) -> None:
    gone, living = running(node, cache, mapping(8080)), running(node, cache, mapping(9090))
    node.nft("flush ruleset")
    gone.remove()
    said = restore(node, cache)
    assert f"{gone.path} is gone" in said
    assert said.endswith("1 gone, 1 restored\n")
    assert not node.footprint(gone)
    assert node.footprint(living)


def test_a_pod_whose_interface_is_gone_does_not_come_back(node: Node, cache: Cache) -> None:
    pod = running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    pod.ip("link del eth0")
    assert "eth0 is gone from its network namespace" in restore(node, cache)
    assert not node.footprint(pod)


@pytest.mark.parametrize("known", [{}, {"runtimeConfig": {"portMappings": [mapping(8080)]}}])
def test_a_pod_that_was_deleted_does_not_come_back_before_its_runtime_forgets_it(
    node: Node, cache: Cache, known: dict[str, Any]
) -> None:
    pod = running(node, cache, mapping(8080))
    node.delete(pod, **known)
    assert "it was deleted" in restore(node, cache)
    assert not node.footprint(pod)


def test_a_pod_that_was_deleted_after_a_flush_does_not_come_back(node: Node, cache: Cache) -> None:
    pod = running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    node.delete(pod, runtimeConfig={"portMappings": [mapping(8080)]})
    assert "it was deleted" in restore(node, cache)
    assert not node.footprint(pod)


def test_a_delete_without_mappings_counts_too_once_a_restoration_has_begun(node: Node, cache: Cache) -> None:
    pod, other = running(node, cache, mapping(8080)), running(node, cache, mapping(9090))
    node.nft("flush ruleset")
    cache.path(pod).rename(cache.directory / "aside")
    restore(node, cache)
    (cache.directory / "aside").rename(cache.path(pod))
    node.delete(pod)
    assert "it was deleted" in restore(node, cache)
    assert not node.footprint(pod)
    assert node.footprint(other)


def test_a_pod_that_is_added_again_after_it_was_deleted_can_be_restored(node: Node, cache: Cache) -> None:
    pod = running(node, cache, mapping(8080))
    node.delete(pod)
    node.add(pod, mapping(8080))
    node.nft("flush table inet hostport")
    assert restore(node, cache) == "1 restored\n"
    assert node.footprint(pod)


def test_a_port_of_a_living_container_is_not_taken_and_the_others_are_restored(node: Node, cache: Cache) -> None:
    pod, other = running(node, cache, mapping(8080)), running(node, cache, mapping(9090))
    node.nft("flush ruleset")
    newer = node.pod()
    node.add(newer, mapping(8080))
    said = restore(node, cache, status=1)
    assert f"host port 8080/tcp is taken by container {newer.id[:12]}" in said
    assert said.endswith("1 failed, 1 restored\n")
    assert node.footprint(newer)
    assert node.footprint(other)
    assert not node.footprint(pod)


def test_an_address_of_a_living_container_is_not_taken(node: Node, cache: Cache) -> None:
    pod = running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    newer = node.pod(addresses=pod.addresses)
    node.add(newer, mapping(9090))
    assert "pod address 10.88.0.2 is that of container" in restore(node, cache, status=1)
    assert node.footprint(newer)
    assert not node.footprint(pod)


def test_a_port_of_a_container_that_is_gone_is_taken_over(node: Node, cache: Cache) -> None:
    pod = running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    gone = node.pod()
    node.add(gone, mapping(8080))
    gone.remove()
    assert "takes over" in restore(node, cache)
    assert node.footprint(pod)
    assert not node.footprint(gone)


def test_the_first_of_a_containers_networks_keeps_the_shared_ports(node: Node, cache: Cache) -> None:
    node.bridge("cni1", "10.89.0.1/24")
    pod = node.pod(4)
    second = config(pod, mapping(8080), name="second")
    second["prevResult"] = json.loads(
        json.dumps(second["prevResult"]).replace("10.88.", "10.89.").replace("eth0", "eth1")
    )
    pod.ip("link add eth1 type bridge")
    node.add(pod, mapping(8080))
    cache.add(pod, mapping(8080))
    assert node.cni("ADD", pod, second, IFNAME="eth1").status == 0
    cache.add(pod, mapping(8080), network="second", ifname="eth1", result=second["prevResult"])
    node.nft("flush ruleset")
    assert restore(node, cache) == "1 present, 1 restored\n"
    assert node.footprint(pod)
    assert not node.footprint(pod, "second", "eth1")


@pytest.mark.parametrize(
    "keys",
    [
        {"netns": None},
        {
            "capabilityArgs": {
                "portMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "TCP", "HostIP": ""}]
            }
        },
        {"capabilityArgs": {"portMappings": [mapping(8080), mapping(0, 9090)], "bandwidth": None}},
        {"cniArgs": None},
    ],
    ids=["without the namespace", "containerd's keys", "host port 0", "without arguments"],
)
def test_entries_of_every_runtime_are_understood(node: Node, cache: Cache, keys: dict[str, Any]) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    cache.add(pod, mapping(8080), **keys)
    assert restore(node, cache) == "1 restored\n"
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"


@pytest.mark.parametrize(
    "keys",
    [
        {"plugin": {"type": "portmap", "capabilities": {"portMappings": True}}},
        {"plugin": {"type": "hostport"}},
        {"plugin": {"type": "hostport", "capabilities": {"portMappings": False}}},
        {"capabilityArgs": None},
        {"capabilityArgs": {"portMappings": [mapping(0)]}},
        {"kind": "another"},
    ],
    ids=["portmap's", "no capabilities", "capability off", "no mappings", "host port 0 alone", "another kind of file"],
)
def test_attachments_without_host_ports_of_this_plugin_are_none_of_its_business(
    node: Node, cache: Cache, keys: dict[str, Any]
) -> None:
    cache.add(node.pod(), mapping(8080), **keys)
    assert restore(node, cache) == "Nothing to restore.\n"
    assert node.ruleset() == ""


def test_a_node_without_host_ports_gets_no_table(node: Node, cache: Cache) -> None:
    cache.add(node.pod(), plugin={**CAPABLE, "type": "portmap"})
    restore(node, cache)
    assert node.nft("list ruleset") == ""


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_restored(node: Node, cache: Cache) -> None:
    pod = running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    broken = cache.directory / "results" / "pods-broken-eth0"
    broken.write_text('{"kind": "cniCacheV1", "containerId"')
    said = restore(node, cache, status=1)
    assert f"failed: {broken}: " in said
    assert said.endswith("1 failed, 1 restored\n")
    assert node.footprint(pod)


def test_a_wrong_configuration_is_named(node: Node, cache: Cache) -> None:
    cache.add(node.pod(), mapping(8080), plugin={**CAPABLE, "snat": "yes"})
    assert "snat 'yes' is invalid" in restore(node, cache, status=1)


def test_several_caches_are_read_and_one_that_is_missing_is_no_error(node: Node, cache: Cache, tmp_path: Path) -> None:
    other, absent = Cache(tmp_path / "other"), Cache(tmp_path / "absent")
    (absent.directory / "results").rmdir()
    pods = running(node, cache, mapping(8080)), running(node, other, mapping(9090))
    node.nft("flush ruleset")
    assert restore(node, cache, other, absent) == "2 restored\n"
    assert all(node.footprint(pod) for pod in pods)


def test_a_dry_run_changes_nothing_and_shows_what_nft_would_be_told(node: Node, cache: Cache) -> None:
    pods = running(node, cache, *MAPPINGS), running(node, cache, mapping(9090), network="others")
    before = _without_deleted(node.ruleset())
    node.nft("flush ruleset")
    shown = restore(node, cache, options=("--dry-run",))
    assert node.nft("list ruleset") == ""
    assert f"# pod shop/{pods[0].host_end}, eth0 on network pods: 8080/tcp, 5353/udp on {NODE4}, 8443/tcp\n" in shown
    node.nft_file(shown)
    assert _without_deleted(node.ruleset()) == before


def test_the_outcome_is_there_for_programs(node: Node, cache: Cache) -> None:
    pod = running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    [outcome] = json.loads(restore(node, cache, options=("--json",)))
    assert (outcome["status"], outcome["mappings"]) == ("restored", ["8080/tcp"])
    assert outcome["attachment"] == f"pod shop/{pod.host_end}, eth0 on network pods"


def test_without_privileges_it_says_so(node: Node, cache: Cache) -> None:
    cache.add(node.pod(), mapping(8080))
    command = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", *LAUNCHER, "restore"]
    ran = node.run(*command, f"--cache-dir={cache.directory}", check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "Error: 'hostport restore' uses nftables, which needs root (CAP_NET_ADMIN)\n"


def test_a_progress_bar_is_shown_on_a_terminal(node: Node, cache: Cache) -> None:
    pod = node.pod()
    for number in range(40):
        cache.add(
            pod, mapping(8000 + number), network=f"n{number}", result={"ips": [{"address": f"10.88.1.{number}/24"}]}
        )
    command = " ".join([*LAUNCHER, "restore", f"--cache-dir={cache.directory}"])
    ran = subprocess.run(
        ["nsenter", f"--net={node.path}", "script", "-qec", command, "/dev/null"],
        check=True, capture_output=True, text=True, env={"TERM": "xterm", "PATH": "/usr/bin:/usr/sbin:/bin"},
    )  # fmt: skip
    assert "Restoring" in ran.stdout
    assert "40 restored" in ran.stdout
