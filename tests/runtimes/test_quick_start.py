"""The quick start of the README, on a node with a network of portmap's: to hostport, and back again."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING

import pytest
from go_tools import ROOT, TOOLS
from lab import LAUNCHER, NODE4, Node, require
from runtimes import image
from runtimes.containerd import DUAL, NEWEST, Containerd, mapped
from runtimes.host import Host
from runtimes.kubelet import Kubelet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

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
def kubelet(newest_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubelet]:
    require((TOOLS / "kubelet").exists(), "needs a kubelet, built by tests/build-tools.sh")
    # the path of a socket is short
    containerd_directory, kubelet_directory = map(tmp_path_factory.mktemp, ("containerd", "kubelet"))
    with Node() as node, Host(node) as host:
        containerd = Containerd(host, NEWEST, containerd_directory, newest_tools)
        shutil.copy(newest_tools / "portmap", containerd.executable.parent)
        yield Kubelet(containerd, kubelet_directory)


def _configuration(containerd: Containerd) -> Path:
    return containerd.directory / DUAL / "10-hostport.conflist"


def _chain(kubelet: Kubelet, last: Mapping[str, object]) -> None:
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


def _manifest() -> str:
    """Return the README's manifest, with the one image that is there, as an API server would hand it to a kubelet."""
    manifest = block("pod.yaml")
    for shown, used in {
        "image: nginx:alpine": f"image: {image.NAME}\n      command: {json.dumps(SERVER)}",
        "nodeName: NODE": "automountServiceAccountToken: false\n  terminationGracePeriodSeconds: 1",
    }.items():
        assert shown in manifest
        manifest = manifest.replace(shown, used)
    return manifest


def _start(kubelet: Kubelet) -> None:
    kubelet.apply(POD, _manifest())
    kubelet.wait_for(lambda: _is_answered(kubelet.containerd.host.node))


def _stop(kubelet: Kubelet) -> None:
    kubelet.remove(POD)
    kubelet.wait_for(lambda: not kubelet.containerd.sandboxes())


def test_a_pod_is_reached_with_portmap_then_with_hostport_and_after_the_way_back(kubelet: Kubelet) -> None:
    node = kubelet.containerd.host.node
    _chain(kubelet, PORTMAP)
    _start(kubelet)
    assert mapped(node) == []
    _stop(kubelet)

    _chain(kubelet, json.loads(block("object")))
    found = _hostport(kubelet, "doctor", f"--conf-dir={_configuration(kubelet.containerd).parent}")
    assert "ok       the network configurations call hostport as they should" in found
    _start(kubelet)
    assert mapped(node) == ["ipv4 . tcp . 8080", "ipv6 . tcp . 8080"]
    assert f"default/{POD}" in _hostport(kubelet, "list")

    _chain(kubelet, PORTMAP)
    _stop(kubelet)
    _start(kubelet)
    first, _ = block("back again").splitlines()
    node.run(*first.removeprefix("$ sudo ").split())
    kubelet.wait_for(lambda: _is_answered(node))
