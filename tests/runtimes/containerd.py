"""A containerd on a node, and the sandboxes that a kubelet would ask it for."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dynamic_ports
from go_tools import ROOT, TOOLS
from lab import LAUNCHER
from runtimes import image
from runtimes.cri import CRI, CRIError
from runtimes.host import SYSTEM_PATH, wait_for

if TYPE_CHECKING:
    from lab import Node
    from runtimes.host import Host, Inside

CHAINED = ["bridge", "host-local", "loopback"]
DUAL, IPV4, REFUSED = "runc", "ipv4", "refused"  # runtime handlers, each with a network of its own; runc is the default
REFUSING = """#!/bin/sh
[ "$CNI_COMMAND" = ADD ] || exit 0
nft list map inet hostport hostports | grep -q ' 8080 ' && state=mapped || state=unmapped
printf '{"cniVersion": "1.0.0", "code": 111, "msg": "refused while 8080 was %s"}' "$state"
exit 1
"""


@dataclass(frozen=True)
class Generation:
    """A version of containerd: where its programs are, what CNI version it has, how its configuration is written."""

    name: str
    programs: Path
    cni_version: str
    config_version: int
    cri: str
    sandbox_image: str
    bin_dir: str


DEBIAN = Generation(
    "containerd-1.6", Path("/usr/bin"), "1.0.0", 2, "io.containerd.grpc.v1.cri",
    'sandbox_image = "{}"', 'bin_dir = "{}"',
)  # fmt: skip
NEWEST = Generation(
    "containerd-2", TOOLS, "1.1.0", 3, "io.containerd.cri.v1.runtime",
    '[plugins."io.containerd.cri.v1.images".pinned_images]\nsandbox = "{}"', 'bin_dirs = ["{}"]',
)  # fmt: skip


@dataclass
class Sandbox:
    """A pod's sandbox: its ID, the path of its network namespace on its host, and that namespace."""

    id: str
    netns: str
    namespace: Inside


def port(host_port: int, container_port: int = 80, protocol: str = "TCP", host_ip: str = "") -> dict[str, Any]:
    """One entry of a sandbox's ``port_mappings``."""
    return {"host_port": host_port, "container_port": container_port, "protocol": protocol, "host_ip": host_ip}


def mapped(node: Node) -> list[str]:
    """Return the host ports in a node's ruleset, sorted, such as ``ipv4 . tcp . 8080`` or ``192.0.2.1 . udp . 53``."""
    return sorted(re.findall(r"(\S+ \. (?:tcp|udp|sctp) \. \d+) counter comment", node.ruleset()))


def _write_script(path: Path, text: str) -> None:
    written = path.with_suffix(".new")
    written.write_text(text)
    written.chmod(0o755)
    written.rename(path)  # a program that is being run cannot be written to


