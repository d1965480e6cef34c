from __future__ import annotations

from typing import TYPE_CHECKING

from lab import CLIENT4, NODE4
from resident import Resident, launcher
from runtimes.containerd import Containerd, mapped, port

if TYPE_CHECKING:
    from pathlib import Path

WITHOUT_IT = 'if os.environ["CNI_COMMAND"] in {"ADD", "DEL", "CHECK"}: sys.modules["cni_hostport.skel"] = None'


def test_sandboxes_start_and_stop_by_the_resident_process(containerd: Containerd, tmp_path: Path) -> None:
    node, usual = containerd.host.node, containerd.executable.read_text()
    with Resident(tmp_path / "socket") as resident:
        [executable] = launcher(tmp_path, resident.path, "import os", WITHOUT_IT)
        containerd.replace_plugin(f"#!/bin/sh\nexec {executable}\n")
        try:
            first = containerd.run("first", port(8080), port(0, 9090), port(5353, 53, "UDP"))
            second = containerd.run("second", port(8081))
            first.namespace.serve("tcp", 80, "first")
            first.namespace.serve("udp", 53, "dns")
            second.namespace.serve("tcp", 80, "second")
            assert node.client.ask("tcp", NODE4, 8080) == f"first {CLIENT4}"
            assert node.client.ask("udp", NODE4, 5353) == f"dns {CLIENT4}"
            assert node.client.ask("tcp", NODE4, 8081) == f"second {CLIENT4}"
            containerd.stop(first)
            containerd.stop(second)
            assert mapped(node) == []
        finally:
            containerd.replace_plugin(usual)
