"""This plugin's DaemonSet in a cluster."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from go_tools import ROOT

from cluster.cluster import LONG

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.cluster import Cluster
    from cluster.machine import Machine

MANIFESTS = ROOT / "conf" / "kubernetes"
AGENTS = ("--namespace=kube-system", "--selector=app.kubernetes.io/name=hostport")
OURS = "/etc/cni/net.d/01-hostport.conflist"


def roll_out(cluster: Cluster, directory: Path) -> None:
    """Apply manifests, and wait until they are in force on both nodes."""
    cluster.kubectl("apply", "--kustomize", directory)
    wait_for_roll_out(cluster)


def wait_for_roll_out(cluster: Cluster) -> None:
    """Wait until the newest DaemonSet is in force."""
    told = cluster.kubectl("rollout", "status", "daemonset/hostport", "--namespace=kube-system", f"--timeout={LONG}s")
    assert "successfully rolled out" in told, told + cluster.story()


def overlay(directory: Path, base: str, **keys: Any) -> Path:
    """Return a kustomization with these ``keys`` over a directory of the manifests, as an operator's own would be."""
    directory.mkdir(exist_ok=True)
    # kustomize wants relative paths
    relative = (MANIFESTS / base).relative_to("/")
    above = "/".join([".."] * (len(directory.parts) - 1))
    (directory / "kustomization.yaml").write_text(json.dumps({"resources": [f"{above}/{relative}"], **keys}))
    return directory


def containers(cluster: Cluster) -> dict[tuple[Machine, str], str]:
    """Return the IDs of the DaemonSet's containers by their nodes and names."""
    nodes = {node.name: node for node in cluster.nodes}
    return {
        (nodes[pod["spec"]["nodeName"]], status["name"]): status["containerID"].removeprefix("containerd://")
        for pod in cluster.get("pods", *AGENTS)
        for status in pod["status"]["containerStatuses"]
    }


def flush(node: Machine) -> None:
    """Delete the plugin's table, as ``nft flush ruleset`` does among others."""
    with node.namespace.inside():
        from cni_hostport.kernel.nft import Nft

        Nft().run(["delete table inet hostport"])
