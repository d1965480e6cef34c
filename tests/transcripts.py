"""What the README shows of the operator's commands: a node with two pods, looked at before and after it is broken."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from go_tools import ROOT
from lab import LAUNCHER, NODE4, Node, config, mapping
from libcni_cache import Cache

if TYPE_CHECKING:
    from lab import Pod

CONTAINERS = {"web": "4f2a9c1e7b3055d1", "dns": "c81d03e6aa95f742"}
MAPPINGS = {"web": [mapping(8080), mapping(8443, 443)], "dns": [mapping(53, 53, "udp", hostIP=NODE4)]}
FIREWALL = "table inet firewall { chain forward { type filter hook forward priority filter; policy drop; }; }"


def transcripts() -> dict[str, str]:
    """Run the commands, and return each with what it prints, by its name."""
    with Node() as node, tempfile.TemporaryDirectory() as top:
        return _Console(node, Path(top)).transcripts()


class _Console:
    def __init__(self, node: Node, top: Path) -> None:
        self.node = node
        self.cache = Cache(top / "cni")
        self.conf = top / "net.d"
        self.pods = {name: node.pod(4) for name in CONTAINERS}
        self.conf.mkdir()
        self.configure(json.loads((ROOT / "conf" / "10-hostport-ipv4.conflist").read_text()))
        for name, pod in self.pods.items():
            self.run_pod(name, pod)

    def configure(self, conflist: object) -> None:
        (self.conf / "10-hostport.conflist").write_text(json.dumps(conflist))

    def run_pod(self, name: str, pod: Pod) -> None:
        pod.id = CONTAINERS[name]
        pod.serve("tcp", 80, name)
        args = f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name}"
        added = self.node.cni("ADD", pod, config(pod, *MAPPINGS[name]), ARGS=args)
        if added.status:
            raise AssertionError(added)
        self.cache.add(pod, *MAPPINGS[name], cniArgs=[argument.split("=") for argument in args.split(";")])

    def shown(self, command: str, *options: str) -> str:
        """Run a command of the executable, and return it with what it prints as on a node of its own."""
        _, *arguments = command.split()
        ran = self.node.run(*LAUNCHER, *arguments, *options, check=False)
        text = f"$ sudo {command}\n{ran.stdout}{ran.stderr}"
        for name, pod in self.pods.items():
            text = text.replace(pod.path, f"/run/netns/{name}")
        text = text.replace(str(self.conf), "/etc/cni/net.d")
        text = re.sub(r"\w+ \(process \d+\)", "nginx (process 4711)", text)
        return re.sub(r"Linux [^,]+, libnftables [\d.]+", "Linux 6.18, libnftables 1.0.6", text)

    def transcripts(self) -> dict[str, str]:
        caches, places = f"--cache-dir={self.cache.directory}", f"--conf-dir={self.conf}"
        for _ in range(3):
            self.node.client.ask("tcp", NODE4, 8080)
        shown = {"hostport list": self.shown("hostport list")}
        shown["hostport metrics"] = self.shown("hostport metrics")
        shown["hostport explain"] = self.shown("hostport explain 8080", caches)
        self.node.nft_file(FIREWALL)
        shown["hostport explain, dropped"] = self.shown("hostport explain 8443 --from 192.0.2.2", caches)
        conflist = json.loads((ROOT / "conf" / "10-hostport-ipv4.conflist").read_text())
        del conflist["plugins"][1]["capabilities"]
        self.configure(conflist)
        shown["hostport doctor"] = self.shown("hostport doctor", caches, places)
        self.node.nft("flush ruleset")
        restored = self.shown("hostport restore", caches)
        shown["hostport restore"] = f"$ sudo nft flush ruleset\n{restored}{self.shown('hostport list --pod web')}"
        return shown


if __name__ == "__main__":
    for name, text in transcripts().items():
        sys.stdout.write(f"<!-- {name} -->\n```text\n{text}```\n\n")
