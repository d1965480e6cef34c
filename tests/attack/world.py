"""A node on which sequences of operations run, and its ruleset in the terms of the model."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import shutil
from contextlib import ExitStack
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from attack import fork, ruleset
from attack.model import Attachment
from lab import Namespace, Node, ip

import cni_hostport.operate.mappings
import cni_hostport.operate.restore  # noqa: F401 - imported once, instead of in each fork
from cni_hostport.operate import cli
from cni_hostport.ruleset.base import BASE_CHAINS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from attack.answer import Answer
    from attack.model import Model, Port, PortMapping

OPEN = "net/ipv4/conf/cni0/route_localnet"
INTERFACES = {"eth0": "red", "eth1": "blue", "eth2": "red"}
CONTAINERS = ["one", "two", "three"]
ATTACHMENTS = [
    Attachment(network, container, ifname) for container in CONTAINERS for ifname, network in INTERFACES.items()
]


class World:
    """The node, the containers' namespaces, which hold nothing but their interfaces, and the runtimes' cache."""

    def __init__(self, node: Node, directory: Path) -> None:
        self.node = node
        self.directory = directory / "results"
        self._closing = ExitStack()
        self.namespaces = {name: self._closing.enter_context(Namespace(name)) for name in CONTAINERS}
        self._present = set[str]()
        self._clock = itertools.count(1)
        self.base = self._base()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _base(self) -> ruleset.Table:
        pod = self.node.pod()
        self.node.add(pod, {"hostPort": 80, "containerPort": 80})
        self.node.delete(pod)
        pod.remove()
        return ruleset.read(self.node)

    def reset(self) -> None:
        """Begin again, with all containers alive and nothing installed."""
        self.node.nft("flush ruleset")
        self.node.set_sysctl(OPEN, 0)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        for container in CONTAINERS:
            if container not in self._present:
                self.revive(container)

    def die(self, container: str) -> None:
        self.namespaces[container].remove()
        self._present.discard(container)

    def revive(self, container: str) -> None:
        """Put a new namespace at the container's path."""
        self.die(container)
        name = self.namespaces[container].name
        ip(f"netns add {name}", *(f"-n {name} link add {ifname} type bridge" for ifname in INTERFACES))
        self._present.add(container)

    def flush(self, what: str) -> None:
        self.node.run("nft", *("delete" if what.startswith("table") else "flush", *what.split()), check=False)

    def add(self, attachment: Attachment, mappings: Sequence[PortMapping], addresses: Sequence[str]) -> Answer:
        return self.call("ADD", attachment, _asked(mappings, addresses))

    def check(self, attachment: Attachment, mappings: Sequence[PortMapping], addresses: Sequence[str]) -> Answer:
        return self.call("CHECK", attachment, _asked(mappings, addresses))

    def delete(self, attachment: Attachment, mappings: Sequence[PortMapping] | None) -> Answer:
        return self.call("DEL", attachment, {} if mappings is None else _asked(mappings, []))

    def collect(self, network: str, valid: set[Attachment]) -> Answer:
        items = [{"containerID": item.container, "ifname": item.ifname} for item in valid if item.network == network]
        return self.call("GC", Attachment(network, "", ""), {"cni.dev/valid-attachments": items})

    def call(self, command: str, attachment: Attachment, config: dict[str, Any]) -> Answer:
        """Run an operation for an attachment, with these keys of its configuration."""
        environ = {"CNI_COMMAND": command, "CNI_PATH": "/opt/cni/bin"}
        if attachment.container:
            path = self.namespaces[attachment.container].path
            environ |= {"CNI_CONTAINERID": attachment.container, "CNI_NETNS": path, "CNI_IFNAME": attachment.ifname}
        named = {"cniVersion": "1.1.0", "name": attachment.network, "type": "hostport", "waitForHolder": 0}
        answer = fork.call(self.node, environ, json.dumps(named | config).encode())
        assert not answer.breach(command), answer
        return answer

    def command(self, *arguments: str) -> Answer:
        """Run one of the commands for people."""

        def run() -> int:
            try:
                cli.main(arguments, prog_name="hostport")
            except SystemExit as end:
                return end.code if isinstance(end.code, int) else bool(end.code)
            return 0

        return fork.forked(self.node, run)

    def restore(self) -> dict[Attachment, str]:
        """Return what became of each attachment of which the restoration says something."""
        answer = self.command("restore", "--json", "--watch=0", f"--cache-dir={self.directory.parent}")
        output = {outcome["attachment"]: outcome["status"] for outcome in json.loads(answer.stdout)}
        assert answer.status == ("failed" in output.values()), answer
        named = {re.fullmatch(r"container (\w+) \((\w+), network (\w+)\)", name): output[name] for name in output}
        return {Attachment(match[3], match[1], match[2]): status for match, status in named.items() if match}

    def remember(self, attachment: Attachment, mappings: Sequence[PortMapping], addresses: Sequence[str]) -> None:
        """Write what libcni writes after an ADD."""
        self.store(attachment, _asked(mappings, addresses))

    def store(self, attachment: Attachment, asked: dict[str, Any]) -> None:
        """Write what libcni writes after an ADD with these keys of its configuration."""
        plugin = {"type": "hostport", "capabilities": dict.fromkeys(asked["runtimeConfig"], True), **asked}
        plugin = {key: value for key, value in plugin.items() if key not in {"runtimeConfig", "prevResult"}}
        conflist = {"cniVersion": "1.0.0", "name": attachment.network, "plugins": [plugin]}
        entry = {
            "kind": "cniCacheV1",
            "containerId": attachment.container,
            "config": base64.b64encode(json.dumps(conflist).encode()).decode(),
            "ifName": attachment.ifname,
            "networkName": attachment.network,
            "netns": self.namespaces[attachment.container].path,
            "capabilityArgs": asked["runtimeConfig"],
            "result": asked["prevResult"],
        }
        path = self._entry(attachment)
        path.write_text(json.dumps(entry))
        os.utime(path, (next(self._clock),) * 2)

    def forget(self, attachment: Attachment) -> None:
        """Remove what libcni removes after a DEL."""
        self._entry(attachment).unlink(missing_ok=True)

    def _entry(self, attachment: Attachment) -> Path:
        return self.directory / "-".join(attachment)


