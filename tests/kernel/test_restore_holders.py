from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import node_process
import pytest
from all_processes import ALONE, IN_A_UNIT, SEES_ALL
from lab import BRIDGE4, CLIENT4, LAUNCHER, NODE4, Node, config, mapping
from libcni_cache import Cache
from resident import eventually
from restoration import restore, running

import cni_hostport.operate.restore

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cni")


def test_a_pod_whose_namespace_is_gone_does_not_come_back(node: Node, cache: Cache) -> None:
    absent, living = running(node, cache, mapping(8080)), running(node, cache, mapping(9090))
    node.nft("flush ruleset")
    absent.remove()
    output = restore(node, cache)
    assert f"{absent.path} is gone" in output
    assert output.endswith("1 gone, 1 restored\n")
    assert not node.footprint(absent)
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
    assert restore(node, cache).endswith("2 restored\n")  # the base is the other
    assert node.footprint(pod)


def test_a_port_of_a_living_container_is_not_taken_and_the_others_are_restored(node: Node, cache: Cache) -> None:
    pod, other = running(node, cache, mapping(8080)), running(node, cache, mapping(9090))
    node.nft("flush ruleset")
    newer = node.pod()
    node.add(newer, mapping(8080))
    output = restore(node, cache, status=1)
    assert f"host port 8080/tcp is taken by container {newer.id[:12]}" in output
    assert output.endswith("1 failed, 1 restored\n")
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
    absent = node.pod()
    node.add(absent, mapping(8080))
    absent.remove()
    assert "takes over" in restore(node, cache)
    assert node.footprint(pod)
    assert not node.footprint(absent)


def test_the_first_of_a_containers_networks_keeps_the_shared_ports(node: Node, cache: Cache) -> None:
    node.bridge("cni1", "10.89.0.1/24")
    pod = node.pod(4)
    second = config(pod, mapping(8080), name="second")
    second["prevResult"] = json.loads(
        json.dumps(second["prevResult"]).replace("10.88.", "10.89.").replace("eth0", "eth1")
    )
    pod.ip("link add eth1 type bridge", "addr add 10.89.0.2/24 dev eth1")
    node.add(pod, mapping(8080))
    cache.add(pod, mapping(8080))
    assert node.cni("ADD", pod, second, IFNAME="eth1").status == 0
    cache.add(pod, mapping(8080), network="second", ifname="eth1", result=second["prevResult"])
    node.nft("flush ruleset")
    assert restore(node, cache) == "2 restored\n"
    assert node.footprint(pod)["hostports"]
    assert not node.footprint(pod, "second", "eth1")["hostports"]


def test_a_path_that_leads_to_the_node_itself_is_no_pods_any_more(node: Node, cache: Cache) -> None:
    pod = node.pod(4)
    cache.add(pod, mapping(8080), netns=node.path, ifname="uplink", result={"ips": [{"address": f"{NODE4}/24"}]})
    assert "is that of the node now" in restore(node, cache)
    assert "goto dnat-" not in node.ruleset()


def test_a_pod_that_lost_its_address_does_not_come_back_in_the_place_of_who_has_it(node: Node, cache: Cache) -> None:
    stale = running(node, cache, mapping(8080))
    stale.ip(f"addr del {stale.addresses[0]} dev eth0")
    living = node.pod(addresses=stale.addresses[:1], gateways=[BRIDGE4])
    living.serve("tcp", 80, "living")
    node.add(living, mapping(9090))
    cache.add(living, mapping(9090))
    node.nft("flush ruleset")
    output = restore(node, cache)
    assert f"does not have {stale.ip4} any more" in output
    assert output.endswith("1 gone, 1 restored\n")
    node.ip("neigh flush dev cni0")
    assert node.client.ask("tcp", NODE4, 9090) == f"living {CLIENT4}"
    assert not node.footprint(stale)


@pytest.mark.parametrize("link_local", [True, False])
def test_a_pod_whose_addresses_are_in_a_network_stack_of_its_own_comes_back(
    node: Node, cache: Cache, *, link_local: bool
) -> None:
    pod = running(node, cache, mapping(8080))
    for address in pod.addresses if link_local else ():
        pod.ip(f"addr del {address} dev eth0")
    if not link_local:
        pod.ip("addr flush dev eth0")
    node.nft("flush ruleset")
    assert restore(node, cache) == "1 restored\n"
    assert node.footprint(pod)


