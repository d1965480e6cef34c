"""A throw-away network: a node with pods on a bridge, and a client outside, each in a network namespace of its own.

The client reaches the node as 192.0.2.1 and 2001:db8::1, and the node's pods are 10.88.0.0/24 and fd00:88::/64.
Sockets are made inside the namespaces by this very process, so that a test reads as what it sends and receives.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from cni_hostport.attachment import Attachment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)
NODE4, NODE6 = "192.0.2.1", "2001:db8::1"
CLIENT4, CLIENT6 = "192.0.2.2", "2001:db8::2"
BRIDGE4, BRIDGE6 = "10.88.0.1", "fd00:88::1"
QUIET = 0.4  # seconds in which an answer that must not come would have come
LAUNCHER = [sys.executable, "-I", "-m", "cni_hostport"]
# another user than root, who can read what is in closed folders, where a checkout may lie
NOBODY = [
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]

_serial = itertools.count()
_COUNT = re.compile(r"\t# count \d+$", re.MULTILINE)
_ELEMENTS = re.compile(r"(?<=elements = \{ )[^{}]*(?= \})")


def alike(listing: str) -> str:
    """Return what nft lists as every version does: elements in one order, and no number of a set's elements."""

    def ordered(elements: re.Match[str]) -> str:
        return ",\n".join(sorted(re.split(r",\s+", elements[0])))

    return _ELEMENTS.sub(ordered, _COUNT.sub("", listing))


def ip(*batches: str) -> None:
    """Run ``ip`` commands, one a line, in the machine's own namespace; each names its namespace with ``-n``."""
    for line in "\n".join(batches).strip().splitlines():
        subprocess.run(["ip", *line.split()], check=True, capture_output=True, text=True)


