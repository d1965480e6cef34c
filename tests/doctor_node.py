"""A node with network configurations and a cache, and the doctor who looks at it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import node_process
from libcni_cache import CAPABLE, Cache

from cni_hostport.operate.doctor import checks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lab import Node, Pod

    from cni_hostport.operate.statements import Statement


class Practice:
    """A node with configurations and a cache, and the doctor who looks at it."""

    def __init__(self, node: Node, directory: Path) -> None:
        self.node = node
        self.conf = directory / "net.d"
        self.conf.mkdir()
        self.cache = Cache(directory / "cache")
        self.configure("10-pods.conflist", {"type": "bridge"}, CAPABLE)

    def configure(self, name: str, *plugins: dict[str, Any]) -> Path:
        path = self.conf / name
        path.write_text(json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": plugins}))
        return path

    def running(self, *mappings: dict[str, Any], **keys: Any) -> Pod:
        """A pod that answers on port 80, added by a runtime with a cache."""
        pod = self.node.pod(**keys)
        pod.serve("tcp", 80, "web")
        self.node.add(pod, *mappings)
        self.cache.add(pod, *mappings)
        return pod

    def says(self, conf_dirs: Sequence[Path] = (), caches: Sequence[Path] = ()) -> list[Statement]:
        with node_process.on(self.node):
            return list(checks.examine(conf_dirs or [self.conf], caches or [self.cache.directory]))

    def finds(self, **places: Sequence[Path]) -> list[Statement]:
        return [say for say in self.says(**places) if say.status != "ok"]

    def finding(self, **places: Sequence[Path]) -> Statement:
        """The only finding; without the container that made it, the same node has none."""
        found = self.finds(**places)
        assert len(found) == 1, found
        (item,) = found
        assert item.meaning
        return item
