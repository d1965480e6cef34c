"""A cluster from portmap to this plugin and back, with what can happen meanwhile: these tests go in order."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import bundle
import pytest
from go_tools import TOOLS

from cluster.cluster import LONG, pod, port
from cluster.daemonset import AGENTS, MANIFESTS, OURS, containers, flush, overlay, roll_out
from cluster.images import REPOSITORY
from cluster.machine import CTR
from cluster.traffic import PodTraffic, PortTraffic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cluster.cluster import Cluster
    from cluster.machine import Machine

PRIMARY = "/etc/cni/net.d/10-containerd-net.conflist"
CONFORMANCE = "validates that there is no conflict between pods with same hostPort but different hostIP and protocol"
PROVOKED = "8090"  # the port that is refused


FOREIGN = "for name in python3 nft; do command -v $name; done; find / -xdev -name 'libnftables*' -o -name 'libpython*'"


def types(node: Machine, path: str) -> list[str]:
    return [plugin["type"] for plugin in json.loads(node.read(path))["plugins"]]


def files(node: Machine) -> list[str]:
    return node.run("ls", "-A", "/etc/cni/net.d").stdout.split()


def failures(cluster: Cluster) -> list[str]:
    """Return what containerd has logged of failed calls, except those that a test provoked."""
    return [call for node in cluster.nodes for call in node.failed_calls() if PROVOKED not in call]


def web(cluster: Cluster, prefix: str, host_port: int) -> list[dict[str, Any]]:
    return [pod(f"{prefix}-{node.number}", port(host_port), node=node) for node in cluster.nodes]


def answers(cluster: Cluster, host_port: int) -> list[str]:
    """Return what the nodes answer on a port, at all their addresses."""
    addresses = [address for node in cluster.nodes for address in (node.ip4, node.ip6)]
    return [cluster.client.ask("tcp", address, host_port) for address in addresses]


def try_answers(cluster: Cluster, host_port: int) -> list[str]:
    try:
        return answers(cluster, host_port)
    except OSError:
        return []


def both(prefix: str) -> list[str]:
    return [f"{prefix}-1", f"{prefix}-1", f"{prefix}-2", f"{prefix}-2"]


@pytest.fixture(scope="module")
def with_old_pods(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with pods that portmap gave their host ports."""
    with cluster.running(*web(cluster, "old", 8080)):
        yield cluster


@pytest.fixture(scope="module")
def rolled_out(with_old_pods: Cluster) -> Cluster:
    """The cluster, with this plugin on both nodes; pods of portmap's time run on."""
    with_old_pods.import_images(bundle.image_archive())
    roll_out(with_old_pods, MANIFESTS / "kubeadm")
    return with_old_pods


def test_the_second_node_has_no_python_and_no_libnftables_of_its_own(with_old_pods: Cluster) -> None:
    one, two = (node.run("sh", "-c", FOREIGN, check=False).stdout for node in with_old_pods.nodes)
    assert "python3" in one
    assert "libnftables" in one
    assert two == ""


def test_both_nodes_switch_and_nobodys_file_is_touched(rolled_out: Cluster) -> None:
    for node in rolled_out.nodes:
        assert files(node) == ["01-hostport.conflist", "10-containerd-net.conflist"]
        assert types(node, PRIMARY) == ["bridge", "portmap"]
        assert types(node, OURS) == ["bridge", "hostport"]


def test_old_pods_keep_their_ports_and_new_ones_have_theirs(rolled_out: Cluster) -> None:
    with rolled_out.running(*web(rolled_out, "new", 8081)):
        assert answers(rolled_out, 8080) == both("old")
        assert answers(rolled_out, 8081) == both("new")
        for agent in rolled_out.kubectl("get", "pods", *AGENTS, "--output=name").split():
            ask = ("exec", AGENTS[0], agent, "--", "/opt/cni/bin/hostport", "list")
            assert "8081/tcp" in rolled_out.kubectl(*ask)
    assert failures(rolled_out) == []


