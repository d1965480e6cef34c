"""A conflist run by cnitool on a node, with libcni's and host-local's files kept apart from the machine's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from lab import LAUNCHER

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from subprocess import CompletedProcess

    from lab import Namespace, Node

WITHIN_OWN_STATE = 'mkdir -p /var/lib/cni; mount --bind "$0" /var/lib/cni; exec "$@"'


@dataclass
class Chain:
    """The conflist named ``network`` in a directory, whose ``bin`` comes before the other folders of plugins."""

    node: Node
    tool: Path
    directory: Path
    plugins: str
    network: str

    @classmethod
    def make(cls, node: Node, tool: Path, plugin_dir: Path, directory: Path, conflist: Mapping[str, Any]) -> Self:
        """Lay out a conflist, hostport and the state's directory; its ``bridge`` plugin makes the bridge ``cni0``."""
        (directory / "state").mkdir()
        executable = directory / "bin" / "hostport"
        executable.parent.mkdir()
        executable.write_text("#!/bin/sh\nexec " + " ".join(LAUNCHER) + "\n")
        executable.chmod(0o755)
        node.ip("link del cni0")
        made = cls(node, tool, directory, f"{executable.parent}:{plugin_dir}", conflist["name"])
        made.configure(conflist)
        return made

    def configure(self, conflist: Mapping[str, Any]) -> None:
        """Write the conflist, in the place of the one before."""
        (self.directory / "10-chain.conflist").write_text(json.dumps(conflist))

    def run(
        self, command: str, container: Namespace | None, *mappings: Mapping[str, Any], **capabilities: Any
    ) -> CompletedProcess[str]:
        """Run cnitool with mappings and what else a runtime hands over.

        gc and status have no container, though cnitool wants to be given one.
        """
        return self.node.run(
            *("unshare", "--mount", "sh", "-c", WITHIN_OWN_STATE, str(self.directory / "state")),
            *("env", f"NETCONFPATH={self.directory}", f"CNI_PATH={self.plugins}"),
            f"CAP_ARGS={json.dumps({'portMappings': mappings, **capabilities})}",
            *(str(self.tool), command, self.network, container.path if container else "/var/run/netns/none"),
            check=False,
        )
