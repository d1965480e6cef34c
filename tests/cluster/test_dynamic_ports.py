"""Dynamic host ports in a cluster, from pods that ask to clients that find them: these tests go in order."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import bundle
import pytest
from runtimes import image

from cluster.cluster import LONG, pod, port
from cluster.daemonset import AGENTS, MANIFESTS, OURS, containers, overlay
from cluster.machine import CTR
from cluster.replicas import NAME, Replica, assigned, replicas
from cluster.traffic import ReplicaTraffic
from cni_hostport.dynamic_ports import keys

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.cluster import Cluster
    from cluster.machine import Machine

EXAMPLE = MANIFESTS / "examples" / "dynamic-ports.yaml"
REPLICAS = 20
FIRST, LAST = 40000, 40031  # enough for all replicas, old and new, on one node
PER_POD = 16
GRACE = 12  # seconds for which a pod that ends is there: longer than clients go by what they know
FILES = "cd /run/hostport/pods && for file in */dynamic-ports.json; do echo ${file%/*} $(cat $file); done"


def asking(name: str, request: str, node: Machine) -> dict[str, Any]:
    """Return a pod that asks for dynamic host ports."""
    made = pod(name, node=node)
    made["metadata"]["annotations"] = {keys.REQUEST: request}
    return made


def described(cluster: Cluster, name: str) -> str:
    return cluster.kubectl("describe", f"pod/{name}")


def files(node: Machine) -> dict[str, Any]:
    """Return what the files of a node's pods tell, by the pods' UIDs; a file may go while they are read."""
    lines = node.run("sh", "-c", FILES).stdout.splitlines()
    return {uid: json.loads(text) for uid, _, text in (line.partition(" ") for line in lines) if text}


def listed(node: Machine) -> list[tuple[str, int]]:
    """Return the pods and host ports that ``hostport list`` shows."""
    mappings = json.loads(node.run("/opt/cni/bin/hostport", "list", "--json").stdout)
    return sorted({(mapping["pod"], mapping["host_port"]) for mapping in mappings})


def is_told_alike(cluster: Cluster, found: list[Replica]) -> bool:
    """Tell whether files and rulesets say what replicas' annotations say, and nothing else."""
    for node in cluster.nodes:
        here = [replica for replica in found if replica.node == node.name]
        if files(node) != {replica.uid: {"80/tcp": {"hostPort": replica.port}} for replica in here}:
            return False
        if listed(node) != sorted((f"default/{replica.name}", replica.port) for replica in here):
            return False
    return True


def all_answer(cluster: Cluster, found: list[Replica]) -> bool:
    return all(cluster.answer(replica.address, replica.port) == replica.answer for replica in found)


