"""The plugins that are compared, and a node that runs one of them as a black box."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compare.expect import fall_short, succeeded
from go_tools import TOOLS
from lab import LAUNCHER, Node, config

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping, Sequence

    from lab import Outcome, Pod

PORTMAP = TOOLS / "portmap"


@dataclass(frozen=True, eq=False)
class Plugin:
    """An executable, the keys of a network configuration that select it, and how it writes a source condition."""

    name: str
    launcher: Sequence[str]
    keys: Mapping[str, Any]
    source_condition: Sequence[str] = ("ip", "saddr")
    foreign_condition: Sequence[str] = ("-s", "192.0.2.2")


IN_PATH = ("env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
REFERENCE = (*IN_PATH, str(PORTMAP))
PLUGINS = (
    Plugin(
        "portmap-iptables", REFERENCE, {"type": "portmap", "backend": "iptables"}, ("-s",), ("ip", "saddr", "192.0.2.2")
    ),
    Plugin("portmap-nftables", REFERENCE, {"type": "portmap", "backend": "nftables"}),
    Plugin("hostport", LAUNCHER, {"type": "hostport"}),
)


class Bench(Node):
    """A node whose runtime calls one plugin, and like libcni remembers for DEL what it called ADD with."""

    def __init__(self, plugin: Plugin) -> None:
        super().__init__(plugin.launcher)
        self.plugin = plugin
        self._added: dict[str, dict[str, Any]] = {}

    def start(
        self, command: str, pod: Pod | None, config: Mapping[str, Any], **variables: str
    ) -> subprocess.Popen[str]:
        return super().start(command, pod, {**config, **self.plugin.keys}, **variables)

    def swap(self, plugin: Plugin) -> None:
        """Have the runtime call another plugin from now on."""
        self.plugin, self.launcher = plugin, plugin.launcher

    def attempt(self, pod: Pod, *mappings: Mapping[str, Any], **keys: Any) -> Outcome:
        """ADD, which may fail."""
        self._added[pod.id] = config(pod, *mappings, **keys)
        return self.cni("ADD", pod, self._added[pod.id])

    def add(self, pod: Pod, *mappings: Mapping[str, Any], **keys: Any) -> Outcome:
        return succeeded(self.attempt(pod, *mappings, **keys), "ADD")

    def check(self, pod: Pod, *mappings: Mapping[str, Any], **keys: Any) -> Outcome:
        return self.cni("CHECK", pod, config(pod, *mappings, **keys))

    def arguments(self, pod: Pod, **keys: Any) -> dict[str, Any]:
        """Return the configuration of the pod's ADD with other values for some keys, or without those that are None."""
        merged = {**self._added[pod.id], **keys}
        return {key: value for key, value in merged.items() if value is not None}

    def delete(self, pod: Pod, **keys: Any) -> Outcome:
        return succeeded(self.cni("DEL", pod, self.arguments(pod, **keys)), "DEL")

    def web(self, *families: int, name: str = "web", **place: Any) -> Pod:
        """Add a pod that answers as ``name`` on ports 80 and 81, TCP and UDP."""
        pod = self.pod(*families, **place)
        for protocol in ("tcp", "udp"):
            for port in (80, 81):
                pod.serve(protocol, port, name if port == 80 else f"{name}-{port}")
        return pod

    def condition(self, source: str) -> list[str]:
        """Return the tokens that limit a mapping to clients from ``source``, in this plugin's back end's words."""
        return [*self.plugin.source_condition, source]

    def confined(self, *prefix: str) -> None:
        """Start the plugin by another program from now on."""
        self.launcher = [*prefix, *self.launcher]

    def expect_foreign(self, table: str) -> None:
        """See that the table of another program is as that program made it."""
        if self.run("nft", "list", "table", "inet", "foreign", check=False).stdout != table:
            fall_short("a foreign table is changed")
