"""A kubelet without an API server, which runs the pods whose manifests lie in a folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from go_tools import TOOLS
from lab import NODE4
from runtimes import image
from runtimes.host import SYSTEM_PATH, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from runtimes.containerd import Containerd


def kubelet_configuration(endpoint: str, resolv_conf: str, cgroup: str) -> dict[str, Any]:
    """Return the configuration of a kubelet that asks the runtime at ``endpoint``, and lets everybody ask itself."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": endpoint,
        "resolvConf": resolv_conf,
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": [],
        "evictionHard": {"nodefs.available": "0%", "imagefs.available": "0%", "memory.available": "0%"},
        "failCgroupV1": False,
        "failSwapOn": False,
        "localStorageCapacityIsolation": False,
        "makeIPTablesUtilChains": False,
    }


def answering(name: str, *ports: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``spec`` of a pod with these ``ports``, which answers with a name on port 80."""
    server = ["/bin/busybox", "nc", "-ll", "-p", "80", "-e", "/bin/busybox", "echo", "-n", name]
    container = {"name": "main", "image": image.NAME, "imagePullPolicy": "Never", "command": server, "ports": ports}
    return {"automountServiceAccountToken": False, "terminationGracePeriodSeconds": 1, "containers": [container]}


class Kubelet:
    """A kubelet over a containerd, on the same host."""

    def __init__(self, containerd: Containerd, directory: Path) -> None:
        self.containerd = containerd
        self._directory = directory
        self._manifests = directory / "manifests"
        self._manifests.mkdir()
        self._log = directory / "kubelet.log"
        (directory / "resolv.conf").write_text("nameserver 192.0.2.53\n")
        static = {"staticPodPath": str(self._manifests), "fileCheckFrequency": "1s"}
        configuration = kubelet_configuration(
            f"unix://{containerd.socket}", str(directory / "resolv.conf"), containerd.host.cgroup
        )
        (directory / "config.json").write_text(json.dumps(configuration | static))
        containerd.host.start(
            "kubelet", str(TOOLS / "kubelet"), f"--config={directory / 'config.json'}",
            "--hostname-override=node", f"--node-ip={NODE4}",
            log=self._log, environment={"PATH": SYSTEM_PATH},
        )  # fmt: skip

    def add(self, name: str, *ports: dict[str, Any]) -> None:
        """Give it a pod with these ``ports``, which answers its own name on port 80."""
        metadata = {"name": name, "namespace": "test", "uid": f"{name}-uid"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": answering(name, *ports)}
        self.apply(name, json.dumps(pod))

    def apply(self, name: str, manifest: str) -> None:
        """Give it a pod by its manifest, in YAML or JSON."""
        written = self._directory / f"{name}.yaml"
        written.write_text(manifest)
        written.rename(self._manifests / written.name)  # it must not read half of it

    def remove(self, name: str) -> None:
        """Take a pod away."""
        (self._manifests / f"{name}.yaml").unlink()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds."""
        wait_for(condition, self._log)

    def sent_ports(self, name: str) -> list[int]:
        """Return the host ports that it asked the runtime for, of one of its pods."""
        sandboxes = self.containerd.sandboxes()
        info = self.containerd.info(next(id_ for pod, id_ in sandboxes.items() if pod.startswith(name)))
        return [mapping.get("host_port", 0) for mapping in info["config"]["port_mappings"]]
