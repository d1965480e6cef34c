from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from lab import LAUNCHER, NODE4, NODE6, Node, require
from runtimes.server import COMMAND, answer

if TYPE_CHECKING:
    from collections.abc import Iterator

BUSYBOX = Path("/bin/busybox")
PROGRAMS = ("podman", "runc", "conmon")
# what libcni, host-local and podman always keep in one place is out of the machine's sight, as are the mounts
OWN_MOUNTS = (
    'for i in cni containers; do mkdir -p /var/lib/$i "$0/$i"; mount --bind "$0/$i" /var/lib/$i; done;'
    " echo ready; exec sleep infinity"
)
LIMITS = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1000:1000")


def conflist(network: str, number: int) -> dict[str, object]:
    ranges = [[{"subnet": f"10.{number}.0.0/24"}], [{"subnet": f"fd00:{number}::/64"}]]
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    ipam = {"type": "host-local", "ranges": ranges, "routes": routes}
    bridge = {"type": "bridge", "bridge": f"cni-{network}", "isGateway": True, "ipMasq": True, "ipam": ipam}
    forward = {"type": "hostport", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": network, "plugins": [bridge, forward]}


@dataclass
class Podman:
    """Podman with the CNI backend on a node, with everything it writes below one directory."""

    node: Node
    directory: Path
    mounts: subprocess.Popen[str]

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        roots = [f"--{name}={self.directory / name}" for name in ("root", "runroot", "tmpdir")]
        options = ["--storage-driver=vfs", "--cgroup-manager=cgroupfs", f"--runtime={shutil.which('runc')}"]
        networks = [f"--network-config-dir={self.directory / 'net.d'}"]
        done = subprocess.run(
            [
                "nsenter", f"--mount=/proc/{self.mounts.pid}/ns/mnt", f"--net={self.node.path}",
                "env", f"CONTAINERS_CONF={self.directory / 'containers.conf'}",
                "podman", *roots, *options, *networks, *arguments,
            ],
            check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0 or not check, done
        return done

    def start(self, name: str, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a container that answers ``web`` on its port 80."""
        return self.run("run", "-d", "--name", name, *LIMITS, *options, "web", *COMMAND, check=check)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: podman takes no runroot of more than 50 characters."""
    with TemporaryDirectory(prefix="hp") as made:
        yield Path(made)


@pytest.fixture
def podman(node: Node, plugin_dir: Path, directory: Path) -> Iterator[Podman]:
    for program in PROGRAMS:
        require(shutil.which(program), f"needs the program {program}")
    require(BUSYBOX.exists() and _is_static(BUSYBOX), f"needs {BUSYBOX} of busybox-static")
    node.ip("link del cni0")
    for name in ("state", "bin", "net.d"):
        (directory / name).mkdir()
    executable = directory / "bin" / "hostport"
    executable.write_text("#!/bin/sh\nexec " + " ".join(LAUNCHER) + "\n")
    executable.chmod(0o755)
    for network, number in (("pods", 88), ("more", 89)):
        (directory / "net.d" / f"{network}.conflist").write_text(json.dumps(conflist(network, number)))
    (directory / "containers.conf").write_text(
        '[network]\nnetwork_backend = "cni"\ndefault_network = "pods"\n'
        f"cni_plugin_dirs = {json.dumps([str(executable.parent), str(plugin_dir)])}\n"
        '[engine]\nlock_type = "file"\nevents_logger = "none"\n'
        '[containers]\nlog_driver = "k8s-file"\n'
    )
    holder = ["unshare", "--mount", "sh", "-c", OWN_MOUNTS, str(directory / "state")]
    with subprocess.Popen(holder, stdout=subprocess.PIPE, text=True) as mounts:
        assert mounts.stdout
        assert mounts.stdout.readline() == "ready\n"
        made = Podman(node, directory, mounts)
        try:
            made.run("import", str(_image(directory)), "web")
            yield made
        finally:
            made.run("rm", "--all", "--force", "--time", "0", check=False)
            mounts.kill()


def _is_static(program: Path) -> bool:
    return b"/ld-linux" not in program.read_bytes()


def _image(directory: Path) -> Path:
    archive = directory / "web.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(BUSYBOX, "bin/busybox")
        for name in ("etc", "tmp"):
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder, io.BytesIO())
    return archive


def test_a_container_is_reached_on_its_published_port_until_it_is_removed(podman: Podman) -> None:
    podman.start("web", "-p", "8080:80", "-p", "9090:80/udp", "-p", "192.0.2.1:8081:80")
    for address, port in ((NODE4, 8080), (NODE6, 8080), (NODE4, 8081)):
        assert answer(podman.node.client, address, port) == "web\n"
    for address in ("127.0.0.1", NODE4, NODE6):
        assert answer(podman.node, address, 8080) == "web\n"
    assert set(podman.run("port", "web").stdout.splitlines()) == {
        "80/tcp -> 0.0.0.0:8080",
        "80/tcp -> 192.0.2.1:8081",
        "80/udp -> 0.0.0.0:9090",
    }
    podman.run("rm", "--force", "--time", "0", "web")
    assert podman.node.client.is_silent("tcp", NODE4, 8080)
    assert "dnat-" not in podman.node.ruleset()


def test_a_container_that_stops_frees_its_port_and_one_that_starts_again_gets_it_back(podman: Podman) -> None:
    podman.start("web", "-p", "8080:80")
    podman.run("stop", "--time", "0", "web")
    assert podman.node.client.is_silent("tcp", NODE4, 8080)
    assert "dnat-" not in podman.node.ruleset()
    podman.run("start", "web")
    assert answer(podman.node.client, NODE4, 8080) == "web\n"


def test_a_taken_port_fails_the_second_container_and_says_who_has_it(podman: Podman) -> None:
    first = podman.start("first", "-p", "8080:80").stdout.strip()
    refused = podman.start("second", "-p", "8080:80", check=False)
    assert refused.returncode
    assert "host port 8080/tcp is taken by" in refused.stderr
    assert first[:12] in refused.stderr
    assert answer(podman.node.client, NODE4, 8080) == "web\n"


def test_a_container_on_two_networks_is_reached_on_its_published_port(podman: Podman) -> None:
    podman.start("web", "-p", "8080:80", "--network", "pods,more")
    for asking, address in ((podman.node.client, NODE4), (podman.node.client, NODE6), (podman.node, "127.0.0.1")):
        assert answer(asking, address, 8080) == "web\n"
    podman.run("rm", "--force", "--time", "0", "web")
    assert podman.node.client.is_silent("tcp", NODE4, 8080)
    assert "dnat-" not in podman.node.ruleset()
