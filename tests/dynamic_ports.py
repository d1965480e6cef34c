"""Containers that ask for dynamic host ports, and what they are given, as nft lists it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import scratch

from cni_hostport.dynamic_ports import keys

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lab import Namespace, Node, Pod

FILES = Path("/run/hostport/pods")
OWN = f"hp{os.getpid():x}-"  # what the names of pods begin with in this process, as in ``lab``
RANGE = "40000-40063"
PORTS = range(40000, 40064)
BARE = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}


def asking(text: str, *mappings: Mapping[str, Any], by: str = "annotation", **more: Any) -> dict[str, Any]:
    """Return the keys of a configuration by which a container asks for ports."""
    runtime: dict[str, Any] = {}
    if by in {"annotation", "both"}:
        runtime[keys.ANNOTATIONS] = {"other": "x", keys.REQUEST: text}
    if by in {"capability", "both"}:
        runtime[keys.CAPABILITY] = text
    if mappings:
        runtime["portMappings"] = list(mappings)
    return {"waitForHolder": 0, "dynamicPorts": RANGE, "runtimeConfig": runtime, **more}


def given(node: Node | None = None) -> dict[str, dict[str, int]]:
    """Return the host ports of all pods by what they asked for, on a node or where this process is.

    A port of both families has to be the same.
    """
    command = ["nft", "-j", "list", "map", "inet", "hostport", "dynamic_ports"]
    within = ["nsenter", f"--net={node.path}"] if node else []
    listed = subprocess.run([*within, *command], check=False, capture_output=True, text=True).stdout
    found: dict[str, dict[str, int]] = {}
    for item in json.loads(listed)["nftables"] if listed else ():
        for element, _ in item.get("map", {}).get("elem", ()):
            request, _, pod = element["elem"]["comment"].partition(" ")
            port = element["elem"]["val"]["concat"][2]
            if found.setdefault(pod, {}).setdefault(request, port) != port:
                raise AssertionError(listed)
    return found


def name(number: int) -> str:
    """Return the ID of a container of ``run``."""
    return f"{OWN}{number}"


def run(command: str, number: int, text: str = "", *mappings: Mapping[str, Any], **more: Any) -> list[str]:
    """Run an operation in this process for a container that asks for ports, and return the lines that it logs."""
    addresses = f"10.{number >> 8}.{number & 255}.2/24", f"fd00:1::{number + 1:x}/64"
    asked = asking(text, *mappings, **more)
    return scratch.run(command, container=name(number), **{"addresses": addresses, **asked})


def port(number: int, request: str = "80/tcp") -> int:
    """Return what a container of ``run`` was given."""
    return given()[name(number)][request]


def told(pod: Pod | str) -> dict[str, Any]:
    """Return what a pod finds in its file, nothing where it has none."""
    file = FILES / (pod if isinstance(pod, str) else pod.id) / "dynamic-ports.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def noted(pod: Namespace, ifname: str = "eth0") -> str:
    """Return the note that a pod's interface carries."""
    shown = subprocess.run(["ip", "-n", pod.name, "-j", "link", "show", ifname], check=True, capture_output=True)
    return str(json.loads(shown.stdout)[0].get("ifalias", ""))