def test_a_second_pod_on_a_taken_port_stays_pending(rolled_out: Cluster) -> None:
    node = rolled_out.nodes[0]
    second = pod("second", port(8081), node=node)
    with rolled_out.running(pod("first", port(8081), node=node)):
        rolled_out.apply(second)
        rolled_out.wait_for(lambda: "free ports" in rolled_out.kubectl("describe", "pod/second"))
    rolled_out.wait_until("condition=Ready", "pod/second")
    rolled_out.delete(second)


def test_a_port_that_something_outside_the_cluster_holds_is_refused_with_its_name(rolled_out: Cluster) -> None:
    node = rolled_out.nodes[0]
    node.run("ip", "netns", "add", "outside")
    config = {
        "cniVersion": "1.0.0", "name": "other", "type": "hostport",
        "prevResult": {"ips": [{"address": "10.88.1.250/24"}]},
        "runtimeConfig": {"portMappings": [{"hostPort": 8090, "containerPort": 80}]},
    }  # fmt: skip
    call = [
        "env", "CNI_CONTAINERID=outside", "CNI_NETNS=/run/netns/outside", "CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin",
    ]  # fmt: skip
    run = partial(node.run, "sh", "-c", 'printf %s "$0" | "$@"', json.dumps(config), *call)
    run("CNI_COMMAND=ADD", "/opt/cni/bin/hostport")
    wants = pod("wants", port(8090), node=node)
    rolled_out.apply(wants)
    rolled_out.wait_for(lambda: "outside" in rolled_out.kubectl("describe", "pod/wants"))
    described = rolled_out.kubectl("describe", "pod/wants")
    assert re.search("FailedCreatePodSandBox.*8090", described), described
    run("CNI_COMMAND=DEL", "/opt/cni/bin/hostport")
    rolled_out.wait_until("condition=Ready", "pod/wants")
    rolled_out.delete(wants)


def ten_answers(cluster: Cluster, address: str, service_port: int) -> set[str]:
    """Return by whom ten connections to a Service were answered, nobody where one was not."""
    try:
        return {cluster.client.ask("tcp", address, service_port) for _ in range(10)}
    except OSError:
        return set()


def test_services_keep_what_is_theirs(rolled_out: Cluster) -> None:
    labels = {"metadata": {"labels": {"serves": "web"}}}
    behind = [pod(f"behind-{node.number}", node=node) for node in rolled_out.nodes]
    for made in behind:
        made["metadata"]["labels"] |= labels["metadata"]["labels"]
    virtual = "192.0.2.100"
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"type": "LoadBalancer", "selector": {"serves": "web"},
            "ports": [{"port": 8083, "targetPort": 80, "nodePort": 30083}]},
    }  # fmt: skip
    rolled_out.apply(service)
    rolled_out.kubectl(
        "patch", "service", "web", "--subresource=status", "--type=merge",
        f"--patch={json.dumps({'status': {'loadBalancer': {'ingress': [{'ip': virtual}]}}})}",
    )  # fmt: skip
    names = {"behind-1", "behind-2"}
    with rolled_out.running(*behind, *web(rolled_out, "beside", 8083)):
        for node in rolled_out.nodes:
            rolled_out.wait_for(lambda: ten_answers(rolled_out, node.ip4, 30083) == names)  # noqa: B023
            assert rolled_out.client.ask("tcp", node.ip4, 8083) == f"beside-{node.number}"
            rolled_out.client.ip(f"route replace {virtual} via {node.ip4}")
            rolled_out.wait_for(lambda: ten_answers(rolled_out, virtual, 8083) == names)
            rolled_out.client.ip(f"route del {virtual}")
    rolled_out.delete(service)