def _asked(mappings: Sequence[PortMapping], addresses: Sequence[str]) -> dict[str, Any]:
    mapped = [
        {"hostPort": mapping.port, "containerPort": mapping.target, "protocol": mapping.protocol}
        | ({"hostIP": mapping.host_ip} if mapping.host_ip else {})
        for mapping in mappings
    ]
    ips = [{"address": f"{address}/{64 if ':' in address else 24}"} for address in addresses]
    return {"runtimeConfig": {"portMappings": mapped}, "prevResult": {"cniVersion": "1.1.0", "ips": ips}}


class State(NamedTuple):
    """All that is installed: elements as (map, key, chain), chains, rows of ``hostport list``, and 127.0.0.0/8."""

    elements: set[tuple[str, ...]]
    chains: set[str]
    rows: set[tuple[str, ...]]
    lacks: str
    is_guarded: bool
    is_open: bool


def observed(world: World) -> State:
    """Return what is there."""
    listed = world.command("list", "--json")
    assert not listed.status, listed
    parts = ("protocol", "host_ip", "host_port", "pod_ip", "pod_port", "container_id", "ifname", "network", "holder")
    rows = {tuple(str(row[part]) for part in parts) for row in json.loads(listed.stdout)}
    table = ruleset.read(world.node)
    lacks = ruleset.difference(world.base & table, world.base)
    chains, elements, guarded = set[str](), set[tuple[str, ...]](), False
    for name, value in ruleset.elements(table):
        if name == "localnet":
            guarded = True
        else:
            elements.add((name, *_element(value)))
    chains = {name for name in ruleset.chains(table) if name not in BASE_CHAINS and not name.startswith("localnet-")}
    return State(elements, chains, rows, lacks, guarded, world.node.get_sysctl(OPEN) == "1")


def _element(value: list[Any]) -> tuple[str, str]:
    key, verdict = value
    key = key["elem"]["val"] if isinstance(key, dict) and "elem" in key else key
    parts = key["concat"] if isinstance(key, dict) else [key]
    return " ".join(map(str, parts)), re.sub(r"localnet-\d+", "localnet", verdict["goto"]["target"])


def expected(model: Model) -> State:
    """Return what should be there."""
    elements = set[tuple[str, ...]]()
    for port, (holder, *waiting) in model.queues.items():
        name, place = _place(port)
        elements.add((name, place, f"dnat-{holder.key}"))
        elements |= {(f"waiting_{name}", f"{_address(waiter)} {place}", f"dnat-{holder.key}") for waiter in waiting}
    for attachment, held in model.held.items():
        versions = {address: ip_address(address).version for address in held.addresses}
        elements |= {(f"pods_ip{version}", address, f"masq-{attachment.key}") for address, version in versions.items()}
        if 4 in versions.values():
            elements.add(("localnet_needs", _address(attachment), "localnet"))
    chains = {f"{kind}-{attachment.key}" for attachment in model.held for kind in ("dnat", "masq")}
    return State(elements, chains, _rows(model), "", model.is_guarded, model.is_open)


def _place(port: Port) -> tuple[str, str]:
    if port.host_ip:
        return f"hostports_ip{port.version}", f"{port.host_ip} {port.protocol} {port.number}"
    return "hostports", f"ipv{port.version} {port.protocol} {port.number}"


def _address(attachment: Attachment) -> str:
    return str(ip_address(bytes.fromhex(attachment.key.replace("-", ""))))


def _rows(model: Model) -> set[tuple[str, ...]]:
    rows = set[tuple[str, ...]]()
    for port, (holder, *_) in model.queues.items():
        pod, target = model.held[holder].targets[port]
        host = port.host_ip or {4: "0.0.0.0", 6: "::"}[port.version]
        alive = "alive" if model.is_alive(holder) else "gone"
        owner = (holder.container, holder.ifname, holder.network)
        rows.add((port.protocol, host, str(port.number), pod, str(target), *owner, alive))
    return rows