@pytest.fixture(scope="module")
def rolled_out(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The cluster, with this plugin and its annotator on both nodes, and options that allow no dynamic host ports."""
    cluster.import_images(bundle.image_archive())
    set_options(cluster, tmp_path_factory.mktemp("options"))
    return cluster


def set_options(cluster: Cluster, directory: Path, **options: Any) -> None:
    """Give this plugin its options, and wait until they are in force."""
    changed = {
        "name": "hostport-options", "namespace": "kube-system", "behavior": "merge",
        "literals": [f"options.json={json.dumps(options)}"],
    }  # fmt: skip
    cluster.kubectl("apply", "--kustomize", overlay(directory, "kubeadm/annotations", configMapGenerator=[changed]))
    # a kubelet looks at a pod that is changed at once, and else each minute
    cluster.kubectl("annotate", "pods", *AGENTS, "--overwrite", f"options={len(options)}")
    cluster.wait_for(lambda: all(given(node) == options for node in cluster.nodes))


def given(node: Machine) -> dict[str, Any] | None:
    """Return the options that are in force on a node, ``None`` while this plugin is not there."""
    read = node.run("cat", OURS, check=False).stdout
    plugins = json.loads(read)["plugins"] if read else []
    return next((without(plugin, "type", "capabilities") for plugin in plugins if plugin["type"] == "hostport"), None)


def without(document: dict[str, Any], *left_out: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in left_out}


def test_a_pod_that_asks_where_the_network_gives_none_is_told_so_until_it_does(
    rolled_out: Cluster, tmp_path: Path
) -> None:
    asks = asking("asks", "80/tcp", rolled_out.nodes[0])
    rolled_out.apply(asks)
    lack = "asks for dynamic host ports, 80/tcp, and this network gives none: it has no dynamicPorts"
    rolled_out.wait_for(lambda: lack in described(rolled_out, "asks"))
    rolled_out.wait_for(lambda: "ContainerCreating" in rolled_out.kubectl("get", "pod/asks"))
    set_options(rolled_out, tmp_path, dynamicPorts=f"{FIRST}-{LAST}")
    rolled_out.wait_until("condition=Ready", "pod/asks")
    rolled_out.delete(asks)


@pytest.fixture(scope="module")
def deployed(rolled_out: Cluster) -> Cluster:
    """The cluster, with the example's Deployment on both nodes, beside pods that do not ask."""
    read = rolled_out.kubectl("create", "--dry-run=client", "--output=json", "--filename", EXAMPLE)
    deployment = json.loads(read)
    deployment["spec"]["replicas"] = REPLICAS
    pods = deployment["spec"]["template"]["spec"]
    pods["containers"][0]["image"] = image.NAME
    pods["terminationGracePeriodSeconds"] = GRACE
    node = rolled_out.nodes[0]
    rolled_out.apply(deployment, pod("plain", node=node), pod("zero", port(0), node=node))
    wait_for_replicas(rolled_out)
    return rolled_out


def wait_for_replicas(cluster: Cluster) -> None:
    told = cluster.kubectl("rollout", "status", f"deployment/{NAME}", f"--timeout={LONG}s", check=False)
    assert "successfully rolled out" in told, told + cluster.story()
    cluster.wait_for(lambda: len(replicas(cluster)) == REPLICAS)


def test_each_replica_is_reached_on_its_own_port_found_by_its_annotation(deployed: Cluster) -> None:
    found = replicas(deployed)
    for node in deployed.nodes:
        ports = [replica.port for replica in found if replica.address == node.ip4]
        assert len({*ports} & {*range(FIRST, LAST + 1)}) == len(ports) > 1
    for replica in found:
        assert deployed.client.ask("tcp", replica.address, replica.port) == replica.answer


def test_a_pod_that_does_not_ask_gets_nothing(deployed: Cluster) -> None:
    deployed.wait_until("condition=Ready", "pod/plain", "pod/zero")
    deployed.wait_for(lambda: is_told_alike(deployed, replicas(deployed)))
    for name in ("plain", "zero"):
        [made] = deployed.get("pods", f"--selector=name={name}")
        assert keys.STATUS not in made["metadata"].get("annotations", {})


def test_what_a_pod_reads_is_what_clients_and_the_node_are_told(deployed: Cluster) -> None:
    found = replicas(deployed)
    for node in deployed.nodes:
        replica = next(replica for replica in found if replica.node == node.name)
        read = ("exec", f"pod/{replica.name}", "--", "/bin/busybox", "cat")
        told: dict[str, dict[str, Any]] = {"80/tcp": {"hostPort": replica.port}}
        assert json.loads(deployed.kubectl(*read, "/run/hostport/dynamic-ports.json")) == told
        assert deployed.kubectl(*read, "/sys/class/net/eth0/ifalias") == f"hostport 80/tcp={replica.port}\n"
        told["80/tcp"]["hostIP"] = node.ip4
        deployed.wait_for(lambda: deployed.kubectl(*read, "/run/pod/dynamic-ports-status.json"))  # noqa: B023
        assert json.loads(deployed.kubectl(*read, "/run/pod/dynamic-ports-status.json")) == told


def test_clients_who_follow_the_annotations_notice_nothing_of_a_rollout(deployed: Cluster) -> None:
    old = {replica.name for replica in replicas(deployed)}
    with ReplicaTraffic(deployed) as traffic:
        deployed.wait_for(lambda: traffic.answered)
        deployed.kubectl("rollout", "restart", f"deployment/{NAME}")
        wait_for_replicas(deployed)
        new = {replica.name for replica in replicas(deployed)}
        deployed.wait_for(lambda: traffic.answered >= new)
    assert traffic.faults == []
    assert (old & new, bool(traffic.answered & old)) == (set(), True)
    deployed.wait_for(lambda: is_told_alike(deployed, replicas(deployed)))


def test_a_flushed_node_has_its_ports_files_and_annotations_again(deployed: Cluster) -> None:
    found = replicas(deployed)
    for node in deployed.nodes:
        node.run("sh", "-c", "rm /run/hostport/pods/*/dynamic-ports.json")
        node.namespace.run("nft", "flush", "ruleset")
    deployed.wait_for(lambda: all_answer(deployed, found) and is_told_alike(deployed, found))
    deployed.wait_for(lambda: replicas(deployed) == found)
    for node in deployed.nodes:
        node.restart_kube_proxy()  # of which all was flushed, too


def test_annotations_are_right_again_when_everything_was_restarted(deployed: Cluster) -> None:
    found = replicas(deployed)
    wrong = json.dumps({"80/tcp": {"hostPort": 1, "hostIP": "192.0.2.99"}})
    deployed.kubectl("annotate", "pods", f"--selector=app={NAME}", "--overwrite", f"{keys.STATUS}={wrong}")
    running = containers(deployed)
    with deployed.control.without_api_server():
        for (node, _), container in running.items():
            node.run(*CTR, "tasks", "kill", "--signal=SIGKILL", container)
    deployed.wait_for(lambda: replicas(deployed) == found)
    assert all_answer(deployed, found)
    deployed.kubectl("scale", f"deployment/{NAME}", f"--replicas={REPLICAS + 1}")
    deployed.wait_for(lambda: len(replicas(deployed)) == REPLICAS + 1)
    assert all_answer(deployed, replicas(deployed))


def test_a_pod_for_which_no_port_is_left_waits_for_one(deployed: Cluster) -> None:
    node = deployed.nodes[1]
    request = ", ".join(f"{number}/udp" for number in range(1, PER_POD + 1))
    holders = [asking(f"holder-{number}", request, node) for number in range((LAST - FIRST + 1) // PER_POD)]
    waits = asking("waits", "53/udp", node)
    with deployed.running(*holders):
        deployed.apply(waits)
        full = f"the range of dynamic host ports {FIRST}-{LAST} is full: no port is free for 53/udp"
        deployed.wait_for(lambda: full in described(deployed, "waits"))
        deployed.delete(holders[0])
        deployed.wait_until("condition=Ready", "pod/waits")
        [made] = deployed.get("pods", "--selector=name=waits")
        deployed.wait_for(lambda: assigned(deployed.get("pods", "--selector=name=waits")[0], "53/udp"))
        assert files(node)[made["metadata"]["uid"]].keys() == {"53/udp"}
    deployed.delete(waits)
