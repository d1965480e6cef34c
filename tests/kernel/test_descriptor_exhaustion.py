"""What is asked of the kernel by a process that has no descriptor left: nothing is taken for absent."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from lab import LAUNCHER, Node, key_of, mapping
from libcni_cache import Cache
from restoration import restore

if TYPE_CHECKING:
    from pathlib import Path

    from lab import Pod

BEFORE = """
import os, resource, socket
from ipaddress import ip_address, ip_interface
from cni_hostport import upgrade
from cni_hostport.kernel import interfaces, ipvs, localnet, namespaces, netns, presence, routes
from cni_hostport.attachment import Attachment
from cni_hostport.ruleset.comment import Owner
from cni_hostport.errors import CNIError
from cni_hostport.ruleset.plan import Plan

index = socket.if_nametoindex("cni0")
attachment = Attachment("pods", "c1", "eth0", NETNS)
presence.note(attachment)

class Guard:
    def localnet_left(self, interface):
        return True
    def unguard(self, interface):
        print("the guard is gone")
        return True

resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1,) * 2)
try:
    print("returned", WHAT)
except CNIError as error:
    print(int(error.code), error)
except OSError as error:
    print(error.errno, error)
"""
EMFILE = "24 [Errno 24] Too many open files"


def outcome(node: Node, what: str, pod: Pod | None = None) -> str:
    """Return what comes of an expression when there is no descriptor left."""
    script = BEFORE.replace("WHAT", what).replace("NETNS", repr(pod.path if pod else "/run/netns/none"))
    return node.run(sys.executable, "-Ic", script).stdout.strip()


@pytest.mark.parametrize(
    "question",
    [
        'interfaces.index("cni0")',
        "interfaces.name(index)",
        "interfaces.kind(index)",
        "ipvs.addresses()",
        'routes.route_to(ip_address("10.88.0.2"))',
        'routes.pod_routes([ip_interface("10.88.0.2/24")])',
        "upgrade.if_nameindex() and interfaces.index('lo')",
    ],
)
def test_an_interface_or_a_route_that_cannot_be_asked_for_is_not_absent(node: Node, question: str) -> None:
    assert outcome(node, question) == EMFILE


def test_whether_an_interface_is_open_is_an_error_and_not_no(node: Node) -> None:
    assert outcome(node, "localnet.is_open(index)").startswith("102 cannot read route_localnet of interface")


@pytest.mark.parametrize("interface", ["index", "0"], ids=["with a route", "without one"])
def test_what_cannot_be_opened_is_an_error_of_the_nodes_settings(node: Node, interface: str) -> None:
    plan = f'Plan((), {{ip_address("10.88.0.2"): ("10.88.0.0/24",)}}, interface={interface})'
    output = outcome(node, f"localnet.open_for({plan}, print)")
    assert output.startswith("102 cannot ")
    assert "no route" not in output


def test_the_guard_stays_where_it_cannot_be_told_whether_the_interface_is_there(node: Node) -> None:
    output = outcome(node, "localnet.close(Guard(), index, print)")
    assert "the guard is gone" not in output
    assert "stays 1, and the interface guarded" in output


def test_a_pod_is_not_gone_because_it_cannot_be_looked_at(node: Node) -> None:
    pod = node.pod(4)
    output = outcome(node, "namespaces.pod_interface(NETNS, 'eth0')".replace("NETNS", repr(pod.path)), pod)
    assert output.startswith("102 ")
    assert "cannot be looked at: [Errno 24] Too many open files" in output


def test_a_holder_that_cannot_be_looked_at_lives(node: Node) -> None:
    pod = node.pod(4)
    assert outcome(node, "presence.View().lives(Owner.from_attachment(attachment))", pod) == "returned None"
    assert outcome(node, "presence.note(attachment)", pod).startswith(f"102 cannot look at CNI_NETNS '{pod.path}'")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cni")


def attachments(node: Node, cache: Cache, *numbers: int) -> Pod:
    """Have a pod with many addresses, and a host port on each in a network of its own, as a runtime knows them."""
    pod = node.pod(4)
    node.ip("addr add 10.88.254.1/16 dev cni0")
    for n in numbers:
        address = f"10.88.{1 + n // 250}.{1 + n % 250}/16"
        pod.ip(f"addr add {address} dev eth0")
        cache.add(pod, mapping(8000 + n), network=f"n{n}", result={"ips": [{"address": address}]})
    return pod


def test_more_pods_than_descriptors_are_looked_at_and_restored(node: Node, cache: Cache) -> None:
    pod = attachments(node, cache, *range(80))
    few = ["prlimit", "--nofile=64:64", *LAUNCHER, "restore", "--watch=0", f"--cache-dir={cache.directory}"]
    assert node.run(*few).stderr == "80 restored\n"
    for n in range(70, 80):
        key, address = key_of(pod, f"n{n}"), f"10.88.1.{n + 1}"
        node.nft_file(
            f"delete element inet hostport hostports {{ ipv4 . tcp . {8000 + n} }}\n"
            f"delete element inet hostport pods_ip4 {{ {address} }}\n"
            f"delete chain inet hostport dnat-{key}\ndelete chain inet hostport masq-{key}\n"
        )
    assert node.run(*few).stderr == "70 present, 10 restored\n"


def test_for_want_of_descriptors_pods_are_failures_or_restored(node: Node, cache: Cache) -> None:
    attachments(node, cache, *range(3))
    outcomes = set()
    for descriptors in range(4, 24):
        node.nft("flush ruleset")
        limit = f"--nofile={descriptors}:{descriptors}"
        command = ["prlimit", limit, *LAUNCHER, "restore", "--watch=0", f"--cache-dir={cache.directory}"]
        ran = node.run(*command, check=False)
        assert "gone" not in ran.stderr
        assert (ran.returncode == 0) == (ran.stderr == "3 restored\n"), ran
        outcomes.add(ran.returncode)
    assert outcomes == {0, 1}


USED = """
import json, os, resource, sys
from cni_hostport.operate.cli import main
try:
    main(sys.argv[1:], prog_name="hostport")
except SystemExit as end:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(os.listdir("/proc/self/fd"))
    print(json.dumps([end.code or 0, *used]))
"""


@pytest.mark.parametrize("command", [["restore", "--watch=0"], ["doctor", "--conf-dir=/none"]])
def test_neither_memory_nor_descriptors_grow_with_the_pods(node: Node, tmp_path: Path, command: list[str]) -> None:
    few, many = Cache(tmp_path / "few"), Cache(tmp_path / "many")
    pod = attachments(node, many, *range(150))
    for n in range(30):
        path = many.path(pod, f"n{n}")
        (few.directory / "results" / path.name).write_bytes(path.read_bytes())
    assert restore(node, many) == "150 restored\n"

    def used(cache: Cache) -> tuple[int, int]:
        ran = node.run(sys.executable, "-Ic", USED, *command, f"--cache-dir={cache.directory}")
        status, memory, descriptors = json.loads(ran.stdout.splitlines()[-1])
        assert status == 0 or command[0] == "doctor", ran
        return memory, descriptors

    (memory_of_few, descriptors_of_few), (memory, descriptors) = used(few), used(many)
    assert memory < 1.3 * memory_of_few
    assert descriptors == descriptors_of_few