class Namespace:
    """A network namespace at ``/run/netns/NAME``, removed with its context."""

    def __init__(self, role: str) -> None:
        self.name = f"hp{os.getpid():x}-{next(_serial):x}-{role}"
        self.path = f"/run/netns/{self.name}"
        self._closing = contextlib.ExitStack()
        ip(f"netns add {self.name}", f"-n {self.name} link set lo up")
        # else the first IPv6 packet waits up to two seconds for the link-local address to be its own
        self.set_sysctl("net/ipv6/conf/default/accept_dad", 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop its servers and delete it; deleting it twice is fine."""
        self._closing.close()
        if Path(self.path).exists():
            ip(f"netns del {self.name}")

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Make what the block opens, in this thread, belong to the namespace."""
        with Path("/proc/thread-self/ns/net").open() as own, Path(self.path).open() as present:
            if LIBC.setns(present.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            try:
                yield
            finally:
                LIBC.setns(own.fileno(), CLONE_NEWNET)

    def ip(self, *lines: str) -> None:
        ip(*(f"-n {self.name} {line}" for line in lines))

    def set_sysctl(self, path: str, value: object) -> None:
        """Write one sysctl by its path below ``/proc/sys``."""
        with self.inside():
            Path("/proc/sys", path).write_text(str(value))

    def get_sysctl(self, path: str) -> str:
        with self.inside():
            return Path("/proc/sys", path).read_text().strip()

    def run(self, *command: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespace."""
        command = ("nsenter", f"--net={self.path}", *command)
        return subprocess.run(command, check=check, capture_output=True, text=True, **options)

    def socket(self, protocol: str, address: str) -> socket.socket:
        """Make a TCP or UDP socket of the address's family that belongs to the namespace."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.inside():
            made = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return made

    def serve(self, protocol: str, port: int, name: str, address: str = "") -> None:
        """Answer every connection, or datagram, with ``NAME CLIENT-ADDRESS``, until the namespace goes.

        Without an address, both families are served.
        """
        for bind in [address] if address else ["0.0.0.0", "::"]:
            listening = self.socket(protocol, bind)
            if listening.family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind((bind, port))
            if protocol == "tcp":
                listening.listen(1024)
            self._closing.callback(listening.close)
            stop_reading, stop = os.pipe()
            thread = threading.Thread(target=_answer, args=(listening, name, stop_reading), daemon=True)
            thread.start()
            self._closing.callback(thread.join)
            self._closing.callback(os.close, stop)

    def ask(
        self, protocol: str, address: str, port: int, *, source: str = "", source_port: int = 0, timeout: float = 3
    ) -> str:
        """Connect, and return what is answered.

        Raises ``ConnectionRefusedError``, or ``TimeoutError`` when nothing answers in ``timeout`` seconds.
        """
        with self.socket(protocol, address) as asking:
            asking.settimeout(timeout)
            if source or source_port:
                asking.bind((source, source_port))
            asking.connect((address, port))
            if protocol != "tcp":
                asking.send(b"?")
            return asking.recv(4096).decode()

    def is_silent(self, protocol: str, address: str, port: int, **options: Any) -> bool:
        """Tell whether a connection gets no answer at all: it is refused, or nothing comes."""
        try:
            self.ask(protocol, address, port, timeout=QUIET, **options)
        except (OSError, TimeoutError):
            return True
        return False


def _answer(listening: socket.socket, name: str, stop: int) -> None:
    while stop not in select.select([listening.fileno(), stop], [], [])[0]:
        with contextlib.suppress(OSError):
            if listening.type == socket.SOCK_STREAM:
                connection, peer = listening.accept()
                connection.sendall(f"{name} {peer[0]}".encode())
                connection.close()
            else:
                _, peer = listening.recvfrom(4096)
                listening.sendto(f"{name} {peer[0]}".encode(), peer)
    os.close(stop)


@dataclass
class Outcome:
    """What one run of the executable gave."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.stdout)
        return parsed

    @property
    def code(self) -> int:
        """The code of its error JSON, 0 if it succeeded."""
        return int(self.json["code"]) if self.status else 0

    @property
    def msg(self) -> str:
        return str(self.json["msg"]) if self.status else ""


class Pod(Namespace):
    """A namespace with ``eth0`` on a bridge of the node."""

    def __init__(self, node: Node, number: int, addresses: Sequence[str], gateways: Sequence[str], bridge: str) -> None:
        super().__init__(f"pod{number}")
        self.id = f"{self.name}-container"
        self.addresses = list(addresses)
        self.host_end = host_end = f"veth{number}"
        ip(f"-n {node.name} link add {host_end} type veth peer name eth0 netns {self.name}")
        node.ip(f"link set {host_end} master {bridge}", f"link set {host_end} up")
        self.ip("link set eth0 up")
        for address in addresses:
            self.ip(f"addr add {address} dev eth0" + (" nodad" if ":" in address else ""))
        for gateway in gateways:
            self.ip(f"route add default via {gateway}")

    def remove(self) -> None:
        """Remove the file of its dynamic host ports as well, if its ID or UID begins with its name."""
        super().remove()
        for directory in Path("/run/hostport/pods").glob(f"{self.name}-*"):
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def ip4(self) -> str:
        return next(address.split("/")[0] for address in self.addresses if ":" not in address)

    @property
    def ip6(self) -> str:
        return next(address.split("/")[0] for address in self.addresses if ":" in address)


class Node(Namespace):
    """A node that forwards, its client, and its pods; ``launcher`` starts another executable than this project's."""

    def __init__(self, launcher: Sequence[str] = ()) -> None:
        super().__init__("node")
        self.launcher = launcher
        self.client = Namespace("client")
        self._numbers = itertools.count(2)
        ip(f"-n {self.name} link add uplink type veth peer name uplink netns {self.client.name}")
        for namespace, v4, v6 in ((self, NODE4, NODE6), (self.client, CLIENT4, CLIENT6)):
            namespace.ip(f"addr add {v4}/24 dev uplink", f"addr add {v6}/64 dev uplink nodad", "link set uplink up")
        self.set_sysctl("net/ipv4/ip_forward", 1)
        self.set_sysctl("net/ipv6/conf/all/forwarding", 1)
        self.bridge("cni0", f"{BRIDGE4}/24", f"{BRIDGE6}/64")
        self._closing.callback(self.client.remove)

    def bridge(self, name: str, *addresses: str) -> None:
        """Add a bridge with these addresses, for pods of another network."""
        # else it has the lowest address of its ports, and another when a pod goes, under connections of others
        self.ip(f"link add {name} address 0a:58:0a:58:00:01 type bridge")
        for address in addresses:
            self.ip(f"addr add {address} dev {name}" + (" nodad" if ":" in address else ""))
        self.ip(f"link set {name} up")

    def pod(
        self, *families: int, addresses: Sequence[str] = (), gateways: Sequence[str] = (), bridge: str = "cni0"
    ) -> Pod:
        """Add a pod: dual stack, of the given families (4, 6) only, or with the given addresses and gateways."""
        number = next(self._numbers)
        if not addresses:
            both = {4: (f"10.88.0.{number}/24", BRIDGE4), 6: (f"fd00:88::{number:x}/64", BRIDGE6)}
            addresses, gateways = zip(*(both[family] for family in families or (4, 6)), strict=True)
        pod = Pod(self, number, addresses, gateways, bridge)
        self._closing.callback(pod.remove)
        return pod

    def start(
        self, command: str, pod: Pod | None, config: Mapping[str, Any], **variables: str
    ) -> subprocess.Popen[str]:
        """Start the executable on this node; ``CNI_*`` variables are given without the prefix."""
        environment = {"CNI_COMMAND": command, "CNI_PATH": "/opt/cni/bin"}
        if pod is not None:
            environment |= {"CNI_CONTAINERID": pod.id, "CNI_NETNS": pod.path, "CNI_IFNAME": "eth0"}
        environment |= {f"CNI_{name}": value for name, value in variables.items()}
        started = subprocess.Popen(
            ["nsenter", f"--net={self.path}", *(self.launcher or LAUNCHER)],
            env={name: value for name, value in environment.items() if value},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if started.stdin is None:
            raise AssertionError
        started.stdin.write(json.dumps(config))
        started.stdin.close()
        started.stdin = None
        return started

    def cni(self, command: str, pod: Pod | None, config: Mapping[str, Any], **variables: str) -> Outcome:
        """Run the executable on this node and wait for it."""
        return wait(self.start(command, pod, config, **variables))

    def add(self, pod: Pod, *mappings: Mapping[str, Any], **keys: Any) -> Outcome:
        """ADD these mappings for a pod, with further keys of the configuration, and see it succeed."""
        outcome = self.cni("ADD", pod, config(pod, *mappings, **keys))
        if outcome.status:
            raise AssertionError(outcome)
        return outcome

    def delete(self, pod: Pod, **keys: Any) -> Outcome:
        """DEL a pod as a runtime without a cache would, and see it succeed."""
        outcome = self.cni("DEL", pod, {"cniVersion": "1.1.0", "name": "pods", "type": "hostport", **keys})
        if outcome.status:
            raise AssertionError(outcome)
        return outcome

    def nft(self, command: str) -> str:
        """Run an nft command on this node and return its output."""
        return self.run("nft", *command.split(" ")).stdout

    def nft_file(self, text: str) -> None:
        """Load an nft file's text on this node."""
        self.run("nft", "-f", "-", input=text)

    def lose_ruleset(self) -> None:
        """Flush the ruleset, once no process is left of operations, which go on after their answer."""
        until = time.monotonic() + 60
        while self.processes():
            if time.monotonic() > until:
                raise TimeoutError(self.processes())
            time.sleep(0.01)
        self.nft("flush ruleset")

    def processes(self) -> list[str]:
        """Return the numbers of the processes that are in the namespace."""
        command = ["ip", "netns", "pids", self.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    def ruleset(self) -> str:
        """Return the plugin's table as nft prints it, without counters' values; empty where there is none."""
        return self.run("nft", "-s", "list", "table", "inet", "hostport", check=False).stdout

    def connections(self) -> dict[str, int]:
        """Return what each element of a port has counted, by its key as nft prints it."""
        counted = re.findall(r"([^\s{,][^{,]*) counter packets (\d+) ", self.nft("list table inet hostport"))
        return {key: int(packets) for key, packets in counted}

    def footprint(self, pod: Pod, network: str = "pods", ifname: str = "eth0") -> Counter[str]:
        """Count what the kernel holds of an attachment: elements by map, own maps, chains, rules; empty if nothing."""
        key = key_of(pod, network, ifname)
        counted: Counter[str] = Counter()
        for item in json.loads(self.nft("-j list ruleset"))["nftables"]:
            for kind, body in item.items():
                if kind == "map":
                    verdicts = (str(verdict) for _, verdict in body.get("elem", ()))
                    counted[body["name"]] += sum(key in verdict for verdict in verdicts) + body["name"].endswith(key)
                else:
                    counted[kind] += str(body.get("chain" if kind == "rule" else "name")).endswith(key)
        return +counted

    def holds(self, pod: Pod) -> bool:
        """Tell whether anything of the pod's is in the ruleset."""
        return pod.id[:12] in self.ruleset() or f"{pod.addresses[0].split('/')[0]} " in self.ruleset()


def key_of(pod: Pod, network: str = "pods", ifname: str = "eth0") -> str:
    """Return the key of an attachment of the pod's."""
    return Attachment(network, pod.id, ifname).key


def wait(started: subprocess.Popen[str]) -> Outcome:
    """Wait for what ``Node.start`` started."""
    stdout, stderr = started.communicate(timeout=180)
    return Outcome(started.returncode, stdout, stderr)


def mapping(host_port: int, container_port: int = 80, protocol: str = "tcp", **keys: Any) -> dict[str, Any]:
    """One entry of ``portMappings``."""
    return {"hostPort": host_port, "containerPort": container_port, "protocol": protocol, **keys}


def result(*addresses: str, sandbox: str = "/run/netns/pod", version: str = "1.1.0") -> dict[str, Any]:
    """A result of the ``bridge`` plugin: the bridge, the node's end, the container's interface with its addresses."""
    return {
        "cniVersion": version,
        "interfaces": [
            {"name": "cni0", "mac": "02:00:00:00:00:01"},
            {"name": "veth1", "mac": "02:00:00:00:00:02"},
            {"name": "eth0", "mac": "02:00:00:00:00:03", "sandbox": sandbox},
        ],
        "ips": [{"address": address, "interface": 2} for address in addresses],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dns": {},
    }


def config(pod: Pod, *mappings: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    """A network configuration as libcni sends it to ADD, for network ``pods`` unless ``name`` says otherwise.

    A port that is taken is refused at once, so that no test waits for what does not come.
    """
    return {
        "cniVersion": "1.1.0",
        "name": "pods",
        "type": "hostport",
        "capabilities": {"portMappings": True},
        "waitForHolder": 0,
        "runtimeConfig": {"portMappings": list(mappings)},
        "prevResult": result(*pod.addresses, sandbox=pod.path),
        **keys,
    }


def file_state(path: Path) -> tuple[int, int, int]:
    """Return what another file in its place, a write or a change of its mode alter, and reading does not."""
    status = path.lstat()
    return status.st_dev, status.st_ino, status.st_ctime_ns


def require(condition: object, reason: str) -> None:
    """Skip the test where something it needs is missing; fail it where everything has to run."""
    if condition:
        return
    if os.environ.get("HOSTPORT_TESTS_REQUIRE") == "all":
        pytest.fail(f"cannot run here: {reason}")
    pytest.skip(reason)
