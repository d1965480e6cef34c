from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from lab import CLIENT4, LAUNCHER, NODE4, NODE6, Node, config, mapping, wait
from libcni_cache import Cache
from restoration import restore, running

from cni_hostport.attachment import Attachment

if TYPE_CHECKING:
    from pathlib import Path


MAPPINGS = [mapping(8080), mapping(5353, 53, "udp", hostIP=NODE4), mapping(8443, 443)]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cni")


def test_five_hundred_mappings_answer_again_after_the_ruleset_was_flushed(node: Node, cache: Cache) -> None:
    pods = [node.pod(4) for _ in range(50)]
    ports = {pod.id: range(8000 + 10 * number, 8010 + 10 * number) for number, pod in enumerate(pods)}
    for pod in pods:
        pod.serve("tcp", 80, pod.host_end, "0.0.0.0")
        cache.add(pod, *(mapping(port) for port in ports[pod.id]))
    started = [node.start("ADD", pod, config(pod, *(mapping(port) for port in ports[pod.id]))) for pod in pods]
    assert [wait(item).status for item in started] == [0] * 50
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


def test_the_base_is_put_right_for_pods_that_no_cache_knows(node: Node, cache: Cache) -> None:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    node.nft("flush chain inet hostport dispatch")
    commands = restore(node, cache, options=("--dry-run",))
    assert "add rule inet hostport dispatch ip6 daddr ::1 return\n" in commands
    assert "dnat-" not in commands
    output = "restored: the base of the ruleset: chain inet hostport dispatch\n1 restored\n"
    assert restore(node, cache) == output
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"


def test_a_dry_run_changes_nothing_and_shows_what_nft_would_be_told(node: Node, cache: Cache) -> None:
    pods = running(node, cache, *MAPPINGS), running(node, cache, mapping(9090), network="others")
    before = _without_deleted(node.ruleset())
    node.nft("flush ruleset")
    shown = restore(node, cache, options=("--dry-run",))
    assert node.nft("list ruleset") == ""
    assert f"# pod shop/{pods[0].host_end} (eth0, network pods): 8080/tcp, 5353/udp on {NODE4}, 8443/tcp\n" in shown
    node.nft_file(shown)
    assert _without_deleted(node.ruleset()) == before


def test_the_outcome_is_there_for_programs(node: Node, cache: Cache) -> None:
    pod = running(node, cache, mapping(8080))
    node.nft("flush ruleset")
    [outcome] = json.loads(restore(node, cache, options=("--json",)))
    assert (outcome["status"], outcome["mappings"]) == ("restored", ["8080/tcp"])
    assert outcome["attachment"] == f"pod shop/{pod.host_end} (eth0, network pods)"


def test_without_privileges_it_says_so(node: Node, cache: Cache) -> None:
    cache.add(node.pod(), mapping(8080))
    command = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", *LAUNCHER, "restore"]
    ran = node.run(*command, f"--cache-dir={cache.directory}", check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "Error: 'hostport restore' uses nftables, which needs root (CAP_NET_ADMIN)\n"


def test_a_progress_bar_is_shown_on_a_terminal(node: Node, cache: Cache) -> None:
    pod = node.pod()
    for number in range(40):
        address = f"10.88.1.{number + 1}/24"
        pod.ip(f"addr add {address} dev eth0")
        cache.add(pod, mapping(8000 + number), network=f"n{number}", result={"ips": [{"address": address}]})
    command = " ".join([*LAUNCHER, "restore", f"--cache-dir={cache.directory}"])
    ran = subprocess.run(
        ["nsenter", f"--net={node.path}", "script", "-qec", command, "/dev/null"],
        check=True, capture_output=True, text=True, env={"TERM": "xterm", "PATH": "/usr/bin:/usr/sbin:/bin"},
    )  # fmt: skip
    assert "Restoring" in ran.stdout
    assert "40 restored" in ran.stdout


def test_a_setting_that_cannot_be_changed_is_told_and_costs_no_pod_its_ports(node: Node, cache: Cache) -> None:
    pod = running(node, cache, *MAPPINGS)
    pod.serve("tcp", 80, "web")
    node.nft(f"flush chain inet hostport masq-{Attachment('pods', pod.id, 'eth0').key}")
    node.set_sysctl("net/ipv4/conf/cni0/route_localnet", 0)
    read_only = 'mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys; exec "$@"'
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        read_only,
        "sh",
        *LAUNCHER,
        "restore",
        f"--cache-dir={cache.directory}",
    ]
    refused = node.run(*command, check=False)
    assert (refused.returncode, "route_localnet to 1" in refused.stderr) == (1, True)
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert restore(node, cache) == "1 present\n"
    assert node.ask("tcp", "127.0.0.1", 8080).startswith("web")
    assert node.cni("CHECK", pod, config(pod, *MAPPINGS)).status == 0


@pytest.mark.parametrize("stream", ["2>&-", "2>/dev/full"])
def test_messages_that_cannot_be_written_are_lost_and_host_ports_are_restored(
    node: Node, cache: Cache, stream: str
) -> None:
    pod = running(node, cache, *MAPPINGS)
    places = [f"--cache-dir={cache.directory / name}" for name in ("none", "")]
    node.nft("flush ruleset")
    node.run("sh", "-c", f'exec "$@" {stream}', "sh", *LAUNCHER, "restore", "--watch=0", *places)
    assert node.cni("CHECK", pod, config(pod, *MAPPINGS)).status == 0
