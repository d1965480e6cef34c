"""What the cluster is before hostport is installed on it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from cluster.cluster import pod, port

if TYPE_CHECKING:
    from cluster.cluster import Cluster

PRESENT = "for name in python3 nft; do command -v $name; done; find / -xdev -name 'libnftables*' -o -name 'libpython*'"


def test_the_second_node_has_no_python_and_no_libnftables(cluster: Cluster) -> None:
    one, two = (node.run("sh", "-c", PRESENT, check=False).stdout for node in cluster.nodes)
    assert "python3" in one
    assert "libnftables" in one
    assert two == ""


def test_pods_are_reached_by_their_host_ports_at_the_addresses_of_their_node(cluster: Cluster) -> None:
    with cluster.running(*(pod(f"web-{node.number}", port(8080), node=node) for node in cluster.nodes)):
        for node in cluster.nodes:
            for address in (node.ip4, node.ip6):
                assert cluster.answer(address, 8080) == f"web-{node.number}"
    for node in cluster.nodes:
        cluster.wait_for(partial(cluster.client.is_silent, "tcp", node.ip4, 8080))
        assert node.failed_calls() == []


def test_the_scheduler_lets_a_second_pod_wait_for_a_port_that_is_taken(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    second = pod("second", port(8080), node=node)
    with cluster.running(pod("first", port(8080), node=node)):
        cluster.apply(second)
        cluster.wait_for(lambda: "free ports" in cluster.kubectl("describe", "pod/second"))
    cluster.wait_until("condition=Ready", "pod/second")
    assert cluster.answer(node.ip4, 8080) == "second"
    cluster.delete(second)


def _is_balanced(cluster: Cluster, address: str) -> bool:
    return {cluster.answer(address, 30080) for _ in range(10)} == {"web-1", "web-2"}


def test_services_of_type_node_port_lead_to_pods_of_both_nodes(cluster: Cluster) -> None:
    pods = [pod(f"web-{node.number}", node=node) for node in cluster.nodes]
    for made in pods:
        made["metadata"]["labels"] = {"serves": "web"}
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"type": "NodePort", "selector": {"serves": "web"}, "ports": [{"port": 80, "nodePort": 30080}],
            "ipFamilyPolicy": "RequireDualStack"},
    }  # fmt: skip
    cluster.apply(service)
    with cluster.running(*pods):
        for node in cluster.nodes:
            for address in (node.ip4, node.ip6):
                cluster.wait_for(partial(_is_balanced, cluster, address))
    cluster.delete(service)
