"""A machine of a cluster: a root and a network of its own, with containerd, a kubelet and a kube-proxy."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING, Any

from go_tools import TOOLS
from kube_proxy import proxy_configuration
from runtimes import image
from runtimes.host import SYSTEM_PATH, Processes, Program, wait_for
from runtimes.kubelet import kubelet_configuration

from cluster import roots

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from lab import Namespace

PATH = {"PATH": f"/usr/local/bin:{SYSTEM_PATH}"}
SOCKET = "/run/containerd/containerd.sock"
CTR = ["/usr/local/bin/ctr", "--namespace=k8s.io"]
NETWORKS, PLUGINS = "/etc/cni/net.d", "/opt/cni/bin"
POD_NETWORKS = "10.88.0.0/16,fd00:88::/32"  # of all nodes
FAILED_CALL = re.compile(r"^.*failed to (?:setup|destroy) network.*$", re.MULTILINE)
CONTAINERD = f"""
version = 3
imports = []
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{image.NAME}"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
disable_apparmor = true
"""


def network(number: int) -> dict[str, Any]:
    """Return the network of a node as it comes with containerd, with addresses of the node's own."""
    ranges = [[{"subnet": f"10.88.{number}.0/24"}], [{"subnet": f"fd00:88:{number}::/64"}]]
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    bridge = {
        "type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": True, "promiscMode": True,
        "ipam": {"type": "host-local", "ranges": ranges, "routes": routes},
    }  # fmt: skip
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": "containerd-net", "plugins": [bridge, portmap]}


class Machine(Processes):
    """A node of the cluster; ``mode`` is that of its kube-proxy, and ``base`` the root that its own begins as."""

    def __init__(self, namespace: Namespace, number: int, base: Path, mode: str, directory: Path) -> None:
        self.namespace = namespace
        self.number = number
        self.name = f"node-{number}"
        self.ip4, self.ip6 = f"192.0.2.{10 + number}", f"2001:db8::1{number}"
        self.programs: dict[str, Program] = {}
        self._mode = mode
        self._directory = directory
        (directory / "root").mkdir(parents=True)
        super().__init__(namespace, roots.MOUNTS, directory / "root", base, self.name, TOOLS.resolve())
        self.write(f"{NETWORKS}/10-containerd-net.conflist", json.dumps(network(number), indent=2))
        self.run("mkdir", "-p", PLUGINS)
        for name in ("bridge", "host-local", "loopback", "portmap"):
            self.run("cp", f"/usr/local/bin/{name}", PLUGINS)
        self.write("/etc/containerd/config.toml", CONTAINERD)
        self.start_containerd()

    def write(self, path: str, text: str) -> None:
        """Write a file of its own, by rename."""
        script = 'mkdir -p "${1%/*}" && cat >"$1.new" && mv "$1.new" "$1"'
        subprocess.run(self._inside("sh", "-c", script, "sh", path), input=text, text=True, check=True)

    def read(self, path: str) -> str:
        """Return the text of a file of its own."""
        return self.run("cat", path).stdout

    def log(self, program: str) -> Path:
        """Return the log of a program, by its name."""
        return self._directory / f"{program}.log"

    def failed_calls(self) -> list[str]:
        """Return what containerd has logged of each ADD and DEL that failed."""
        return FAILED_CALL.findall(self.log("containerd").read_text())

    def _start(self, program: str, *options: str) -> None:
        self.programs[program] = self.start(
            program, f"/usr/local/bin/{program}", *options, log=self.log(program), environment=PATH
        )

    def start_containerd(self) -> None:
        """Start it, and wait until it answers."""
        self._start("containerd")
        wait_for(lambda: not self.run(*CTR, "version", check=False).returncode, self.log("containerd"))

    def restart_containerd(self) -> None:
        """Kill it, and start it again; its containers run on."""
        self.programs["containerd"].kill()
        self.start_containerd()

    def import_image(self, archive: Path) -> None:
        """Add an image by its archive, in the format of ``docker save`` or of the OCI."""
        with archive.open("rb") as content:
            self.run(*CTR, "images", "import", "-", stdin=content)

    def join(self, kubeconfig: Callable[[str], Mapping[str, Any]]) -> None:
        """Start what makes it a node of a cluster; ``kubeconfig`` makes that of a user."""
        self.write("/etc/resolv.conf", "nameserver 192.0.2.53\n")
        self.write("/etc/kubernetes/kubelet.conf", json.dumps(kubeconfig(f"system:node:{self.name}")))
        self.write("/etc/kubernetes/kube-proxy.conf", json.dumps(kubeconfig("system:kube-proxy")))
        kubelet = kubelet_configuration(f"unix://{SOCKET}", "/etc/resolv.conf", self.cgroup)
        self.write("/etc/kubernetes/kubelet.json", json.dumps(kubelet | {"clusterDNS": ["10.96.0.10"]}))
        proxy = proxy_configuration(self._mode, self.name, "/etc/kubernetes/kube-proxy.conf", POD_NETWORKS)
        self.write("/etc/kubernetes/kube-proxy.json", json.dumps(proxy))
        self._start(
            "kubelet", "--config=/etc/kubernetes/kubelet.json", "--kubeconfig=/etc/kubernetes/kubelet.conf",
            f"--hostname-override={self.name}", f"--node-ip={self.ip4},{self.ip6}",
        )  # fmt: skip
        self._start_kube_proxy()

    def _start_kube_proxy(self) -> None:
        self._start("kube-proxy", "--config=/etc/kubernetes/kube-proxy.json")

    def restart_kube_proxy(self) -> None:
        """Kill it, and start it again: then it writes all that it has, whatever is there."""
        self.programs["kube-proxy"].kill()
        self._start_kube_proxy()
