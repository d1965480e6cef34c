"""The units as install.sh installs them, under a systemd of their own: they confine, and all works in them."""

from __future__ import annotations

import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from go_tools import ROOT
from installation import Machine
from lab import NODE4, NODE6, Node, config, mapping, require, wait
from libcni_cache import Cache
from resident import NEVER_COLD, eventually
from systemd import PROGRAM, Systemd

from cni_hostport.portmap import TOP_CHAIN, chain_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Pod

UNITS = ROOT / "conf" / "systemd"
HIGHEST_EXPOSURE = 3.5  # of 10
SERVICE = "10.96.0.1"
COLD, WARM = "/opt/cni/bin/hostport", "/opt/cni/bin/hostport-warm"
NFTABLES = """
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/nft flush ruleset
ExecReload=/usr/sbin/nft flush ruleset
"""


@pytest.mark.parametrize("name", ["hostport.service", "hostport-restore.service"])
def test_the_units_are_confined(name: str) -> None:
    require(shutil.which("systemd-analyze"), "needs systemd-analyze")
    analyze = [
        "systemd-analyze",
        "security",
        "--offline=true",
        "--no-pager",
        f"--threshold={HIGHEST_EXPOSURE * 10:.0f}",
    ]
    ran = subprocess.run([*analyze, str(UNITS / name)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def systemd(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Systemd]:
    """A node on which systemd runs, and the plugin is installed; its calls are run by the resident process or fail."""
    require(PROGRAM.exists(), "needs systemd")
    machine = Machine(tmp_path_factory.mktemp("machine"))
    top = tmp_path_factory.mktemp("systemd")
    with Node() as node, Systemd(node, top, {"nftables.service": NFTABLES}) as systemd:
        # not in the node's network namespace, since it downloads
        command = [*systemd.inside, str(machine.source / "install.sh")]
        installed = subprocess.run(command, capture_output=True, text=True, check=False)
        assert installed.returncode == 0, installed.stderr
        lines = NEVER_COLD.replace("'", '"')
        systemd.run("sh", "-c", f"sed 's/^main()/{lines}\\nmain()/' {COLD} >{WARM}; chmod +x {WARM}")
        node.launcher = [*systemd.inside, WARM]
        yield systemd


@pytest.fixture
def node(systemd: Systemd) -> Node:
    assert eventually(lambda: len(_tasks(systemd)) > 2)
    return systemd.node


def _tasks(systemd: Systemd) -> list[str]:
    shown = systemd.run("systemctl", "show", "--property=ControlGroup", "--value", "hostport.service").stdout.strip()
    found = [path for path in Path("/sys/fs/cgroup").rglob("cgroup.procs") if str(path.parent).endswith(shown)]
    return found[0].read_text().split() if shown and found else []


def web(node: Node) -> Pod:
    pod = node.pod()
    pod.serve("tcp", 80, "web")
    pod.serve("udp", 53, "dns")
    return pod


def test_the_units_are_installed_started_and_limited(systemd: Systemd) -> None:
    for name in ("hostport.socket", "hostport.service", "hostport-restore.service"):
        assert systemd.run("systemctl", "is-active", name).stdout == "active\n"
        assert systemd.run("systemctl", "is-enabled", name).stdout == "enabled\n"
    for name, memory, tasks in (("hostport", 2 << 30, 256), ("hostport-restore", 1 << 30, 64)):
        shown = systemd.run("systemctl", "show", "--property=MemoryMax,TasksMax", f"{name}.service").stdout
        assert shown.splitlines() == [f"MemoryMax={memory}", f"TasksMax={tasks}"]


def test_every_call_works_in_the_resident_process_as_it_is_confined(node: Node) -> None:
    pod = web(node)
    mappings = mapping(8080), mapping(53, 53, "udp"), mapping(8081, hostIP=NODE4)
    for _ in range(2):
        node.add(pod, *mappings)
        assert node.client.ask("tcp", NODE4, 8080).startswith("web")
        assert node.client.ask("tcp", NODE6, 8080).startswith("web")
        assert node.client.ask("udp", NODE4, 53).startswith("dns")
        assert node.client.ask("tcp", NODE4, 8081).startswith("web")
        assert node.ask("tcp", "127.0.0.1", 8080).startswith("web")
        assert node.cni("CHECK", pod, config(pod, *mappings)).status == 0
    node.nft("flush chain inet hostport dispatch")
    assert node.cni("CHECK", pod, config(pod, *mappings)).code == 103
    node.delete(pod)
    assert node.client.is_silent("tcp", NODE4, 8080)
    assert not node.holds(pod)


def test_addresses_are_read_in_the_namespace_of_a_pod_that_came_after_the_resident_process(node: Node) -> None:
    pod = web(node)
    node.add(pod, mapping(8080), prevResult={"cniVersion": "1.1.0"})
    assert node.client.ask("tcp", NODE6, 8080).startswith("web")
    node.delete(pod)


def test_who_is_gone_and_who_lives_is_told_apart(node: Node) -> None:
    old, new = web(node), web(node)
    node.add(old, mapping(8080))
    assert node.cni("ADD", new, config(new, mapping(8080))).code == 100
    old.remove()
    added = node.add(new, mapping(8080))
    assert "takes over" in added.stderr
    assert node.client.ask("tcp", NODE4, 8080).startswith("web")
    node.delete(new)


@pytest.fixture(params=["a process", "a directory"])
def path(request: pytest.FixtureRequest, node: Node, systemd: Systemd) -> Iterator[tuple[Pod, str]]:
    """A pod, and a path to its network namespace that is another user's."""
    pod = web(node)
    if request.param == "a directory":
        nobodys = f"mkdir -p -m 0700 /run/nobodys; touch /run/nobodys/pod; mount --bind {pod.path} /run/nobodys/pod"
        systemd.run("sh", "-c", f"{nobodys}; chown 65534 /run/nobodys")
        yield pod, "/run/nobodys/pod"
        systemd.run("umount", "/run/nobodys/pod")
        return
    nobody = "echo $$; exec setpriv --reuid=65534 --clear-groups sleep 300"
    command = ["nsenter", f"--net={pod.path}", *systemd.inside, "sh", "-c", nobody]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = process.stdout.readline().strip()
        yield pod, f"/proc/{number}/ns/net"
        systemd.run("kill", number)


def test_a_pod_may_be_another_users(node: Node, path: tuple[Pod, str]) -> None:
    pod, netns = path
    bare = config(pod, mapping(8080), prevResult={"cniVersion": "1.1.0"})
    for _ in range(2):
        assert node.cni("ADD", pod, bare, NETNS=netns).code == 0
    assert netns in node.ruleset()
    assert node.client.ask("tcp", NODE4, 8080).startswith("web")
    node.delete(pod)


def test_flows_of_udp_are_forgotten(node: Node) -> None:
    pod = web(node)
    node.serve("udp", 5353, "node")
    with node.client.socket("udp", NODE4) as client:
        client.settimeout(3)
        client.connect((NODE4, 5353))
        client.send(b"?")
        assert client.recv(100).startswith(b"node")
        node.add(pod, mapping(5353, 53, "udp"))
        client.send(b"?")
        assert client.recv(100).startswith(b"dns")
        node.delete(pod)
        client.send(b"?")
        assert client.recv(100).startswith(b"node")


def test_a_call_that_waits_for_a_holder_gets_the_port(node: Node) -> None:
    old, new = web(node), web(node)
    node.add(old, mapping(8080))
    waiting = node.start("ADD", new, config(new, mapping(8080), waitForHolder=20))
    time.sleep(1)
    assert waiting.poll() is None
    node.delete(old)
    assert wait(waiting).status == 0
    node.delete(new)


def test_addresses_of_services_are_followed(node: Node) -> None:
    pod = web(node)
    node.add(pod, mapping(8080))
    node.ip("link add kube-ipvs0 type bridge", f"addr add {SERVICE}/32 dev kube-ipvs0")
    assert eventually(lambda: SERVICE in node.nft("list set inet hostport ipvs_ip4"))
    node.ip("link del kube-ipvs0")
    assert eventually(lambda: SERVICE not in node.nft("list set inet hostport ipvs_ip4"))
    node.delete(pod)


@contextmanager
def cold(systemd: Systemd) -> Iterator[None]:
    """Let calls be run by the caller too."""
    systemd.node.launcher = [*systemd.inside, COLD]
    try:
        yield
    finally:
        systemd.node.launcher = [*systemd.inside, WARM]


def left_by_portmap(node: Node, pod: Pod) -> str:
    """Have what portmap left of a container in legacy iptables, and return the name of the chain."""
    chain = chain_name("pods", pod.id)
    node.run("iptables-legacy", "-t", "nat", "-N", TOP_CHAIN, check=False)
    made = node.run("iptables-legacy", "-t", "nat", "-N", chain, check=False)
    require(made.returncode == 0, "needs a kernel with legacy iptables")
    comment = f'dnat name: "pods" id: "{pod.id}"'
    node.run("iptables-legacy", "-t", "nat", "-A", TOP_CHAIN, "-m", "comment", "--comment", comment, "-j", chain)
    return chain


def legacy_iptables(node: Node) -> str:
    return node.run("iptables-legacy-save", "-t", "nat").stdout


def test_legacy_iptables_is_looked_at_and_what_portmap_left_there_removed(node: Node, systemd: Systemd) -> None:
    pod = web(node)
    chain = left_by_portmap(node, pod)
    with cold(systemd):
        node.delete(pod)
    assert TOP_CHAIN in legacy_iptables(node)
    assert chain not in legacy_iptables(node)
    node.add(pod, mapping(8080))
    node.delete(pod)


def test_calls_that_the_caller_runs_work_beside_the_resident_process(node: Node, systemd: Systemd) -> None:
    pod = web(node)
    node.add(pod, mapping(8080))
    status = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}
    with cold(systemd):
        assert node.cni("STATUS", None, status).status == 0
        assert node.cni("GC", None, {**status, "cni.dev/valid-attachments": []}).status == 0
    assert not node.holds(pod)


def test_a_call_for_which_the_units_memory_does_not_do_is_run_by_its_caller(node: Node, systemd: Systemd) -> None:
    def show(name: str) -> str:
        return systemd.run("systemctl", "show", f"--property={name}", "--value", "hostport.service").stdout.strip()

    def limit(size: str) -> None:
        systemd.run("systemctl", "set-property", "--runtime", "hostport.service", f"MemoryMax={size}")

    pod = web(node)
    mappings = [mapping(number) for number in range(2000, 2400)]
    limit(str(int(show("MemoryCurrent")) + (2 << 20)))
    try:
        with cold(systemd):
            node.add(pod, *mappings)
    finally:
        limit("2G")
    assert node.client.ask("tcp", NODE4, 2000, timeout=3).startswith("web")
    assert eventually(lambda: show("ActiveState") == "active" and len(_tasks(systemd)) > 2)
    node.delete(pod)


def test_host_ports_are_restored_by_the_unit_as_it_is_confined(node: Node, systemd: Systemd) -> None:
    cache = Cache(Path(f"/proc/{systemd.process}/root/var/lib/cni"))
    pod = web(node)
    mappings = mapping(8080), mapping(53, 53, "udp")
    node.add(pod, *mappings)
    cache.add(pod, *mappings)
    for verb in ("restart", "reload", "reload"):
        node.set_sysctl("net/ipv4/conf/cni0/route_localnet", 0)
        chain = left_by_portmap(node, pod)
        systemd.run("systemctl", verb, "nftables.service")
        assert eventually(lambda: node.holds(pod))
        assert eventually(lambda: node.get_sysctl("net/ipv4/conf/cni0/route_localnet") == "1")
        assert node.client.ask("tcp", NODE4, 8080).startswith("web")
        assert node.ask("tcp", "127.0.0.1", 8080).startswith("web")
        assert chain not in legacy_iptables(node)
        later = web(node)
        node.add(later, mapping(9090))
        cache.add(later, mapping(9090))
        node.delete(later)
        cache.remove(later)
    node.delete(pod)
