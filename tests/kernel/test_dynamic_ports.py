from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import dynamic_ports
import pytest
import scratch
from dynamic_ports import PORTS, asking, given, name, noted, port, run, told
from lab import BRIDGE4, BRIDGE6, CLIENT4, CLIENT6, NODE4, NODE6, Node, config, mapping, result, wait

from cni_hostport.attachment import Attachment
from cni_hostport.dynamic_ports import keys
from cni_hostport.errors import CNIError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def _scratch(_kernel: None) -> Iterator[None]:
    with scratch.namespace():
        yield


in_scratch = pytest.mark.usefixtures("_scratch")


def refusal(command: str, number: int, text: str = "", *mappings: Any, **more: Any) -> tuple[int, str]:
    before = scratch.ruleset()
    with pytest.raises(CNIError) as caught:
        run(command, number, text, *mappings, **more)
    assert scratch.ruleset() == before
    return caught.value.code, caught.value.msg


@pytest.mark.parametrize("by", ["annotation", "capability", "both"])
def test_a_pod_is_reached_on_the_ports_that_it_was_given(node: Node, by: str) -> None:
    pod, neighbour = node.pod(), node.pod()
    text = f"80/tcp, 7777/udp, 9000-9002/udp, {NODE4}:443, [{NODE6}]:443/tcp"
    for protocol, number in (("tcp", 80), ("udp", 7777), ("udp", 9000), ("udp", 9001), ("udp", 9002), ("tcp", 443)):
        pod.serve(protocol, number, f"{number}")
    node.run("bridge", "link", "set", "dev", pod.host_end, "hairpin", "on")
    call = config(pod) | asking(text, by=by)
    added = node.cni("ADD", pod, call)
    assert (added.code, added.stderr) == (0, "")
    assert added.json == result(*pod.addresses, sandbox=pod.path)
    [ports] = given(node).values()
    assert set(ports.values()) <= set(PORTS)
    assert ports["9001/udp"] == ports["9000/udp"] + 1 == ports["9002/udp"] - 1
    for request, host_port in ports.items():
        target, protocol = request.rpartition(":")[2].split("/")
        for client, address in ((CLIENT4, NODE4), (CLIENT6, NODE6)):
            if f"{address}:" in request or f"[{address}]:" in request or target != "443":
                assert node.client.ask(protocol, address, host_port) == f"{target} {client}"
                assert pod.ask(protocol, address, host_port).startswith(f"{target} ")
            else:
                assert node.client.is_silent(protocol, address, host_port)
    for protocol, request in (("tcp", "80/tcp"), ("udp", "7777/udp")):
        assert node.ask(protocol, "127.0.0.1", ports[request]).startswith(request.split("/", maxsplit=1)[0])
        assert neighbour.ask(protocol, BRIDGE4, ports[request]).startswith(request.split("/", maxsplit=1)[0])
        assert neighbour.ask(protocol, BRIDGE6, ports[request]).startswith(request.split("/", maxsplit=1)[0])
    assert told(pod)["80/tcp"] == {"hostPort": ports["80/tcp"]}
    assert told(pod)[f"{NODE4}:443/tcp"] == {"hostPort": ports[f"{NODE4}:443/tcp"], "hostIP": NODE4}
    alias = f"hostport 80/tcp={ports['80/tcp']} 7777/udp={ports['7777/udp']} 9000-9002/udp={ports['9000/udp']} "
    assert noted(pod).startswith(alias)
    assert node.cni("CHECK", pod, call).code == 0
    node.delete(pod)
    assert (given(node), told(pod), node.footprint(pod)) == ({}, {}, {})
    assert node.client.is_silent("tcp", NODE4, ports["80/tcp"])
    assert node.client.is_silent("udp", NODE6, ports["7777/udp"])


@pytest.mark.parametrize("families", [(4,), (6,)])
def test_a_pod_of_one_family_has_its_ports_there(node: Node, families: tuple[int, ...]) -> None:
    pod = node.pod(*families)
    pod.serve("tcp", 80, "web")
    text = f"80/tcp, {NODE4}:81, [{NODE6}]:81, 0.0.0.0:82, [::]:82"
    added = node.cni("ADD", pod, config(pod) | asking(text))
    lacking = [f"{NODE4}:81/tcp", "0.0.0.0:82/tcp"] if families == (6,) else [f"[{NODE6}]:81/tcp", "[::]:82/tcp"]
    assert [line.split(" gets no host port")[0] for line in added.stderr.splitlines()] == [
        f"hostport: container port {request}" for request in lacking
    ]
    [ports] = given(node).values()
    assert len(ports) == 3
    assert not {*lacking} & {*ports}
    assert node.client.ask("tcp", NODE4 if families == (4,) else NODE6, ports["80/tcp"]).startswith("web ")
    assert node.cni("CHECK", pod, config(pod) | asking(text)).code == 0


