from __future__ import annotations

import re
import socket
import subprocess
from contextlib import ExitStack
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import resident
import scratch
from dynamic_ports import BARE, FILES, asking, given, name, port, run, told
from lab import NODE4, NODE6, Node, config, mapping, wait

from cni_hostport.attachment import Attachment
from cni_hostport.dynamic_ports import assignment, picker
from cni_hostport.errors import CNIError
from cni_hostport.lookup import Lookup

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cni_hostport.netlink import Message

ADDRESSES = ["", "0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "127.0.0.1"]


@pytest.fixture
def _scratch(_kernel: None) -> Iterator[None]:
    with scratch.namespace():
        yield


in_scratch = pytest.mark.usefixtures("_scratch")


@in_scratch
@pytest.mark.parametrize("text", ["80", "0.0.0.0:80", "[::]:80", "192.0.2.1:80", "[2001:db8::1]:80"])
def test_fixed_ports_and_dynamic_ones_never_collide(text: str) -> None:
    families = {"[": (6,), "8": (4, 6)}.get(text[0], (4,))
    for host_ip in ADDRESSES:
        version = {"": families[0]}.get(host_ip, 6 if ":" in host_ip else 4)
        fixed = [mapping(number, 80, hostIP=host_ip) for number in (40000, 40001, 40003)]
        scratch.run("ADD", *fixed, container="c1")
        run("ADD", 1, text, dynamicPorts="40000-40004")
        [host_port] = given()[name(1)].values()
        assert version not in families or host_port in {40002, 40004}
        scratch.run("DEL", container="c1")
        before = without_handles()
        for later in ADDRESSES:
            wanted = mapping(host_port, hostIP=later)
            if later == "" or (6 if ":" in later else 4) in families:
                with pytest.raises(CNIError, match=f"host port {host_port}/tcp.* is taken by container {name(1)[:12]}"):
                    scratch.run("ADD", wanted, container="c2", waitForHolder=0)
                assert without_handles() == before
            else:
                scratch.run("ADD", wanted, container="c2")
                scratch.run("DEL", container="c2")
        scratch.run("ADD", mapping(host_port, protocol="udp"), container="c2")
        for container in (name(1), "c2"):
            scratch.run("DEL", container=container, addresses=["10.1.0.9/24"])


def without_handles() -> str:
    """Return the ruleset, but for what comes and goes without an effect."""
    return re.sub(r" # handle \d+|\tset deleted .*?\n\t}", "", scratch.ruleset(), flags=re.DOTALL)


@in_scratch
@pytest.mark.parametrize("lost", ["hostports", "dynamic_ports"])
@pytest.mark.parametrize("asked", ["the port", "a port of the range"])
def test_half_a_dynamic_port_is_still_the_pods(lost: str, asked: str) -> None:
    run("ADD", 1, "80", dynamicPorts="40000")
    scratch.nft(f"flush map inet hostport {lost}")
    text, mappings = ("", [mapping(40000)]) if asked == "the port" else ("80", [])
    reason = f"host port 40000/tcp is taken by container {name(1)[:12]}" if mappings else "is full"
    with pytest.raises(CNIError, match=reason) as caught:
        run("ADD", 2, text, *mappings, dynamicPorts="40000")
    assert caught.value.code == 100
    run("DEL", 1)
    run("ADD", 2, "80", dynamicPorts="40000")
    assert given() == {name(2): {"80/tcp": 40000}}


@in_scratch
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("address", ["0.0.0.0", "::", "127.0.0.1", "::1"])
def test_the_port_of_a_program_that_listens_is_left_to_it(protocol: str, address: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with ExitStack() as opened:
        for number in (40000, 40002, 40003):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            program = opened.enter_context(socket.socket(family, kind))
            program.bind((address, number))
            if protocol == "tcp":
                program.listen()
        run("ADD", 1, f"80/{protocol}", dynamicPorts="40000-40003")
        assert port(1, f"80/{protocol}") == 40001
        other = "udp" if protocol == "tcp" else "tcp"
        for number in range(2, 6):
            run("ADD", number, f"80/{other}", dynamicPorts="40000-40003")
        with pytest.raises(CNIError, match="is full"):
            run("ADD", 6, f"80/{protocol}", dynamicPorts="40000-40003")
        with pytest.raises(CNIError, match="no 2 neighbouring ports"):
            run("ADD", 6, f"80-81/{protocol}", dynamicPorts="40000-40003")


@in_scratch
def test_a_crowded_range_is_searched_to_its_last_port() -> None:
    taken = [mapping(number, hostIP="192.0.2.7" if number % 2 else "") for number in range(40000, 41000)]
    del taken[567:569]
    scratch.run("ADD", *taken, container="c1", addresses=["10.1.200.2/24"])
    run("ADD", 1, "80-81", dynamicPorts="40000-40999", addresses=["10.1.201.2/24"])
    assert [*given()[name(1)].values()] == [40567, 40568]
    with pytest.raises(CNIError, match="is full: no port is free for 80/tcp"):
        run("ADD", 2, "80", dynamicPorts="40000-40999", addresses=["10.1.202.2/24"])


@in_scratch
@pytest.mark.parametrize(
    ("size", "text", "host_ip"),
    [(1, "80", NODE4), (2, "80", NODE6), (2, f"{NODE4}:80", ""), (2, f"[{NODE6}]:80", "::")],
)
def test_a_port_that_is_mapped_for_other_addresses_at_the_same_time_is_given_up(
    monkeypatch: pytest.MonkeyPatch, size: int, text: str, host_ip: str
) -> None:
    picked: list[int] = []
    pick = picker.Picker.pick  # between a look and a claim there is no other place

    def pick_and_lose(self: Any, kept: Any) -> Any:
        found = pick(self, kept)
        if not picked:
            picked.extend(found.values())
            scratch.run("ADD", mapping(picked[0], hostIP=host_ip), container="c1", waitForHolder=0)
        return found

    monkeypatch.setattr(picker.Picker, "pick", pick_and_lose)
    ranges = f"40000-{39999 + size}"
    if size == 1:
        with pytest.raises(CNIError, match="the range of dynamic host ports 40000 is full"):
            run("ADD", 1, text, dynamicPorts=ranges)
        assert Attachment("pods", name(1), "eth0").key not in scratch.ruleset().partition("set deleted")[0]
    else:
        run("ADD", 1, text, dynamicPorts=ranges)
        assert {*given()[name(1)].values(), picked[0]} == {40000, 40001}
        run("CHECK", 1, text, dynamicPorts=ranges)
    scratch.run("CHECK", mapping(picked[0], hostIP=host_ip), container="c1")


@in_scratch
@pytest.mark.parametrize("text", ["80", f"{NODE4}:80", "80-81"])
@pytest.mark.parametrize("crowd", [0, 62], ids=["a free range", "a full one"])
@pytest.mark.parametrize("is_new", [True, False], ids=["new", "known"])
def test_a_pod_whose_other_network_is_added_at_the_same_time_has_each_port_once(
    monkeypatch: pytest.MonkeyPatch, text: str, crowd: int, *, is_new: bool
) -> None:
    if not is_new:
        (FILES / name(1)).mkdir(parents=True)
    taken = [mapping(number) for number in range(40000, 40000 + crowd)]
    scratch.run("ADD", *taken, container="c1")
    other: dict[str, Any] = {
        "name": "second", "addresses": ["10.2.0.2/24", "fd00:2::2/64"], "variables": {"CNI_IFNAME": "eth1"}
    }  # fmt: skip
    pick = picker.Picker.pick

    def pick_late(self: Any, kept: Any) -> Any:
        monkeypatch.setattr(picker.Picker, "pick", pick)
        run("ADD", 1, text, **other)
        return pick(self, kept)

    monkeypatch.setattr(picker.Picker, "pick", pick_late)
    run("ADD", 1, text)
    [ports] = given().values()
    listed = scratch.ruleset().partition("map dynamic_ports")[2].partition("\t}")[0]
    assert listed.count(name(1)) == len(ports) * (1 if NODE4 in text else 2)
    for keys in ({}, other):
        run("CHECK", 1, text, **keys)


@in_scratch
@pytest.mark.parametrize("spoiled", [range(2), range(100), range(1, 100)], ids=["twice", "always", "afterwards"])
def test_a_look_at_the_ports_of_single_addresses_that_others_spoil_is_taken_again(
    monkeypatch: pytest.MonkeyPatch, spoiled: range
) -> None:
    scratch.run("ADD", mapping(40000, hostIP=NODE4), container="c1")
    dump, looks = Lookup.dump, count()

    def dump_or_not(self: Lookup, message: Message) -> list[bytes] | None:
        return None if b"hostports_ip" in message[2] and next(looks) in spoiled else dump(self, message)

    monkeypatch.setattr(assignment, "PAUSES", (0,) * 5)
    monkeypatch.setattr(Lookup, "dump", dump_or_not)
    if len(spoiled) < 5:
        run("ADD", 1, "80", dynamicPorts="40000-40001")
        assert port(1) == 40001
    else:
        with pytest.raises(CNIError, match="hostports_ip4 are changed all the time"):
            run("ADD", 1, "80", addresses=["10.2.0.2/24"], dynamicPorts="40000-40001")
        assert given() == {}


def answers(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    return [(outcome.code, outcome.msg) for outcome in map(wait, started)]


@pytest.mark.parametrize("count", [64, 24], ids=["64, each a process", "24 by the resident process"])
def test_as_many_adds_at_once_as_a_range_has_ports_all_get_one(node: Node, tmp_path: Path, count: int) -> None:
    *pods, late = [node.pod(4) for _ in range(count + 1)]
    wanted = asking("80", dynamicPorts=f"40000-{39999 + count}")
    with ExitStack() as running:
        if count < 64:
            running.enter_context(resident.Resident(tmp_path / "socket"))
            node.launcher = resident.launcher(tmp_path, tmp_path / "socket")
        fixed = [node.pod(4) for _ in range(4)]
        started = [node.start("ADD", pod, config(pod, mapping(8000 + n))) for n, pod in enumerate(fixed)]
        started += [node.start("ADD", pod, config(pod) | wanted) for pod in pods]
        assert [(code, msg) for code, msg in answers(started) if code] == []
        ports = {pod: found["80/tcp"] for pod, found in given(node).items()}
        assert sorted(ports.values()) == [*range(40000, 40000 + count)]
        assert [told(pod) for pod in pods] == [{"80/tcp": {"hostPort": ports[pod.id]}} for pod in pods]
        refused = node.cni("ADD", late, config(late) | wanted)
        assert refused.code == 100
        assert f"the range of dynamic host ports 40000-{39999 + count} is full: no port is free" in refused.msg
        codes = [code for code, _ in answers([node.start("DEL", pod, BARE) for pod in pods])]
        assert (codes, given(node)) == ([0] * count, {})
        assert not any(map(told, pods))


def test_fixed_ports_of_a_range_and_dynamic_ones_at_once(node: Node) -> None:
    pods = [node.pod(4) for _ in range(16)]
    calls = [
        config(pod) | asking("80", dynamicPorts="40000-40009")
        if number % 2
        else config(pod, mapping(40000 + number // 2, hostIP=NODE4 if number % 4 else ""))
        for number, pod in enumerate(pods)
    ]
    found = answers([node.start("ADD", pod, call) for pod, call in zip(pods, calls, strict=True)])
    assert {code for code, _ in found} == {0, 100}
    fixed = {40000 + number // 2 for number, (code, _) in enumerate(found) if not number % 2 and not code}
    dynamic = [ports["80/tcp"] for ports in given(node).values()]
    assert len(dynamic) == sum(not code for code, _ in found[1::2])
    assert not fixed & {*dynamic}
    assert len(dynamic) == min(8, 10 - len(fixed))  # in which order ever they came
    for pod, (code, _) in zip(pods, found, strict=True):
        assert bool(node.footprint(pod)) == (not code)
    checked = [
        node.start("CHECK", pod, call) for pod, call, (code, _) in zip(pods, calls, found, strict=True) if not code
    ]
    assert {code for code, _ in answers(checked)} == {0}


@in_scratch
def test_the_table_of_a_version_before_is_no_obstacle() -> None:
    scratch.run("ADD", mapping(8080), container="c1")
    scratch.run("ADD", mapping(8081), container="c2")
    listed = scratch.ruleset()
    older = re.sub(r"\tmap dynamic_ports \{.*?\n\t\}\n", "", listed, flags=re.DOTALL)
    assert older != listed

    def age() -> None:
        scratch.nft("delete table inet hostport")
        scratch.nft(re.sub("# handle.*", "", older))

    age()
    assert Lookup().find(scratch.KEY)
    with pytest.raises(CNIError, match="dynamic_ports"):
        scratch.run("CHECK", mapping(8080), container="c1")
    with pytest.raises(CNIError, match="has no dynamic host port any more"):
        run("CHECK", 1, "80")
    run("DEL", 1, "80")
    scratch.run("DEL", container="c1")
    assert "dynamic_ports" not in scratch.ruleset()
    gc: dict[str, Any] = {"cni.dev/valid-attachments": []}
    scratch.run("GC", **gc)
    assert ("8081" in scratch.ruleset(), "dynamic_ports" in scratch.ruleset()) == (False, False)
    age()
    run("ADD", 1, "80")
    scratch.run("CHECK", mapping(8080), container="c1")
    run("CHECK", 1, "80")
    age()
    scratch.run("ADD", mapping(8080), container="c1")
    assert "map dynamic_ports" in scratch.ruleset()
