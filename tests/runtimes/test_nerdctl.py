"""nerdctl with the newest containerd: its configurations name portmap, until what the README says is run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from go_tools import ROOT, TOOLS
from lab import CLIENT4, LAUNCHER, NODE4, require
from resident import eventually
from runtimes import image
from runtimes.containerd import mapped, port
from runtimes.host import SYSTEM_PATH, Inside
from runtimes.server import COMMAND, answer

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from runtimes.containerd import Containerd

PLUGINS = ("bridge", "host-local", "loopback", "portmap", "firewall", "tuning")
SWAP = re.compile(r"<!-- nerdctl -->\n```console\n\$ sudo (.*)\n```")
PORT, OTHER = 8080, 8081


@dataclass
class Nerdctl:
    """nerdctl on a containerd's host, with plugins and networks in a directory; containers of it run a server."""

    containerd: Containerd
    directory: Path

    @property
    def networks(self) -> Path:
        return self.directory / "net.d"

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        places = (f"--cni-path={self.directory / 'bin'}", f"--cni-netconfpath={self.networks}")
        options = (f"--address={self.containerd.socket}", "--cgroup-manager=cgroupfs", *places)
        command = ("env", f"PATH={SYSTEM_PATH}", str(TOOLS / "nerdctl"), *options, *arguments)
        done = self.containerd.host.run(*command, check=False)
        assert done.returncode == 0 or not check, done.stderr
        return done

    def start(self, name: str, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a container that answers ``web`` on its port 80."""
        program, *arguments = COMMAND
        cgroup, entry = f"--cgroup-parent={self.containerd.host.cgroup}", f"--entrypoint={program}"
        return self.run("run", "-d", "--name", name, cgroup, entry, *options, image.NAME, *arguments, check=check)

    def pid(self, name: str) -> str:
        return self.run("inspect", "--format", "{{.State.Pid}}", name).stdout.strip()

    def kill(self, name: str) -> None:
        """Kill a container as the kernel does when memory is short: nobody calls DEL."""
        self.containerd.host.run("kill", "-KILL", self.pid(name))
        assert eventually(lambda: self.run("inspect", "--format", "{{.State.Status}}", name).stdout == "exited\n")

    def swap(self) -> None:
        """Run what the README says for the networks that there are."""
        swap = SWAP.search((ROOT / "README.md").read_text())
        assert swap
        command = [str(self.networks) if word == "/etc/cni/net.d" else word for word in shlex.split(swap[1])]
        self.containerd.host.run(*command)

    def clear(self) -> None:
        names = self.run("ps", "-aq").stdout.split()
        self.run(*(("rm", "-f", *names) if names else ("version",)))


@pytest.fixture(scope="module")
def swapped(
    newest_containerd: Containerd, plugin_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Nerdctl]:
    """With a container ``old`` of before the swap, whose port 8070 is portmap's."""
    require((TOOLS / "nerdctl").exists(), "needs nerdctl, built by tests/build-tools.sh")
    require(shutil.which("iptables", path=SYSTEM_PATH), "needs the program iptables")
    made = Nerdctl(newest_containerd, tmp_path_factory.mktemp("nerdctl"))
    (made.directory / "bin").mkdir()
    for path in (newest_containerd.executable, *(plugin_dir / name for name in PLUGINS)):
        shutil.copy(path, made.directory / "bin")
    made.run("load", "--input", str(newest_containerd.directory / "image.tar"))
    made.start("old", "-p", "8070:80")
    made.swap()
    yield made
    made.clear()


@pytest.fixture
def nerdctl(swapped: Nerdctl) -> Iterator[Nerdctl]:
    yield swapped
    swapped.clear()
    swapped.containerd.clear()
    assert "dnat-" not in swapped.containerd.host.node.ruleset()


def test_a_container_of_before_the_swap_is_reached_until_it_is_removed(nerdctl: Nerdctl) -> None:
    node = nerdctl.containerd.host.node
    nerdctl.start("web", "-p", f"{PORT}:80")
    assert answer(node.client, NODE4, 8070) == answer(node.client, NODE4, PORT) == "web\n"
    assert mapped(node) == [f"ipv4 . tcp . {PORT}"]
    assert "8070" in node.run("iptables-save", "-t", "nat").stdout
    nerdctl.run("rm", "-f", "old")
    assert node.client.is_silent("tcp", NODE4, 8070)
    assert "8070" not in node.run("iptables-save", "-t", "nat").stdout


def test_published_ports_are_reached_until_the_container_is_removed(nerdctl: Nerdctl) -> None:
    node = nerdctl.containerd.host.node
    kept = (nerdctl.networks / "nerdctl-bridge.conflist").read_bytes()
    ports = (f"{PORT}:80", f"127.0.0.1:{OTHER}:80", "9000-9001:80-81", "5353:53/udp")
    nerdctl.start("web", *(option for published in ports for option in ("-p", published)))
    for address in (NODE4, "127.0.0.1"):
        assert answer(node, address, PORT) == "web\n"
    assert answer(node.client, NODE4, PORT) == answer(node.client, NODE4, 9000) == "web\n"
    assert answer(node, "127.0.0.1", OTHER) == "web\n"
    assert node.client.is_silent("tcp", NODE4, OTHER)
    container = Inside(f"/proc/{nerdctl.containerd.host.pid}/root/proc/{nerdctl.pid('web')}/ns/net")
    container.serve("udp", 53, "dns")
    assert node.client.ask("udp", NODE4, 5353) == f"dns {CLIENT4}"
    container.remove()
    assert set(nerdctl.run("port", "web").stdout.splitlines()) == {
        f"80/tcp -> 0.0.0.0:{PORT}", f"80/tcp -> 127.0.0.1:{OTHER}",
        "80/tcp -> 0.0.0.0:9000", "81/tcp -> 0.0.0.0:9001", "53/udp -> 0.0.0.0:5353",
    }  # fmt: skip
    nerdctl.run("rm", "-f", "web")
    assert node.client.is_silent("tcp", NODE4, PORT)
    assert mapped(node) == []
    assert (nerdctl.networks / "nerdctl-bridge.conflist").read_bytes() == kept


def test_a_container_that_stops_frees_its_port_and_gets_it_back_when_it_starts(nerdctl: Nerdctl) -> None:
    node = nerdctl.containerd.host.node
    nerdctl.start("web", "-p", f"{PORT}:80")
    nerdctl.run("restart", "--time", "0", "web")
    assert answer(node.client, NODE4, PORT) == "web\n"
    for ending in (("stop", "--time", "0"), ("kill",)):
        nerdctl.run(*ending, "web")
        assert node.client.is_silent("tcp", NODE4, PORT)
        assert mapped(node) == []
        nerdctl.run("start", "web")
        assert answer(node.client, NODE4, PORT) == "web\n"


def test_a_container_whose_process_was_killed_gets_its_port_back_unless_a_pod_took_it(nerdctl: Nerdctl) -> None:
    node = nerdctl.containerd.host.node
    nerdctl.start("web", "-p", f"{PORT}:80")
    nerdctl.kill("web")
    assert node.client.is_silent("tcp", NODE4, PORT)
    assert "already allocated" in nerdctl.start("second", "-p", f"{PORT}:80", check=False).stderr  # by nerdctl itself
    nerdctl.run("start", "web")
    assert answer(node.client, NODE4, PORT) == "web\n"
    nerdctl.kill("web")
    pod = nerdctl.containerd.run("pod", port(PORT))
    pod.namespace.serve("tcp", 80, "pod")
    assert node.client.ask("tcp", NODE4, PORT) == f"pod {CLIENT4}"
    nerdctl.run("rm", "web")
    assert node.client.ask("tcp", NODE4, PORT) == f"pod {CLIENT4}"


def test_a_port_that_a_pod_has_is_refused_with_its_name(nerdctl: Nerdctl) -> None:
    nerdctl.containerd.run("pod", port(PORT))
    refused = nerdctl.start("web", "-p", f"{PORT}:80", check=False)
    assert f"host port {PORT}/tcp is taken by pod test/pod" in refused.stderr


def test_containers_are_reached_while_containerd_is_away_and_after_it_is_back(nerdctl: Nerdctl) -> None:
    node = nerdctl.containerd.host.node
    nerdctl.start("web", "-p", f"{PORT}:80")
    assert answer(node.client, NODE4, PORT) == "web\n"
    nerdctl.containerd.kill()
    assert answer(node.client, NODE4, PORT) == "web\n"
    nerdctl.containerd.start()
    nerdctl.run("restart", "--time", "0", "web")
    assert answer(node.client, NODE4, PORT) == "web\n"


def test_a_network_that_is_made_later_names_portmap_until_it_is_swapped(nerdctl: Nerdctl) -> None:
    node = nerdctl.containerd.host.node
    nerdctl.run("network", "create", "more")
    [path] = nerdctl.networks.glob("*/nerdctl-more.conflist")
    assert "portmap" in [plugin["type"] for plugin in json.loads(path.read_text())["plugins"]]
    nerdctl.swap()
    nerdctl.start("web", "-p", f"{PORT}:80", "--network", "bridge", "--network", "more")
    assert answer(node.client, NODE4, PORT) == "web\n"
    nerdctl.run("rm", "-f", "web")
    assert mapped(node) == []


def test_restore_brings_back_what_was_flushed_and_list_shows_the_containers_id(nerdctl: Nerdctl) -> None:
    host = nerdctl.containerd.host
    container_id = nerdctl.start("web", "-p", f"{PORT}:80").stdout.strip()
    host.node.nft("flush ruleset")
    assert "1 restored" in host.run(*LAUNCHER, "restore").stderr
    assert answer(host.node.client, NODE4, PORT) == "web\n"
    assert f" default-{container_id[:12]} " in host.run(*LAUNCHER, "list").stdout
