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
from attack.model import Who
from lab import Namespace, Node, ip

from cni_hostport.operate import cli, mappings, restore  # noqa: F401 - the commands' own modules, once
from cni_hostport.table import BASE_CHAINS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from attack.answer import Answer
    from attack.model import Model, Port, Wish

OPEN = "net/ipv4/conf/cni0/route_localnet"
INTERFACES = {"eth0": "red", "eth1": "blue", "eth2": "red"}
CONTAINERS = ["one", "two", "three"]
ATTACHMENTS = [Who(network, container, ifname) for container in CONTAINERS for ifname, network in INTERFACES.items()]


class World:
    """The node, the containers' namespaces, which hold nothing but their interfaces, and the runtimes' cache."""

    def __init__(self, node: Node, directory: Path) -> None:
        self.node = node
        self.directory = directory / "results"
        self._closing = ExitStack()
        self.namespaces = {of: self._closing.enter_context(Namespace(of)) for of in CONTAINERS}
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
        return ruleset.of(self.node)

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

    def add(self, who: Who, wishes: Sequence[Wish], addresses: Sequence[str]) -> Answer:
        return self._call("ADD", who, _asked(wishes, addresses))

    def check(self, who: Who, wishes: Sequence[Wish], addresses: Sequence[str]) -> Answer:
        return self._call("CHECK", who, _asked(wishes, addresses))

    def delete(self, who: Who, wishes: Sequence[Wish] | None) -> Answer:
        return self._call("DEL", who, {} if wishes is None else _asked(wishes, []))

    def collect(self, network: str, valid: set[Who]) -> Answer:
        items = [{"containerID": of.container, "ifname": of.ifname} for of in valid if of.network == network]
        return self._call("GC", Who(network, "", ""), {"cni.dev/valid-attachments": items})

    def _call(self, command: str, who: Who, config: dict[str, Any]) -> Answer:
        environ = {"CNI_COMMAND": command, "CNI_PATH": "/opt/cni/bin"}
        if who.container:
            path = self.namespaces[who.container].path
            environ |= {"CNI_CONTAINERID": who.container, "CNI_NETNS": path, "CNI_IFNAME": who.ifname}
        named = {"cniVersion": "1.1.0", "name": who.network, "type": "hostport", "waitForHolder": 0}
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

    def restore(self) -> dict[Who, str]:
        """Return what became of each attachment of which the restoration says something."""
        answer = self.command("restore", "--json", "--watch=0", f"--cache-dir={self.directory.parent}")
        said = {outcome["attachment"]: outcome["status"] for outcome in json.loads(answer.stdout)}
        assert answer.status == ("failed" in said.values()), answer
        named = {re.fullmatch(r"container (\w+) \((\w+), network (\w+)\)", name): said[name] for name in said}
        return {Who(of[3], of[1], of[2]): status for of, status in named.items() if of}

    def remember(self, who: Who, wishes: Sequence[Wish], addresses: Sequence[str]) -> None:
        """Write what libcni writes after an ADD."""
        asked = _asked(wishes, addresses)
        plugin = {"type": "hostport", "capabilities": {"portMappings": True}}
        conflist = {"cniVersion": "1.0.0", "name": who.network, "plugins": [plugin]}
        entry = {
            "kind": "cniCacheV1",
            "containerId": who.container,
            "config": base64.b64encode(json.dumps(conflist).encode()).decode(),
            "ifName": who.ifname,
            "networkName": who.network,
            "netns": self.namespaces[who.container].path,
            "capabilityArgs": asked["runtimeConfig"],
            "result": asked["prevResult"],
        }
        path = self._entry(who)
        path.write_text(json.dumps(entry))
        os.utime(path, (next(self._clock),) * 2)

    def forget(self, who: Who) -> None:
        """Remove what libcni removes after a DEL."""
        self._entry(who).unlink(missing_ok=True)

    def _entry(self, who: Who) -> Path:
        return self.directory / "-".join(who)


def _asked(wishes: Sequence[Wish], addresses: Sequence[str]) -> dict[str, Any]:
    mapped = [
        {"hostPort": wish.port, "containerPort": wish.target, "protocol": wish.protocol}
        | ({"hostIP": wish.host_ip} if wish.host_ip else {})
        for wish in wishes
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
    table = ruleset.of(world.node)
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
        elements |= {(f"waiting_{name}", f"{_address(of)} {place}", f"dnat-{holder.key}") for of in waiting}
    for who, held in model.held.items():
        versions = {address: ip_address(address).version for address in held.addresses}
        elements |= {(f"pods_ip{version}", address, f"masq-{who.key}") for address, version in versions.items()}
        if 4 in versions.values():
            elements.add(("localnet_needs", _address(who), "localnet"))
    chains = {f"{kind}-{who.key}" for who in model.held for kind in ("dnat", "masq")}
    return State(elements, chains, _rows(model), "", model.is_guarded, model.is_open)


def _place(port: Port) -> tuple[str, str]:
    if port.host_ip:
        return f"hostports_ip{port.version}", f"{port.host_ip} {port.protocol} {port.number}"
    return "hostports", f"ipv{port.version} {port.protocol} {port.number}"


def _address(who: Who) -> str:
    return str(ip_address(bytes.fromhex(who.key.replace("-", ""))))


def _rows(model: Model) -> set[tuple[str, ...]]:
    rows = set[tuple[str, ...]]()
    for port, (holder, *_) in model.queues.items():
        pod, target = model.held[holder].targets[port]
        host = port.host_ip or {4: "0.0.0.0", 6: "::"}[port.version]
        alive = "alive" if model.is_alive(holder) else "gone"
        whose = (holder.container, holder.ifname, holder.network)
        rows.add((port.protocol, host, str(port.number), pod, str(target), *whose, alive))
    return rows