class Containerd:
    """A containerd with configuration, state, socket, image and networks of its own, on a host."""

    def __init__(self, host: Host, generation: Generation, directory: Path, plugins: Path) -> None:
        self.host = host
        self.directory = directory
        self.generation = generation
        self.socket = directory / "containerd.sock"
        self.executable = directory / "bin" / "hostport"
        self.log = directory / "containerd.log"
        self._calls = directory / "calls"
        self._opened: list[Inside] = []
        host.node.ip("link del cni0")
        self._install_plugins(plugins)
        for number, name in enumerate((DUAL, IPV4, REFUSED)):
            self._write_network(name, 88 + number)
        (directory / "config.toml").write_text(self._config())
        self.start()
        image.write(directory / "image.tar")
        ctr = [str(generation.programs / "ctr"), f"--address={self.socket}", "--namespace=k8s.io"]
        host.run(*ctr, "images", "import", str(directory / "image.tar"))
        wait_for(lambda: self.cri.call("ImageStatus", image={"image": image.NAME}), self.log)

    def _install_plugins(self, plugins: Path) -> None:
        self.executable.parent.mkdir()
        for name in CHAINED:
            shutil.copy(plugins / name, self.executable.parent)
        record = f'echo "$CNI_CONTAINERID $CNI_COMMAND $CNI_NETNS" >>{self._calls}'
        _write_script(self.executable, f"#!/bin/sh\n{record}\nexec {' '.join(LAUNCHER)}\n")
        _write_script(self.executable.with_name("refusing"), REFUSING)

    def replace_plugin(self, script: str) -> None:
        """Put another script in the place of the plugin's executable."""
        _write_script(self.executable, script)

    def _write_network(self, name: str, number: int) -> None:
        """Write a shipped conflist with this containerd's CNI version, and a bridge and addresses of its own."""
        shipped = ROOT / "conf" / ("10-hostport-ipv4.conflist" if name == IPV4 else "10-hostport.conflist")
        text = shipped.read_text().replace("10.88.", f"10.{number}.").replace("fd00:88:", f"fd00:{number}:")
        conflist = json.loads(text)
        conflist |= {"cniVersion": self.generation.cni_version, "name": f"pods-{name}"}
        conflist["plugins"][0]["bridge"] = f"cni-{name}"
        conflist["plugins"][1]["dynamicPorts"] = dynamic_ports.RANGE
        if name == REFUSED:
            conflist["plugins"].append({"type": "refusing"})
        target = self.directory / name / shipped.name
        target.parent.mkdir()
        target.write_text(json.dumps(conflist))

    def _config(self) -> str:
        cri = f'plugins."{self.generation.cri}"'
        lines = [
            f"version = {self.generation.config_version}",
            "imports = []",
            'root = "/var/lib/containerd"',
            'state = "/run/containerd"',
            f'[grpc]\naddress = "{self.socket}"',
            '[plugins."io.containerd.internal.v1.opt"]\npath = "/var/lib/containerd/opt"',
            f"[{cri}]\nrestrict_oom_score_adj = true\ndisable_apparmor = true",
            self.generation.sandbox_image.format(image.NAME),
            f'[{cri}.cni]\nconf_dir = "{self.directory / DUAL}"',
            self.generation.bin_dir.format(self.executable.parent),
        ]
        for name in (DUAL, IPV4, REFUSED):
            lines += [
                f"[{cri}.containerd.runtimes.{name}]",
                f'runtime_type = "io.containerd.runc.v2"\ncni_conf_dir = "{self.directory / name}"',
            ]
        return "\n".join(lines)

    def start(self) -> None:
        """Start it, also again, and wait until it can run sandboxes."""
        self._program = self.host.start(
            "containerd", str(self.generation.programs / "containerd"), f"--config={self.directory / 'config.toml'}",
            log=self.log, environment={"PATH": f"{self.generation.programs}:{SYSTEM_PATH}"},
        )  # fmt: skip
        self.is_running = True
        self.cri = CRI(self.socket)
        wait_for(self.is_ready, self.log)

    def kill(self) -> None:
        """Kill it; its sandboxes run on, and calls under way fail."""
        self._program.kill()
        self.is_running = False
        self.cri.close()

    def conditions(self) -> dict[str, dict[str, Any]]:
        """Return the runtime's conditions, RuntimeReady and NetworkReady among them, by type."""
        return {condition["type"]: condition for condition in self.cri.call("Status")["status"]["conditions"]}

    def is_ready(self) -> bool:
        """Tell whether it can run sandboxes; while it starts, its socket is there before its services are."""
        try:
            conditions = self.conditions()
        except CRIError:
            return False
        return all(conditions[condition].get("status") for condition in ("RuntimeReady", "NetworkReady"))

    def run(self, name: str, *mappings: dict[str, Any], network: str = DUAL, **annotations: str) -> Sandbox:
        """Run a sandbox with these port mappings and annotations."""
        config = {
            "metadata": {"name": name, "uid": f"{name}-uid", "namespace": "test"},
            "hostname": name,
            "log_directory": f"/var/log/pods/{name}",
            "dns_config": {"servers": ["192.0.2.53"]},
            "port_mappings": mappings,
            "annotations": annotations,
            "linux": {"cgroup_parent": self.host.cgroup},
        }
        made = self.cri.call("RunPodSandbox", config=config, runtime_handler=network)
        return self.sandbox(made["pod_sandbox_id"])

    def sandbox(self, sandbox_id: str) -> Sandbox:
        """Return a running sandbox by its ID."""
        namespaces = self.info(sandbox_id)["runtimeSpec"]["linux"]["namespaces"]
        netns = next(namespace["path"] for namespace in namespaces if namespace["type"] == "network")
        self._opened.append(self.host.sandbox(netns))
        return Sandbox(sandbox_id, netns, self._opened[-1])

    def info(self, sandbox_id: str) -> dict[str, Any]:
        """Return what containerd tells of a sandbox beyond what a kubelet needs."""
        status = self.cri.call("PodSandboxStatus", pod_sandbox_id=sandbox_id, verbose=True)
        info: dict[str, Any] = json.loads(status["info"]["info"])
        return info

    def sandboxes(self) -> dict[str, str]:
        """Return the IDs of all sandboxes by the names of their pods."""
        items = self.cri.call("ListPodSandbox").get("items", [])
        return {item["metadata"]["name"]: item["id"] for item in items}

    def calls(self, sandbox: Sandbox) -> list[tuple[str, str]]:
        """Return the plugin's calls for a sandbox: command and namespace."""
        calls = [line.split(" ") for line in self._calls.read_text().splitlines()]
        return [(command, netns) for container, command, netns in calls if container == sandbox.id]

    def stop(self, sandbox: Sandbox) -> None:
        """Stop a sandbox: the runtime calls DEL."""
        self.cri.call("StopPodSandbox", pod_sandbox_id=sandbox.id)

    def remove(self, sandbox: Sandbox) -> None:
        """Remove a sandbox: the runtime calls DEL once more."""
        self.cri.call("RemovePodSandbox", pod_sandbox_id=sandbox.id)

    def clear(self) -> None:
        """Remove all sandboxes."""
        for opened in self._opened:
            opened.remove()
        self._opened.clear()
        for sandbox_id in self.sandboxes().values():
            self.cri.call("StopPodSandbox", pod_sandbox_id=sandbox_id)
            self.cri.call("RemovePodSandbox", pod_sandbox_id=sandbox_id)