def test_upstreams_conformance_test_of_host_ports_passes(rolled_out: Cluster, tmp_path: Path) -> None:
    repositories = tmp_path / "repositories.yaml"
    repositories.write_text(f"promoterE2eRegistry: {REPOSITORY}\n")
    ran = rolled_out.client.run(
        str(TOOLS / "e2e"), f"--kubeconfig={rolled_out.control.kubeconfig}", "--provider=skeleton",
        "--ginkgo.no-color", f"--ginkgo.focus=HostPort {CONFORMANCE}", check=False,
        env={**os.environ, "KUBE_TEST_REPO_LIST": str(repositories)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert "Ran 1 of 1 Specs" in ran.stdout


def test_what_happens_on_a_node_costs_nobody_his_ports(rolled_out: Cluster) -> None:
    one, two = rolled_out.nodes
    with rolled_out.running(*web(rolled_out, "steady", 8084)), PodTraffic(rolled_out) as traffic:
        for (node, _), container in containers(rolled_out).items():
            node.run(*CTR, "tasks", "kill", "--signal=SIGKILL", container)
        traffic.wait_for_rounds(1)
        two.restart_containerd()
        traffic.wait_for_rounds(1)
        one.write(PRIMARY, one.read(PRIMARY).replace('"cniVersion": "1.0.0"', '"cniVersion": "1.1.0"'))
        rolled_out.wait_for(lambda: '"cniVersion": "1.1.0"' in one.read(OURS))
        traffic.wait_for_rounds(1)
        assert answers(rolled_out, 8084) == both("steady")
    assert (traffic.faults, failures(rolled_out)) == ([], [])


def test_host_ports_come_back_after_a_flush_while_pods_come_and_go(rolled_out: Cluster) -> None:
    with rolled_out.running(*web(rolled_out, "steady", 8084)), PodTraffic(rolled_out) as traffic:
        for node in rolled_out.nodes:
            flush(node)
        rolled_out.wait_for(lambda: try_answers(rolled_out, 8084) == both("steady"))
        traffic.wait_for_rounds(1)
    # who connects while there is no table is refused
    assert [fault for fault in traffic.faults if "refused" not in fault] == []
    assert failures(rolled_out) == []


def test_an_upgrade_fails_no_call_and_loses_no_port(rolled_out: Cluster, tmp_path: Path) -> None:
    version = "9.9.9"
    rolled_out.import_images(bundle.image_archive(version))
    with (
        rolled_out.running(*web(rolled_out, "steady", 8084)),
        PortTraffic(rolled_out, 8080, 8084) as ports,
        PodTraffic(rolled_out) as pods,
    ):
        pods.wait_for_rounds(1)
        image = {"name": "localhost/hostport", "newName": "localhost/hostport", "newTag": version}
        roll_out(rolled_out, overlay(tmp_path / "upgrade", "kubeadm", images=[image]))
        pods.wait_for_rounds(1)
    assert (ports.faults, pods.faults, failures(rolled_out)) == ([], [], [])
    for node in rolled_out.nodes:
        assert version in node.run("/opt/cni/bin/hostport", "--version").stdout
        assert len(node.run("ls", "/opt/hostport").stdout.split()) <= 2


def test_a_removal_leaves_running_pods_their_ports_and_then_nothing(rolled_out: Cluster) -> None:
    for node in rolled_out.nodes:
        node.write("/run/hostport/pods/left/dynamic-ports.json", "{}")
    with rolled_out.running(*web(rolled_out, "last", 8085)):
        rolled_out.kubectl("apply", "--kustomize", MANIFESTS / "kubeadm" / "uninstall")
        rolled_out.wait_for(lambda: all(files(node) == ["10-containerd-net.conflist"] for node in rolled_out.nodes))
        assert answers(rolled_out, 8085) == both("last")
        assert answers(rolled_out, 8080) == both("old")
        with rolled_out.running(*web(rolled_out, "after", 8086)):
            assert answers(rolled_out, 8086) == both("after")
    told = rolled_out.kubectl(
        "rollout", "status", "daemonset/hostport", "--namespace=kube-system", f"--timeout={LONG}s"
    )
    assert "successfully rolled out" in told, told + rolled_out.story()
    for node in rolled_out.nodes:
        assert node.run("ls", "/opt/cni/bin").stdout.split() == ["bridge", "host-local", "loopback", "portmap"]
        assert "hostport" not in node.run("ls", "/opt", "/run").stdout.split()
    assert answers(rolled_out, 8080) == both("old")
    rolled_out.kubectl("delete", "--kustomize", MANIFESTS / "kubeadm" / "uninstall")
    assert failures(rolled_out) == []
