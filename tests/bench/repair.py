"""How long the commands for people take on a node with many pods: ``restore``, ``list`` and ``doctor``.

The pods are real as far as these look: each has a network namespace with an ``eth0``, whose other end is on the node,
with a host route, as of ptp or Calico (a bridge takes 1,023 ports at most). They are mounted in a mount namespace of
this part's own thread, so that all of it goes when the thread ends. A pod takes about 5 ms to make.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from bench.contenders import FIRST_PORT, median
from bench.markdown import table
from lab import CLONE_NEWNET, LIBC, Node, mapping
from libcni_cache import CAPABLE, Cache
from pyroute2 import IPRoute

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from bench.contenders import Installation
    from lab import Pod

CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 0x1000, 0x4000, 0x40000, 2
ROUNDS = 3
Times = dict[tuple[str, int], float]  # command, pods: median in seconds


@dataclass
class _Pod:
    """What ``Cache`` has to know of a pod."""

    directory: Path
    number: int

    @property
    def id(self) -> str:
        return f"{self.number:064x}"

    @property
    def path(self) -> str:
        return str(self.directory / f"cni-{self.number}")

    @property
    def host_end(self) -> str:
        return f"veth{self.number}"

    @property
    def ip4(self) -> str:
        return f"10.99.{self.number >> 8}.{self.number & 255}"

    @property
    def addresses(self) -> list[str]:
        return [f"{self.ip4}/32"]


def measure(installation: Installation, options: argparse.Namespace) -> Times:
    """Raise the number of pods, and at each run the commands some times after a flush of the ruleset."""
    with ThreadPoolExecutor(1, initializer=_leave_mounts) as own:
        return own.submit(_measure, str(installation.machine.executable), options).result()


def _leave_mounts() -> None:
    _must(LIBC.unshare(CLONE_NEWNS))
    _must(LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))


def _must(status: int) -> None:
    if status:
        raise OSError


def _measure(executable: str, options: argparse.Namespace) -> Times:
    figures: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as top, Node() as node, ExitStack() as stack:
        pods, conf, cache = Path(top, "pods"), Path(top, "conf"), Cache(Path(top, "cni"))
        pods.mkdir()
        _must(LIBC.mount(b"pods", str(pods).encode(), b"tmpfs", 0, None))
        stack.callback(LIBC.umount2, str(pods).encode(), MNT_DETACH)
        conflist = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}, CAPABLE]}
        conf.mkdir()
        (conf / "10-pods.conflist").write_text(json.dumps(conflist))
        places = [f"--cache-dir={cache.directory}"]
        commands = {
            "restore": ["restore", "--watch=0", *places],
            "restore again": ["restore", "--watch=0", *places],
            "list": ["list"],
            "doctor": ["doctor", f"--conf-dir={conf}", *places],
        }
        present = 0
        for size in sorted(options.attachments):
            _add_pods(node, cache, [_Pod(pods, number) for number in range(present, size)])
            present = size
            for _ in range(min(options.rounds, ROUNDS)):
                node.nft("flush ruleset")
                for command, arguments in commands.items():
                    with node.inside():
                        took = _seconds([executable, *arguments])
                    figures.setdefault((command, size), []).append(took)
    return {key: median(values) for key, values in figures.items()}


def _add_pods(node: Node, cache: Cache, pods: Sequence[_Pod]) -> None:
    """Make the network namespaces of pods, connect them, and note them in the runtime's cache."""
    with node.inside():
        routing = IPRoute()
    with routing, Path(node.path).open() as node_file, Path("/proc/thread-self/ns/net").open() as own:
        for pod in pods:
            _must(LIBC.unshare(CLONE_NEWNET))
            Path(pod.path).touch()
            _must(LIBC.mount(b"/proc/thread-self/ns/net", pod.path.encode(), None, MS_BIND, None))
            with IPRoute() as inner:
                peer = {"ifname": pod.host_end, "net_ns_fd": node_file.fileno()}
                inner.link("add", ifname="eth0", kind="veth", peer=peer, state="up")
                inner.addr("add", index=inner.link_lookup(ifname="eth0")[0], address=pod.ip4, prefixlen=32)
            (index,) = routing.link_lookup(ifname=pod.host_end)
            routing.link("set", index=index, state="up")
            routing.route("add", dst=f"{pod.ip4}/32", oif=index)
            cache.add(cast("Pod", pod), mapping(FIRST_PORT + pod.number))
        _must(LIBC.setns(own.fileno(), CLONE_NEWNET))


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    took = time.perf_counter() - started
    if ran.returncode:
        sys.exit(f"{command} failed: {ran.stdout} {ran.stderr}")
    return took


def report(times: Times) -> str:
    """Return the medians as Markdown."""
    sizes = sorted({size for _, size in times})
    lines = [
        "Seconds of the commands for people, by pods with one mapping each; the ruleset is flushed before `restore`.",
        "",
    ]
    commands = dict.fromkeys(command for command, _ in times)
    rows = [[command, *(f"{times[command, size]:.2f}" for size in sizes)] for command in commands]
    return "\n".join([*lines, *table(["command", *(f"{size:,}" for size in sizes)], rows)])
