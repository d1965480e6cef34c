"""Upstream's conformance test of host ports, with the network that the cluster has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from go_tools import TOOLS

if TYPE_CHECKING:
    from cluster.cluster import Cluster

NAME = "validates that there is no conflict between pods with same hostPort but different hostIP and protocol"


def test_upstreams_conformance_test_of_host_ports_passes(cluster: Cluster) -> None:
    ran = cluster.client.run(
        TOOLS / "e2e", f"--kubeconfig={cluster.control.kubeconfig}", "--provider=skeleton", "--ginkgo.no-color",
        f"--ginkgo.focus=HostPort {NAME}", check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert "Ran 1 of 1 Specs" in ran.stdout