@in_scratch
@pytest.mark.parametrize("unspecified", [{"hostPort": 0}, {"hostPort": None}, {}, {"HostPort": 0}], ids=str)
@pytest.mark.parametrize("text", ["", "443/tcp"])
def test_port_0_stays_unspecified(unspecified: dict[str, Any], text: str) -> None:
    for by in ("annotation", "capability"):
        run("ADD", 1, text, {"containerPort": 80, **unspecified}, by=by)
        assert [[*ports] for ports in given().values()] == ([[text]] if text else [])
        run("CHECK", 1, text, {"containerPort": 80, **unspecified}, by=by)
        assert ":80" not in scratch.ruleset()
        run("DEL", 1, text, {"containerPort": 80, **unspecified}, by=by)
        assert given() == {}


@in_scratch
def test_who_may_not_have_ports_is_told_why() -> None:
    code, text = refusal("ADD", 1, "80/tcp, 9000-9002/udp", dynamicPorts=None)
    assert (code, "80/tcp, 9000-9002/udp" in text, "it has no dynamicPorts" in text) == (7, True, True)
    code, text = refusal("ADD", 1, "1-17")
    assert (code, "these are 17, and dynamicPortsPerPod allows 16" in text) == (7, True)
    assert refusal("ADD", 1, "80", dynamicPortsPerPod=0)[0] == 7
    code, text = refusal("ADD", 1, ",".join(map(str, range(1, 801))))
    assert (code, text.endswith("...: these are 800, and dynamicPortsPerPod allows 16"), len(text) < 400) == (
        7,
        True,
        True,
    )
    wrong = "'80/xyz' has '80/xyz', whose protocol is not tcp, udp or sctp"
    assert refusal("ADD", 1, "80/xyz") == (7, f"runtimeConfig.{keys.ANNOTATIONS}.{keys.REQUEST} {wrong}")
    run("ADD", 1, "1-17", dynamicPortsPerPod=17)


@in_scratch
def test_a_full_range_is_told_and_so_is_one_without_neighbours() -> None:
    for number in range(3):
        run("ADD", number, "80", dynamicPorts="40000-40002")
    code, text = refusal("ADD", 3, "80", dynamicPorts="40000-40002")
    assert (code, text) == (100, "the range of dynamic host ports 40000-40002 is full: no port is free for 80/tcp")
    run("ADD", 3, "80/udp", dynamicPorts="40000-40002")
    first = min(port(number) for number in range(3) if port(number) != 40001)
    run("DEL", next(number for number in range(3) if port(number) == 40001))
    code, text = refusal("ADD", 4, "5-6", dynamicPorts="40000-40002, 50000")
    assert (code, first) == (100, 40000)
    assert text == (
        "the range of dynamic host ports 40000-40002, 50000 is full: no 2 neighbouring ports are free for 5-6/tcp"
    )


@in_scratch
def test_a_repeated_add_keeps_the_ports_and_takes_what_is_new() -> None:
    run("ADD", 1, "80, 9000-9001/udp")
    before = given()
    run("ADD", 1, "9000-9001/udp, 80")
    assert given() == before
    run("ADD", 1, "80, 9000-9001/udp, 81", mapping(8080))
    assert {**given()[name(1)], "81/tcp": 0} == {**before[name(1)], "81/tcp": 0}
    run("ADD", 1, "80")
    assert given() == {name(1): {"80/tcp": before[name(1)]["80/tcp"]}}
    run("ADD", 1, "", mapping(8080))
    assert (given(), told(name(1))) == ({}, {})
    run("ADD", 1, "80", dynamicPorts="41000-41999")
    assert port(1) in range(41000, 42000)
    run("ADD", 1, "80")  # a range that has changed since then moves nobody
    assert port(1) in range(41000, 42000)
    run("ADD", 1, "80", mapping(port(1)))
    assert port(1) in PORTS


