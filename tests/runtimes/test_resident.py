from __future__ import annotations

from typing import TYPE_CHECKING

from lab import CLIENT4, LAUNCHER, NODE4
from resident import PATIENT, launcher
from runtimes.containerd import Containerd, mapped, port
from runtimes.host import wait_for

if TYPE_CHECKING:
    from pathlib import Path

# a STATUS that containerd asks for is not for the resident process
WITHOUT_IT = 'if os.environ["CNI_COMMAND"] in {"ADD", "DEL", "CHECK"}: sys.modules["cni_hostport.skel"] = None'


def test_sandboxes_start_and_stop_by_the_resident_process(containerd: Containerd, tmp_path: Path) -> None:
    node, usual, path, log = (
        containerd.host.node,
        containerd.executable.read_text(),
        tmp_path / "socket",
        tmp_path / "log",
    )
    # it runs where the runtime does: it does not serve processes that have process IDs of their own
    resident = containerd.host.start("resident", *LAUNCHER, "serve", str(path), log=log, environment={})
    try:
        wait_for(path.exists, log)
        [executable] = launcher(tmp_path, path, "import os", WITHOUT_IT, *PATIENT)
        containerd.replace_plugin(f"#!/bin/sh\nexec {executable}\n")
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
        resident.kill()