@pytest.mark.parametrize("holder_lives", [True, False])
def test_a_dry_run_tells_of_holders_as_the_restoration_would(node: Node, cache: Cache, holder_lives: bool) -> None:
    pod = running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    other = node.pod()
    node.add(other, mapping(8080))
    if not holder_lives:
        other.remove()
    shown = restore(node, cache, options=("--dry-run",), status=int(holder_lives))
    if not holder_lives:
        node.nft_file(shown)
        assert (bool(node.footprint(pod)), bool(node.footprint(other))) == (True, False)


def test_flows_of_what_is_taken_back_end(node: Node, cache: Cache) -> None:
    pod = running(node, cache, mapping(5353, 53, "udp"))
    pod.serve("udp", 53, "dns")
    node.delete(pod)
    node.nft("flush ruleset")
    command = [*LAUNCHER, "restore", f"--cache-dir={cache.directory}", "--watch=20"]
    with subprocess.Popen(["nsenter", f"--net={node.path}", *command], stderr=subprocess.PIPE, text=True) as watching:
        assert eventually(lambda: node.footprint(pod))
        assert node.client.ask("udp", NODE4, 5353, source_port=40000) == f"dns {CLIENT4}"
        cache.remove(pod)  # the end of a DEL that had come before the flush
        assert eventually(lambda: not node.footprint(pod))
        assert eventually(lambda: node.client.is_silent("udp", NODE4, 5353, source_port=40000))
        watching.kill()


def test_a_failure_is_not_hidden_by_another_container_of_the_same_pod(node: Node, cache: Cache) -> None:
    failing, older = node.pod(4), node.pod(4)
    node.add(node.pod(4), mapping(8080))
    cache.add(failing, mapping(8080), cniArgs=[["K8S_POD_NAME", "web"]])
    cache.add(older, mapping(9090), cniArgs=[["K8S_POD_NAME", "web"]])
    older.remove()
    assert restore(node, cache, status=1).endswith("1 failed, 1 gone\n")


@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["restored", "dry run"])
def test_a_pod_that_was_deleted_is_gone_though_another_has_its_port(
    node: Node, cache: Cache, options: tuple[str, ...]
) -> None:
    pod = running(node, cache, mapping(8080))
    node.delete(pod)
    newer = node.pod()
    node.add(newer, mapping(8080))
    output = restore(node, cache, options=options)
    assert options or output == f"gone: pod shop/{pod.host_end} (eth0, network pods): it was deleted\n1 gone\n"
    assert node.footprint(newer)


@pytest.mark.parametrize("end", ["its namespace is gone", "its runtime forgets it"])
def test_a_pod_that_is_being_deleted_is_gone_in_the_end_though_another_has_its_port(
    node: Node, cache: Cache, end: str
) -> None:
    pod = running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    newer = node.pod()
    node.add(newer, mapping(8080))
    with node_process.on(node):
        paths = cni_hostport.operate.restore.candidates([cache.directory])
        outcomes = cni_hostport.operate.restore.restore(paths, print, watch_seconds=60)
        assert next(outcomes)[1].status == "failed"
        if end == "its namespace is gone":
            pod.remove()
        else:
            cache.remove(pod)
        assert [(path, outcome.status) for path, outcome in outcomes] == [(cache.path(pod), "gone")]
    assert node.footprint(newer)


def test_where_no_namespace_is_seen_no_pod_is_called_gone(node: Node, cache: Cache) -> None:
    pod = running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    blind = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /run/netns; exec "$@"', "sh", *LAUNCHER]
    ran = node.run(*blind, "restore", "--watch=0", f"--cache-dir={cache.directory}", check=False)
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (1, "1 failed")
    assert f"{pod.path} is not seen, nor any other in the same place" in ran.stderr


def test_who_sees_the_mounts_of_the_first_process_knows_that_the_last_pod_is_gone(node: Node, cache: Cache) -> None:
    running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    command = [*SEES_ALL, "restore", "--watch=0", f"--cache-dir={cache.directory}"]
    ran = node.run("unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /run/netns; exec "$@"', "sh", *command)
    assert ran.stderr.splitlines()[-1] == "1 gone"


@pytest.mark.parametrize(
    ("own", "counts"), [("true", "1 gone"), ("mount -t tmpfs none /run/netns", "1 failed")], ids=["none", "the place"]
)
def test_a_unit_to_which_the_mounts_of_the_first_process_come_knows_that_the_last_pod_is_gone(
    node: Node, cache: Cache, own: str, counts: str
) -> None:
    running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    command = [*ALONE, "restore", "--watch=0", f"--cache-dir={cache.directory}"]
    ran = node.run(*IN_A_UNIT, "sh", "-ec", f'{own}; exec "$@"', "sh", *command, check=False)
    assert ran.stderr.splitlines()[-1] == counts