@in_scratch
@pytest.mark.parametrize(
    ("before", "after", "ranges"),
    [
        (("80",), ("81",), "40000"),
        (("80, 53/udp",), ("53/udp, 81",), "40000"),
        (("9000-9001",), ("9000-9002",), "40000-40002"),
        (("", mapping(40000)), ("80",), "40000"),
        (("", mapping(40000, hostIP="192.0.2.1")), ("80",), "40000"),
    ],
    ids=["another", "one more", "a longer block", "a fixed one", "a fixed one of an address"],
)
def test_a_repeated_add_has_what_its_older_requests_leave(before: Any, after: Any, ranges: str) -> None:
    run("ADD", 1, *before, dynamicPorts=ranges)
    code, _ = refusal("ADD", 2, after[0], dynamicPorts=ranges)
    assert code == 100
    run("ADD", 1, *after, dynamicPorts=ranges)
    run("CHECK", 1, *after, dynamicPorts=ranges)
    assert [*given()] == [name(1)]
    assert refusal("ADD", 1, f"{after[0]}, 99", dynamicPorts=ranges)[0] == 100
    run("CHECK", 1, *after, dynamicPorts=ranges)


@in_scratch
def test_neighbours_are_looked_for_before_single_ports() -> None:
    for number in range(12):
        run("ADD", number, "80, 9000-9001", dynamicPorts="40000-40002")
        run("DEL", number)


@in_scratch
def test_host_addresses_limit_dynamic_ports_too() -> None:
    limits: Any = {"hostAddresses": ["192.0.2.0/24"]}
    run("ADD", 1, "80", **limits)
    run("CHECK", 1, "80", **limits)
    assert "ip daddr 192.0.2.0/24 tcp dport" in scratch.ruleset()
    assert f"ipv6 . tcp . {port(1)}" not in scratch.ruleset()
    assert "container port [::]:80/tcp gets no host port" in run("ADD", 1, "[::]:80", **limits)[0]
    assert given() == {}


