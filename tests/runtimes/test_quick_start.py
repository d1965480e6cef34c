"""The quick start of the README, on a node with a network of portmap's: to hostport, and back again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from go_tools import ROOT, TOOLS
from lab import LAUNCHER, NODE4, Node, require
from runtimes import image
from runtimes.containerd import DUAL, NEWEST, Containerd, mapped
from runtimes.host import Host
from runtimes.kubelet import Kubelet

if TYPE_CHECKING:
    from collections.abc import Iterator

README = (ROOT / "README.md").read_text()
POD = "hostport-test"
SERVER = ["/bin/busybox", "nc", "-ll", "-p", "80", "-e", "/bin/busybox", "echo", "-n", POD]
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}


def block(name: str) -> str:
    """Return the fenced block that follows the comment ``<!-- NAME -->``."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```\n", README, re.DOTALL)
    assert found, name
    return found.group(1)


@pytest.fixture
def kubelet(newest_tools: Path, tmp_path: Path) -> Iterator[Kubelet]:
    require((TOOLS / "kubelet").exists(), "needs a kubelet, built by tests/build-tools.sh")
    (tmp_path / "containerd").mkdir()
    (tmp_path / "kubelet").mkdir()
    with Node() as node, Host(node) as host:
        containerd = Containerd(host, NEWEST, tmp_path / "containerd", newest_tools)
        shutil.copy(newest_tools / "portmap", containerd.executable.parent)
        yield Kubelet(containerd, tmp_path / "kubelet")


def _configuration(containerd: Containerd) -> Path:
    return containerd.directory / DUAL / "10-hostport.conflist"


def _chain(kubelet: Kubelet, last: dict[str, object]) -> None:
    """Put an object in the place of the last of the conflist, and wait until containerd has seen that."""
    path = _configuration(kubelet.containerd)
    conflist = json.loads(path.read_text())
    conflist["plugins"][-1] = last
    path.write_text(json.dumps(conflist))

    def is_seen() -> bool:
        seen = json.loads(kubelet.containerd.cri.call("Status", verbose=True)["info"]["cniconfig"])
        return f'"type":"{last["type"]}"' in json.dumps(seen, separators=(",", ":"))

    kubelet.wait_for(is_seen)


def _is_answered(node: Node) -> bool:
    return not node.client.is_silent("tcp", NODE4, 8080) and node.client.ask("tcp", NODE4, 8080) == POD


def _hostport(kubelet: Kubelet, *arguments: str) -> str:
    ran = kubelet.containerd.host.run(*LAUNCHER, *arguments, check=False)
    return ran.stdout + ran.stderr


def test_a_pod_is_reached_with_portmap_then_with_hostport_and_after_the_way_back(kubelet: Kubelet) -> None:
    node = kubelet.containerd.host.node
    container = {"image": image.NAME, "command": SERVER}
    manifest = block("pod.yaml").replace("image: nginx:alpine", f"image: {image.NAME}\n      command: {json.dumps(SERVER)}")
    manifest = manifest.replace("nodeName: NODE", "automountServiceAccountToken: false\n  terminationGracePeriodSeconds: 1")
    assert container["image"] in manifest
    _chain(kubelet, PORTMAP)
    kubelet.apply(POD, manifest)
    kubelet.wait_for(lambda: _is_answered(node))
    assert mapped(node) == []
    kubelet.remove(POD)
    kubelet.wait_for(lambda: not kubelet.containerd.sandboxes())
    print(node.nft("list ruleset"))

    _chain(kubelet, json.loads(block("object")))
    print(_hostport(kubelet, "doctor", f"--conf-dir={_configuration(kubelet.containerd).parent}"))
    kubelet.apply(POD, manifest)
    kubelet.wait_for(lambda: _is_answered(node))
    print(_hostport(kubelet, "list"))
    assert mapped(node) == ["ipv4 . tcp . 8080", "ipv6 . tcp . 8080"]

    _chain(kubelet, PORTMAP)
    kubelet.remove(POD)
    kubelet.wait_for(lambda: not kubelet.containerd.sandboxes())
    print(_hostport(kubelet, "list"))
    kubelet.apply(POD, manifest)
    kubelet.wait_for(lambda: _is_answered(node))
    print(_hostport(kubelet, "list"))
    print(node.nft("list ruleset"))
    first, _ = block("back again").splitlines()
    node.run(*first.removeprefix("$ sudo ").split())
    assert _is_answered(node)
    assert 0
