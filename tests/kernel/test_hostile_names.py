from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from lab import LAUNCHER, Node, config, mapping
from libcni_cache import Cache

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab import Namespace

SERVER = """
import socket, time
listening = [socket.socket(family) for family in (socket.AF_INET, socket.AF_INET6)]
listening[1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
for one in listening:
    one.bind(("", PORT))
    one.listen()
print(flush=True)
time.sleep(300)
"""
NAMES = [b"\x1b[2J\nok all fine", "\u202e\u2066\u009b2J".encode(), b"\xff\xfe\x1b]0;x\x07", b"x" * 250]
names = pytest.mark.parametrize("name", NAMES, ids=ascii)


@contextmanager
def program(directory: Path, name: bytes, namespace: Namespace, port: int) -> Iterator[None]:
    """Have a program with this name listen on a port."""
    path = os.fsencode(directory) + b"/" + name
    os.symlink(sys.executable, path)
    command: list[str | bytes] = ["nsenter", f"--net={namespace.path}", path, "-Sc", SERVER.replace("PORT", str(port))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield
        finally:
            process.kill()


def interface(namespace: Namespace, name: bytes, address: str = "") -> None:
    """Add an interface, that is up, with this name."""
    namespace.ip("link add renamed type bridge")
    subprocess.run([b"ip", b"-n", namespace.name.encode(), b"link", b"set", b"renamed", b"name", name], check=True)
    if address:
        subprocess.run([*f"ip -n {namespace.name} addr add {address} dev".split(), name], check=True)
    subprocess.run([*f"ip -n {namespace.name} link set up dev".split(), name], check=True)


def said(node: Node, *arguments: str) -> list[str]:
    """Run a command, and return the lines of its output, of which each is one of its own."""
    command = ["nsenter", f"--net={node.path}", *LAUNCHER, *arguments]
    ran = subprocess.run(command, capture_output=True, check=False)
    assert ran.returncode in {0, 1}
    text = ran.stdout.decode() + ran.stderr.decode()
    lines = text.removesuffix("\n").split("\n")
    assert [line for line in lines if not line.isprintable() or line.startswith("Traceback")] == []
    return lines


@names
def test_the_programs_of_a_pod_cannot_speak_for_explain(node: Node, tmp_path: Path, name: bytes) -> None:
    pod = node.pod(4)
    with program(tmp_path, name, pod, 80):
        node.add(pod, mapping(8080))
        lines = said(node, "explain", "8080")
        assert all(line.startswith(("ok  ", "note  ", "problem  ", "   ")) for line in lines)
        assert sum("listens there on 80/tcp" in line for line in lines) == 1
        assert max(map(len, lines)) < 300
        said(node, "explain", "8080", "--json")


@names
def test_the_programs_of_the_node_cannot_speak_for_doctor_or_explain(node: Node, tmp_path: Path, name: bytes) -> None:
    pod = node.pod(4)
    node.add(pod, mapping(8080))
    with program(tmp_path, name, node, 8080), program(tmp_path, name + b".", node, 9090):
        places = f"--conf-dir={tmp_path}", f"--cache-dir={tmp_path}"
        lines = said(node, "doctor", *places)
        assert all(line.startswith(("ok  ", "note  ", "problem  ", "   ")) for line in lines)
        assert sum("listens on 0.0.0.0:8080/tcp" in line for line in lines) == 1
        assert sum("on this node listens on it" in line for line in said(node, "explain", "9090")) == 2


@pytest.mark.parametrize("name", [b"\xff\xfe$(id)", b"\x1b[2J\xc2\x9b", "\u202e\u2066".encode()], ids=ascii)
def test_a_pod_may_call_its_interfaces_what_it_likes(node: Node, name: bytes) -> None:
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    interface(pod, name)
    node.add(pod, mapping(8080))
    assert f"ok       eth0 of container {pod.id} is up and has {pod.ip4}" in said(node, "explain", "8080")


@pytest.mark.parametrize("name", [b"$(id)\xff", b"\x1b[2J", b'a"drop', b"cni*"], ids=ascii)
def test_an_interface_of_the_node_may_have_any_name_that_the_kernel_takes(
    node: Node, tmp_path: Path, name: bytes
) -> None:
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    interface(node, name, "198.51.100.1/24")
    lines = said(node, "explain", "8080", "--from", "198.51.100.7")
    assert any("the path of a connection could not be traced: the name of interface" in line for line in lines)
    for command in (["list"], ["metrics"], ["doctor", f"--conf-dir={tmp_path}", f"--cache-dir={tmp_path}"]):
        said(node, *command)


def test_an_interface_in_a_command_for_a_shell_is_quoted(node: Node) -> None:
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    node.add(pod, mapping(8080))
    interface(node, b"$(id>&2)", "198.51.100.1/24")
    node.set_sysctl("net/ipv4/conf/$(id>&2)/forwarding", 0)
    lines = said(node, "explain", "8080", "--from", "198.51.100.7")
    (command,) = (line.strip().removeprefix("-> ") for line in lines if "sysctl" in line)
    assert shlex.split(command) == ["sysctl", "-w", "net.ipv4.conf.$(id>&2).forwarding=1"]


@pytest.mark.parametrize("ifname", [b"\xff\xfe", b"\x1b[2J"], ids=ascii)
def test_an_attachment_whose_interface_has_a_strange_name_is_added_and_deleted(node: Node, ifname: bytes) -> None:
    pod = node.pod(4)
    node.serve("tcp", 8080, "program")
    asked = config(pod, mapping(8080), prevResult={"ips": [{"address": pod.addresses[0]}]})
    added = node.cni("ADD", pod, asked, IFNAME=os.fsdecode(ifname))
    assert (added.status, added.json["ips"]) == (0, [{"address": pod.addresses[0]}])
    assert "a program of this node listens on it" in added.stderr
    assert all(map(str.isprintable, added.stderr.splitlines()))
    assert node.cni("DEL", pod, asked, IFNAME=os.fsdecode(ifname)).status == 0
    assert not node.holds(pod)


def test_the_files_of_a_cache_may_have_any_name_and_hold_any_text(node: Node, tmp_path: Path) -> None:
    pod = node.pod(4)
    cache = Cache(tmp_path / "cni")
    hostile = "\x1b[2J\nok all fine\u202e\udcff"
    kinds: dict[bytes, dict[str, Any]] = {
        b"ifname": {"ifName": "\x1b[2J"},
        b"netns": {"netns": f"/nonexistent/{hostile}"},
        b"port": {"capabilityArgs": {"portMappings": [{"hostPort": hostile}]}},
        b"key": {"capabilityArgs": {"portMappings": [{"hostPort": 1, "containerPort": 1, "protocol": hostile}]}},
        b"network": {"networkName": hostile},
        b"pod": {"cniArgs": [["K8S_POD_NAME", hostile], ["K8S_POD_NAMESPACE", hostile]]},
        b"result": {"result": {"ips": {hostile: 1}}},
        b"config": {"config": hostile},
    }
    for name, keys in kinds.items():
        written = cache.add(pod, mapping(8080), **keys)
        os.rename(written, os.fsencode(written.parent) + b"/\x1b[2J\nok fine\xff" + name)
    said(node, "restore", "--watch", "0", f"--cache-dir={cache.directory}", "--dry-run")
    said(node, "restore", "--watch", "0", f"--cache-dir={cache.directory}")
    said(node, "doctor", f"--conf-dir={tmp_path}", f"--cache-dir={cache.directory}")
    json.loads("\n".join(said(node, "doctor", f"--conf-dir={tmp_path}", f"--cache-dir={cache.directory}", "--json")))


def test_the_files_of_configurations_may_have_any_name_and_hold_any_text(node: Node, tmp_path: Path) -> None:
    hostile = "\x1b[2J\nok all fine\u202e\udcff"
    plugin = {"type": "hostport", "capabilities": {"portMappings": True}}
    kinds: list[dict[str, Any]] = [
        {"name": hostile},
        {"cniVersion": hostile},
        {"plugins": [{"type": hostile}, plugin]},
        {"plugins": [{"type": "bridge"}, {**plugin, "backend": hostile}]},
        {"plugins": [{"type": "bridge"}, {**plugin, "snat": {hostile: hostile}}]},
        {"plugins": {hostile: hostile}},
    ]
    for number, keys in enumerate(kinds):
        conflist = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}, plugin], **keys}
        (tmp_path / os.fsdecode(b"\x1b[2J\nok fine\xff%d.conflist" % number)).write_text(json.dumps(conflist))
    lines = said(node, "doctor", f"--conf-dir={tmp_path}", f"--cache-dir={tmp_path}")
    assert all(line.startswith(("ok  ", "note  ", "problem  ", "   ")) for line in lines)


def test_the_owner_of_a_table_may_have_any_name(node: Node, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\x1b[2J\nok"
    os.symlink("/usr/sbin/nft", path)
    pod = node.pod(4)
    node.add(pod, mapping(8080))
    with subprocess.Popen(
        [b"nsenter", f"--net={node.path}", path, "-i"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as owner:
        assert owner.stdin is not None
        owner.stdin.write(b"add table inet owned { flags owner; }\n")
        owner.stdin.write(b"add chain inet owned f { type filter hook forward priority 0; policy drop; }\n")
        owner.stdin.flush()
        try:
            while "owned" not in node.nft("list tables"):
                pass
            lines = said(node, "doctor", f"--conf-dir={tmp_path}", f"--cache-dir={tmp_path}")
            assert any(f"Only \\udcff\\x1b[2J\\nok (process {owner.pid}) can change" in line for line in lines)
        finally:
            owner.kill()
