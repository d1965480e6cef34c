"""libcni's cache, with entries as libcni writes them."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from lab import result

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lab import Pod

CAPABLE = {"type": "hostport", "capabilities": {"portMappings": True}}


class Cache:
    """A cache in a directory of the test's; entries can be given other keys than those of the newest libcni."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "results").mkdir(parents=True)

    def path(self, pod: Pod, network: str = "pods", ifname: str = "eth0") -> Path:
        return self.directory / "results" / f"{network}-{pod.id}-{ifname}"

    def add(
        self,
        pod: Pod,
        *mappings: Mapping[str, Any],
        network: str = "pods",
        ifname: str = "eth0",
        plugin: Mapping[str, Any] = CAPABLE,
        **keys: Any,
    ) -> Path:
        """Write what libcni writes after the last plugin's ADD, but at once: here the writer may have to wait."""
        conflist = {"cniVersion": "1.0.0", "name": network, "plugins": [{"type": "bridge"}, plugin]}
        entry = {
            "kind": "cniCacheV1",
            "containerId": pod.id,
            "config": base64.b64encode(json.dumps(conflist).encode()).decode(),
            "ifName": ifname,
            "networkName": network,
            "netns": pod.path,
            "cniArgs": [["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", pod.host_end]],
            "capabilityArgs": {"portMappings": list(mappings)},
            "result": result(*pod.addresses, sandbox=pod.path, version="1.0.0"),
            **keys,
        }
        path = self.path(pod, network, ifname)
        written = self.directory / path.name
        written.write_text(json.dumps({key: value for key, value in entry.items() if value is not None}))
        return written.rename(path)

    def remove(self, pod: Pod) -> None:
        """Do what libcni does after the last plugin's DEL."""
        self.path(pod).unlink()
