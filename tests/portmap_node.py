"""Nodes whose pods are set up by the reference plugin portmap, in each of its back ends, and what those leave there."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from compare.plugins import PLUGINS, PORTMAP, Bench, Plugin
from go_tools import unavailable
from lab import CLIENT4, CLIENT6, NODE4, NODE6, Pod, mapping, require

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

IPTABLES, NFTABLES, HOSTPORT = PLUGINS
LEGACY = replace(IPTABLES, name="portmap-iptables-legacy")
# addresses that no other test's pods have: those count as well
NUMBER = os.getpid()
PREFIX4, PREFIX6 = f"10.{128 + NUMBER % 128}.{NUMBER >> 7 & 255}", f"fd01:{NUMBER & 0xFFFF:x}"
FOREIGN = """
add table ip foreign
add chain ip foreign c
add rule ip foreign c tcp dport 8080 counter comment "foreign"
add table ip6 foreign
add chain ip6 foreign c
add rule ip6 foreign c tcp dport 8080 counter comment "foreign"
"""


def on_every_back_end() -> Any:
    """Return a fixture: a node whose runtime calls portmap, and that others' rules are on."""

    @pytest.fixture(name="node", params=[NFTABLES, IPTABLES, LEGACY], ids=lambda plugin: plugin.name)
    def made(request: pytest.FixtureRequest, _kernel: None, tmp_path: Path) -> Iterator[Bench]:
        require(shutil.which("iptables"), "needs the program iptables")
        require(not (need := unavailable("plugins", "portmap")), f"needs {need}")
        with Bench(_with_legacy_iptables(tmp_path) if request.param is LEGACY else request.param) as node:
            node.bridge("cni9", f"{PREFIX4}.1/24", f"{PREFIX6}::1/64")
            node.client.ip(f"route add default via {NODE4}", f"route add default via {NODE6}")
            node.nft_file(FOREIGN)
            yield node

    return made


def _with_legacy_iptables(directory: Path) -> Plugin:
    legacy = shutil.which("xtables-legacy-multi")
    require(legacy, "needs legacy iptables")
    for program in ("iptables", "ip6tables"):
        (directory / program).symlink_to(legacy or "")
    return replace(LEGACY, launcher=["env", f"PATH={directory}", str(PORTMAP)])


def place(number: int) -> dict[str, Any]:
    """Return where on the node the pod of a number is."""
    addresses, gateways = [f"{PREFIX4}.{number}/24", f"{PREFIX6}::{number:x}/64"], [f"{PREFIX4}.1", f"{PREFIX6}::1"]
    return {"addresses": addresses, "gateways": gateways, "bridge": "cni9"}


def web(node: Bench, number: int, host_port: int) -> Pod:
    """Add a pod that answers as its host port on ports 80 and 81, and has three host ports."""
    pod = node.web(name=str(host_port), **place(number))
    node.add(pod, *mappings(host_port))
    return pod


def mappings(host_port: int) -> list[dict[str, Any]]:
    return [mapping(host_port), mapping(host_port, 81, "udp"), mapping(host_port + 1, hostIP=NODE4)]


def answers(node: Bench, host_port: int, name: str = "") -> bool:
    """Tell whether a pod answers on all of its host ports."""
    name = name or str(host_port)
    return (
        node.client.ask("tcp", NODE4, host_port) == f"{name} {CLIENT4}"
        and node.client.ask("tcp", NODE6, host_port) == f"{name} {CLIENT6}"
        and node.client.ask("udp", NODE4, host_port) == f"{name}-81 {CLIENT4}"
        and node.client.ask("tcp", NODE4, host_port + 1) == f"{name} {CLIENT4}"
        and node.ask("tcp", "127.0.0.1", host_port).startswith(f"{name} ")
    )


def flavour(node: Bench) -> str:
    """Return which iptables the node has rules of."""
    return "legacy" if "legacy" in node.plugin.name else "nft"


def everything(node: Bench, *, but: str = "") -> list[str]:
    """Return the lines of all rules of the node, without counters' values, and without those that close a block.

    One table can be left out, by its family and name.
    """
    listed = node.nft("-s list ruleset")
    lines = re.sub(rf"^table {but} {{.*?^}}$", "", listed, flags=re.DOTALL | re.MULTILINE).splitlines()
    for program in ("iptables", "ip6tables"):
        for item in ("nft", "legacy"):
            lines += node.run(f"{program}-{item}-save", "-t", "nat").stdout.splitlines()
    uncounted = [re.sub(r"\[\d+:\d+\]|counter packets \d+ bytes \d+", "", line) for line in lines if line[:1] != "#"]
    return [line for line in uncounted if line.strip() not in {"", "}"}]


def portmaps(node: Bench) -> list[str]:
    """Return the lines of all rules but this plugin's."""
    return everything(node, but="inet hostport")


def traces(node: Bench, pods: Sequence[Pod], ports: str) -> list[str]:
    """Return regular expressions for what only these pods' rules hold."""
    comments = [f'id: \\"{pod.id}\\"' for pod in pods]
    jumps = [line for line in everything(node) if any(comment in line for comment in comments)]
    addresses = [re.escape(address) for pod in pods for address in (pod.ip4, pod.ip6)]
    return [*(pod.id for pod in pods), *addresses, *(line.rpartition(" ")[2] for line in jumps), rf"dport {ports}"]


def without(lines: list[str], patterns: list[str]) -> list[str]:
    """Return the lines that match none of the regular expressions."""
    return [line for line in lines if not any(re.search(rf"{pattern}(?![\w.])", line) for pattern in patterns)]
