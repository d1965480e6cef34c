"""A Kubernetes cluster of two nodes, and a client outside, on whose machine the control plane runs.

Both nodes begin with containerd's usual network, ``bridge`` and ``portmap``.
The first has this machine's root and kube-proxy with nftables; the second a root without Python, without nft and
libnftables, and so kube-proxy with iptables.
"""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Self

from lab import CLIENT4, CLIENT6, Namespace, ip
from resident import eventually
from runtimes import image
from runtimes.host import wait_for
from runtimes.kubelet import answering

from cluster import images, roots
from cluster.control import Control, kubeconfig
from cluster.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

MODES = ("nftables", "iptables")
LONG = 180  # seconds


def pod(name: str, *ports: Mapping[str, Any], node: Machine, **spec: Any) -> dict[str, Any]:
    """Return a pod with these ``ports`` for a node, which the scheduler puts there; it answers its name on port 80.

    It is not ready before it listens.
    """
    made = answering(name, *ports) | {"nodeSelector": {"kubernetes.io/hostname": node.name}} | spec
    made["containers"][0]["startupProbe"] = {"tcpSocket": {"port": 80}, "periodSeconds": 1, "failureThreshold": LONG}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"name": name}}, "spec": made}


def port(host_port: int, container_port: int = 80, **keys: Any) -> dict[str, Any]:
    """One entry of a container's ``ports``."""
    return {"hostPort": host_port, "containerPort": container_port, **keys}


class Cluster:
    """A cluster that runs until its context ends."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as closing:
            self._start(closing)
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _start(self, closing: contextlib.ExitStack) -> None:
        small = self._directory / "small"
        self.client = closing.enter_context(Namespace("client"))
        self.client.ip(
            "link add lan type bridge", f"addr add {CLIENT4}/24 dev lan", f"addr add {CLIENT6}/64 dev lan nodad",
            "link set lan up",
        )  # fmt: skip
        names = [f"node-{number}" for number in (1, 2)]
        self.control = closing.enter_context(Control(self.client, names, self._directory / "control"))
        self.control.begin()
        roots.make_small(small)
        self.nodes: list[Machine] = []
        for number, (base, mode) in enumerate(zip((roots.DEBIAN, small), MODES, strict=True), 1):
            namespace = closing.enter_context(Namespace(f"node{number}"))
            machine = Machine(namespace, number, base, mode, self._directory / names[number - 1])
            self.nodes.append(closing.enter_context(machine))
            self._connect(machine)
        for one, other in (self.nodes, self.nodes[::-1]):
            one.namespace.ip(
                f"route add 10.88.{other.number}.0/24 via {other.ip4}",
                f"route add fd00:88:{other.number}::/64 via {other.ip6}",
            )
        archives = [self._directory / "pause.tar", self._directory / "agnhost.tar"]
        image.write(archives[0])
        images.write_agnhost(archives[1])
        self.import_images(*archives)
        self.control.complete()
        for node in self.nodes:
            node.join(kubeconfig)
        wait_for(self._is_ready, self.control.log("kube-controller-manager"))

    def _connect(self, machine: Machine) -> None:
        name = machine.namespace.name
        ip(f"-n {self.client.name} link add {machine.name} type veth peer name eth0 netns {name}")
        self.client.ip(f"link set {machine.name} master lan up")
        machine.namespace.ip(
            f"addr add {machine.ip4}/24 dev eth0", f"addr add {machine.ip6}/64 dev eth0 nodad", "link set eth0 up",
            f"route add default via {CLIENT4}", f"route add default via {CLIENT6}",
        )  # fmt: skip
        machine.namespace.set_sysctl("net/ipv4/ip_forward", 1)
        machine.namespace.set_sysctl("net/ipv6/conf/all/forwarding", 1)

    def import_images(self, *archives: Path) -> None:
        """Give images to both nodes, by their archives."""
        with ThreadPoolExecutor() as pool:
            for archive in archives:
                list(pool.map(methodcaller("import_image", archive), self.nodes))

    def _is_ready(self) -> bool:
        nodes = self.get("nodes")
        conditions = [condition for node in nodes for condition in node["status"]["conditions"]]
        return (
            len(nodes) == len(self.nodes)
            and all(condition["status"] == "True" for condition in conditions if condition["type"] == "Ready")
            and not any(node["spec"].get("taints") for node in nodes)
            and bool(self.get("serviceaccounts", "--field-selector=metadata.name=default"))
        )

    def kubectl(self, *arguments: str | Path, check: bool = True, text: str | None = None) -> str:
        """Run kubectl as an administrator, with ``text`` as its standard input, and return what it prints."""
        return self.control.kubectl(*arguments, check=check, text=text)

    def get(self, *arguments: str) -> list[dict[str, Any]]:
        """Return the objects that ``kubectl get`` lists."""
        listed: list[dict[str, Any]] = json.loads(self.kubectl("get", *arguments, "--output=json"))["items"]
        return listed

    def apply(self, *objects: dict[str, Any]) -> None:
        """Apply objects."""
        listed = {"apiVersion": "v1", "kind": "List", "items": objects}
        self.kubectl("apply", "--filename=-", text=json.dumps(listed))

    def delete(self, *objects: dict[str, Any]) -> None:
        """Delete objects, and wait until they are gone."""
        listed = {"apiVersion": "v1", "kind": "List", "items": objects}
        self.kubectl("delete", "--ignore-not-found", "--filename=-", text=json.dumps(listed))

    @contextlib.contextmanager
    def running(self, *pods: dict[str, Any]) -> Iterator[None]:
        """Run the block while these pods are ready."""
        self.apply(*pods)
        try:
            self.wait_until("condition=Ready", *(f"pod/{pod['metadata']['name']}" for pod in pods))
            yield
        finally:
            self.delete(*pods)

    def answer(self, address: str, port: int) -> str:
        """Return what a connection from outside is answered with; nothing if it is not."""
        try:
            return self.client.ask("tcp", address, port)
        except OSError:
            return ""

    def wait_until(self, state: str, *names: str, seconds: int = LONG) -> None:
        """Wait until objects are in a state that ``kubectl wait`` knows; else fail with what the cluster tells."""
        told = self.kubectl("wait", f"--for={state}", f"--timeout={seconds}s", *names, check=False)
        assert "timed out" not in told, f"{told}{self.story()}"

    def story(self) -> str:
        """Return all pods and the last events, for a person."""
        pods = self.kubectl("get", "pods", "--all-namespaces", "--output=wide", check=False)
        events = self.kubectl("get", "events", "--all-namespaces", "--sort-by=.lastTimestamp", check=False)
        return f"{pods}\n{events[-4000:]}"

    def wait_for(self, condition: Callable[[], object], seconds: float = LONG) -> None:
        """Wait until a condition holds; if it does not come to that, fail with what the cluster tells."""
        assert eventually(condition, seconds), self.story()