@in_scratch
def test_a_pod_of_the_same_name_gets_the_same_port_again() -> None:
    names = [{"CNI_ARGS": f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-{number}"} for number in range(4)]
    asked = asking("80, 9000-9003/udp")
    taken = []
    for attempt in range(2):
        for number, variables in enumerate(names):
            container = f"{dynamic_ports.OWN}{attempt}{number}"
            scratch.run("ADD", container=container, addresses=[f"10.1.{number}.2/24"], variables=variables, **asked)
        taken.append(sorted(sorted(ports.items()) for ports in given().values()))
        for number in range(4):
            scratch.run("DEL", container=f"{dynamic_ports.OWN}{attempt}{number}", addresses=["10.1.0.2/24"])
    assert taken[0] == taken[1]
    assert len({dict(ports)["80/tcp"] for ports in taken[0]}) == 4


PORT, MAP = "ipv4 . tcp . {port}", "element inet hostport dynamic_ports"
DAMAGE = {
    "the port's element": f"delete element inet hostport hostports {{{{ {PORT} }}}}",
    "the dynamic port's element": f"delete {MAP} {{{{ {PORT} }}}}",
    "both dynamic elements": f"delete {MAP} {{{{ {PORT}, ipv6 . tcp . {{port}} }}}}",
    "all dynamic elements": "flush map inet hostport dynamic_ports",
    "another request": f"delete {MAP} {{{{ {PORT}, ipv6 . tcp . {{port}} }}}};"
    f'add {MAP} {{{{ {PORT} comment "81/tcp {{pod}}" : goto dnat-{{key}} }}}}',
    "another chain": f"delete {MAP} {{{{ {PORT} }}}};"
    f'add {MAP} {{{{ {PORT} comment "80/tcp {{pod}}" : goto masq-{{key}} }}}}',
    "the rules": "flush chain inet hostport dnat-{key}",
    "one more": f'add {MAP} {{{{ ipv4 . tcp . 8080 comment "8/tcp {{pod}}" : goto dnat-{{key}} }}}}',
}


@in_scratch
@pytest.mark.parametrize("damage", DAMAGE)
def test_check_sees_each_damage_and_the_next_add_and_del_mend_it(damage: str) -> None:
    key = Attachment("pods", name(1), "eth0").key
    wanted = "80", mapping(8080)
    run("ADD", 1, *wanted)
    run("CHECK", 1, *wanted)
    values = {"port": port(1), "key": key, "pod": name(1)}
    scratch.nft(DAMAGE[damage].format(**values))
    assert refusal("CHECK", 1, *wanted)[0] == 103
    run("ADD", 1, *wanted)
    run("CHECK", 1, *wanted)
    assert told(name(1)) == {"80/tcp": {"hostPort": port(1)}}
    scratch.nft(DAMAGE[damage].format(**values | {"port": port(1)}))
    run("DEL", 1, *wanted)
    assert (given(), told(name(1))) == ({}, {})
    assert key not in scratch.ruleset()


@in_scratch
def test_many_ports_are_looked_up_in_a_map_of_the_attachment() -> None:
    mappings = [mapping(8000 + number) for number in range(10)]

    def run_for_all(command: str) -> None:
        run(command, 1, "9000-9010/udp, 80, 192.0.2.1:80", *mappings)

    run_for_all("ADD")
    run_for_all("CHECK")
    assert "map any_ip4-" in scratch.ruleset()
    before = given()
    scratch.nft(f"delete element inet hostport dynamic_ports {{ ipv4 . tcp . {port(1)} }}")
    with pytest.raises(CNIError, match="not as installed"):
        run_for_all("CHECK")
    run_for_all("ADD")
    assert {**given()[name(1)], "80/tcp": 0} == {**before[name(1)], "80/tcp": 0}
    run("DEL", 1)
    assert (given(), told(name(1))) == ({}, {})
    assert "any_ip4-" not in scratch.ruleset()


@in_scratch
@pytest.mark.parametrize("known", [True, False], ids=["with runtimeConfig", "without"])
def test_del_needs_no_word_of_the_ports(known: bool) -> None:
    run("ADD", 1, "80, 53/udp")
    run("ADD", 2, "80")
    for _ in range(2):
        run("DEL", 1, "80, 53/udp" if known else "", prevResult=None, dynamicPorts=None)
        assert [*given()] == [name(2)]
    assert (told(name(1)), told(name(2))) == ({}, {"80/tcp": {"hostPort": port(2)}})
    scratch.nft("flush ruleset")
    assert told(name(2))
    run("DEL", 2, "80")
    assert told(name(2)) == {}


@in_scratch
def test_gc_and_status_know_dynamic_ports() -> None:
    for number in (1, 2):
        run("ADD", number, "80, 192.0.2.1:81")
    run("STATUS", 1)
    with pytest.raises(CNIError, match="dynamicPorts '7-3' has '7-3'"):
        run("STATUS", 1, dynamicPorts="7-3")
    valid: dict[str, Any] = {"cni.dev/valid-attachments": [{"containerID": name(2), "ifname": "eth0"}]}
    run("GC", 1, **valid)
    assert [*given()] == [name(2)]
    assert (told(name(1)), [*told(name(2))]) == ({}, [*sorted(told(name(2)), key=lambda text: given()[name(2)][text])])
    valid = {"cni.dev/valid-attachments": []}
    run("GC", 1, **valid)
    assert (given(), told(name(2))) == ({}, {})


def test_the_port_of_a_pod_that_is_gone_is_taken_over_when_no_other_is_free(node: Node) -> None:
    absent, *living = [node.pod(4) for _ in range(4)]
    wanted = asking("80", dynamicPorts="40000-40002")
    for pod in (absent, *living[:2]):
        assert node.cni("ADD", pod, config(pod) | wanted).code == 0
    former = given(node)[absent.id]
    refused = node.cni("ADD", living[2], config(living[2]) | wanted)
    assert (refused.code, "is full" in refused.msg) == (100, True)
    absent.remove()
    added = node.cni("ADD", living[2], config(living[2]) | wanted)
    assert (added.code, "takes over" in added.stderr) == (0, True)
    assert given(node)[living[2].id] == former
    assert (told(absent), told(living[2])) == ({}, {"80/tcp": {"hostPort": former["80/tcp"]}})


def test_a_pods_next_sandbox_has_the_port_of_the_one_that_is_gone(node: Node) -> None:
    first, second = node.pod(4), node.pod(4)
    uid = f"{dynamic_ports.OWN}uid"
    for pod in (first, second):
        assert node.cni("ADD", pod, config(pod) | asking("80"), ARGS=f"K8S_POD_UID={uid}").code == 0
        ports = given(node)[uid]
        if pod is first:
            before = ports
            pod.remove()
    assert ports == before
    assert told(uid) == {"80/tcp": {"hostPort": ports["80/tcp"]}}
    node.delete(first)
    assert given(node) == {uid: before}
    assert node.cni("CHECK", second, config(second) | asking("80"), ARGS=f"K8S_POD_UID={uid}").code == 0


def test_an_add_waits_for_a_port_of_a_full_range(node: Node) -> None:
    leaving, waiting = node.pod(4), node.pod(4)
    wanted = asking("80", dynamicPorts="40000", waitForHolder=20)
    assert node.cni("ADD", leaving, config(leaving) | wanted).code == 0
    started = node.start("ADD", waiting, config(waiting) | wanted)
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(1)
    node.delete(leaving)
    assert wait(started).code == 0
    assert [*given(node)] == [waiting.id]
