"""What ``hostport list`` says of a node, as JSON and as a table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lab import LAUNCHER, config

if TYPE_CHECKING:
    from lab import Node, Pod


def add(node: Node, pod: Pod, called: str, *mappings: dict[str, Any], **keys: Any) -> None:
    """ADD mappings for a pod that is called ``NAMESPACE/NAME``, or ``NAME``."""
    namespace, _, name = called.rpartition("/")
    args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}"
    added = node.cni("ADD", pod, config(pod, *mappings, **keys), ARGS=args)
    if added.status:
        raise AssertionError(added)


def listed(node: Node, *options: str) -> list[dict[str, Any]]:
    """Return the mappings."""
    ran = node.run(*LAUNCHER, "list", "--json", *options)
    if ran.stderr:
        raise AssertionError(ran.stderr)
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    return found


def shown(node: Node, *options: str) -> list[list[str]]:
    """Return the words of each line of the table."""
    return [line.split() for line in node.run(*LAUNCHER, "list", *options).stdout.splitlines()]


def hosts(node: Node, *options: str) -> list[str]:
    """Return the first column."""
    return [row[0] for row in shown(node, *options)[1:]]


def targets(node: Node, *options: str) -> dict[str, str]:
    """Return the second column by the first."""
    return {row[0]: row[1] for row in shown(node, *options)[1:]}
