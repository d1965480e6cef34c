"""The executables that are compared, and the nodes they run on."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from go_tools import TOOLS, unavailable
from lab import Node, config, mapping

from cni_hostport.attachment import Attachment
from cni_hostport.config import NetworkConfig
from cni_hostport.dynamic_ports.keys import CAPABILITY
from cni_hostport.kernel.nft import Nft
from cni_hostport.ruleset import base
from cni_hostport.ruleset.commands import attach_commands
from cni_hostport.ruleset.plan import Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from installation import Machine
    from lab import Pod

WARM, COLD, NFTABLES, IPTABLES = "hostport warm", "hostport cold", "portmap nftables", "portmap iptables"
WARM_PYTHON = "hostport warm, in Python"  # as it is installed where there is no C compiler
OURS = (WARM, WARM_PYTHON, COLD)
PAUSE = 0.06  # seconds before each call, in which what earlier ones left to the kernel is done
PAUSES = {"ADD": PAUSE, "DEL": 0.4}  # where what an ADD leaves to be done after its answer would disturb the next call
FIRST_PORT = 1024  # of the pods that are there
PAPER_NETNS = "/run/netns/paper"
COMMANDS = ("ADD", "CHECK", "DEL")


@dataclass
class Contender:
    """A way to map host ports: a command, and the keys of a network configuration that select it."""

    name: str
    command: list[str]
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.name in OURS

    def fill(self, node: Node, count: int) -> None:
        """Put so many pods with one mapping each on a node; they exist in its ruleset only."""
        calls = [(f"paper{number}", _paper(number, FIRST_PORT + number)) for number in range(count)]
        if self.is_ours:
            with node.inside():
                _attach_all(calls)
            return
        for container, call in calls:
            run(self, node, "ADD", (container, PAPER_NETNS), {**call, **self.keys})


def _paper(number: int, *ports: int) -> dict[str, Any]:
    """Return the ADD of a pod that only exists in requests, on a network that nothing leads to."""
    address = f"10.99.{number >> 8}.{number & 255}/16"
    return {
        "cniVersion": "1.0.0",
        "name": "pods",
        "snat": False,
        "runtimeConfig": {"portMappings": [mapping(port) for port in ports]},
        "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": address}]},
    }


def fill_range(node: Node, ports: Sequence[int], request: str) -> None:
    """Put as many pods on a node, each with one of these ports as a dynamic one; they exist in its ruleset only."""
    asking = {"runtimeConfig": {CAPABILITY: request}}
    with node.inside():
        _attach_all(
            [(f"paper{number}", {**_paper(number), **asking}) for number in range(len(ports))],
            [{request: port} for port in ports],
        )


def _attach_all(calls: Sequence[tuple[str, dict[str, Any]]], assigned: Sequence[dict[str, int]] = ()) -> None:
    """Install all, with the dynamic host ports that are ``assigned`` to each, if there are some."""
    nft, at_once = Nft(), 100
    nft.run(base.base_commands())
    for start in range(0, len(calls), at_once):
        commands = []
        for number, (container, call) in enumerate(calls[start : start + at_once], start):
            parsed = NetworkConfig.parse(call)
            attachment = Attachment("pods", container, "eth0", PAPER_NETNS)
            request = Request(parsed, parsed.prev_result.addresses("eth0"))
            commands += attach_commands(attachment, request.plan(assigned[number] if assigned else None))
        nft.run(commands)


def fill_with_few_pods(contender: Contender, node: Node, mappings: int) -> None:
    """Give a node this many mappings of few other pods, by the contender's own ADD."""
    item = 500
    for number in range(0, mappings, item):
        ports = range(FIRST_PORT + number, FIRST_PORT + min(number + item, mappings))
        call = {**_paper(number // item, *ports), **contender.keys}
        run(contender, node, "ADD", (f"paper{number}", PAPER_NETNS), call)


def run(contender: Contender, node: Node, command: str, pod: tuple[str, str], call: Mapping[str, Any]) -> float:
    """Run one call for a pod, (container ID, namespace path), on a node and return its milliseconds."""
    with node.inside():
        return timed(contender.command, json.dumps(call).encode(), environment(command, *pod))


def environment(command: str, container: str, netns: str) -> dict[str, str]:
    """Return the variables of a call."""
    return {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container,
        "CNI_NETNS": netns,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }


def timed(command: list[str], stdin: bytes, environment: Mapping[str, str]) -> float:
    """Run a command, and return its milliseconds from before its start until it has ended and closed its output."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    stdout, stderr = process.communicate(stdin)
    took = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{command} failed: {stdout!r} {stderr!r}")
    return took * 1000


def call_for(contender: Contender, pod: Pod, *mappings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pod's network configuration, of a version that every contender has CHECK for."""
    return {**config(pod, *mappings), "cniVersion": "1.0.0", **contender.keys}


@dataclass
class Installation:
    """An installed hostport, cold and warm, in directories of its own."""

    machine: Machine
    resident_id: int = 0  # of the resident process, while that runs

    @property
    def socket(self) -> Path:
        return self.machine.top / "hostport.sock"

    @property
    def interpreter(self) -> str:
        return str(self.machine.python_executable.with_name("python"))

    @cached_property
    def cold(self) -> dict[str, Path]:
        """Executables that find no resident process, by their kind."""
        return self.machine.executables(self.machine.top / "absent")

    @cached_property
    def contenders(self) -> list[Contender]:
        """All that can run here."""
        warm = self.machine.executables(self.socket)
        ours = [
            Contender(WARM, [str(warm["native"])]),
            Contender(WARM_PYTHON, [str(warm["Python"])]),
            Contender(COLD, [str(self.cold["native"])]),
        ]
        portmap = portmap_executable()
        if portmap is None:
            return ours
        theirs = ((NFTABLES, "nftables"), (IPTABLES, "iptables"))
        return ours + [Contender(name, [str(portmap)], {"backend": backend}) for name, backend in theirs]

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Have the resident process run."""
        command = [str(self.machine.executable), "serve", str(self.socket)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CNI_")}
        with subprocess.Popen(command, env=environment) as process:
            try:
                while not self.socket.exists():
                    if process.poll() is not None:
                        sys.exit("the resident process did not start")
                    time.sleep(0.05)
                time.sleep(0.5)
                self.resident_id = process.pid
                yield
            finally:
                process.kill()


def portmap_executable() -> Path | None:
    """Return the newest portmap that can be had: one that Go builds, or the distribution's."""
    if not unavailable("plugins", "portmap"):
        return TOOLS / "portmap"
    packaged = [Path(directory, "portmap") for directory in ("/usr/lib/cni", "/usr/libexec/cni")]
    return next((path for path in packaged if path.exists()), None)


def portmap_version() -> str:
    """Return the release of the portmap that is compared, as far as it can be told."""
    portmap = portmap_executable()
    if portmap is None:
        return "no portmap: tests/build-tools.sh plugins builds it"
    if shutil.which("go"):
        about = subprocess.run(["go", "version", "-m", portmap], capture_output=True, text=True, check=True).stdout
        found = re.search(r"\tmod\t\S+\tv(\S+)", about)
        if found:
            return f"portmap {found[1]}"
    return subprocess.run([portmap], env={}, capture_output=True, text=True, check=False).stderr.partition("\n")[0]


def median(values: list[float]) -> float:
    """Return the median, NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def interval(values: list[float]) -> tuple[float, float]:
    """Return within which values the true median lies in 95 of 100 cases, by the binomial distribution of ranks."""
    ordered, half_width = sorted(values), 0.98 * len(values) ** 0.5
    low = max(0, round(len(values) / 2 - half_width) - 1)
    return ordered[low], ordered[-1 - low]
