"""Dynamic host ports, what pods are told of them and the notes on interfaces, through the loss of any of these."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from attack import fork
from dynamic_ports import FILES, asking, given, noted, told
from lab import CLIENT4, NODE4, NODE6, Node, Pod, config, mapping
from libcni_cache import Cache
from restoration import restore
from restoration import running as restored_pod

from cni_hostport import ownership
from cni_hostport.dynamic_ports import assignment, keys
from cni_hostport.lookup import Lookup
from cni_hostport.operate import cli

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cni_hostport.kernel.nft import Nft


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cni")


def running(
    node: Node, cache: Cache, text: str, *, ports: str = "40000-40063", name: str = "", families: Sequence[int] = (4,)
) -> Pod:
    """Have a pod with dynamic host ports, as a runtime leaves it behind; its name decides which it is given."""
    pod = node.pod(*families)
    pod.serve("tcp", 80, pod.name)
    args = {"K8S_POD_NAMESPACE": "shop", "K8S_POD_NAME": name or pod.host_end}
    asked = asking(text, dynamicPorts=ports)
    call = config(pod) | asked
    added = node.cni("ADD", pod, call, ARGS=";".join(f"{key}={value}" for key, value in args.items()))
    assert added.status == 0, added
    plugin = {"type": "hostport", "dynamicPorts": ports, "capabilities": {keys.ANNOTATIONS: True}}
    cache.add(pod, plugin=plugin, capabilityArgs=asked["runtimeConfig"], cniArgs=[[*item] for item in args.items()])
    return pod


def checked(node: Node, pod: Pod, text: str, ports: str = "40000-40063") -> int:
    return node.cni("CHECK", pod, config(pod) | asking(text, dynamicPorts=ports)).code


def test_pods_get_the_very_ports_that_they_had(node: Node, cache: Cache) -> None:
    first = running(node, cache, "80", name="web")
    pushed = [running(node, cache, "80", name="web") for _ in range(3)]  # they all want the same
    block = running(node, cache, f"9000-9003/udp, 80, {NODE4}:443")
    before = given(node)
    node.delete(first)
    cache.remove(first)
    del before[first.id]
    node.lose_ruleset()
    assert restore(node, cache) == "4 restored\n"
    assert given(node) == before
    for pod in pushed:
        assert node.client.ask("tcp", NODE4, before[pod.id]["80/tcp"]) == f"{pod.name} {CLIENT4}"
        assert told(pod) == {"80/tcp": {"hostPort": before[pod.id]["80/tcp"]}}
    assert checked(node, block, f"9000-9003/udp, 80, {NODE4}:443") == 0
    assert {text: port["hostPort"] for text, port in told(block).items()} == before[block.id]
    node.nft("flush map inet hostport dynamic_ports")
    assert restore(node, cache) == "4 restored\n"
    assert given(node) == before
    node.nft("flush map inet hostport hostports")
    assert restore(node, cache) == "4 restored\n"
    assert given(node) == before
    assert restore(node, cache) == "4 present\n"


def test_a_file_that_is_lost_or_wrong_is_made_again_though_no_port_was_lost(node: Node, cache: Cache) -> None:
    pod = running(node, cache, "80, 9000-9001/udp")
    before, file = told(pod), FILES / pod.id / "dynamic-ports.json"
    for wrong in (None, "{}", "x" * 100):
        file.unlink()
        if wrong:
            file.write_text(wrong)
        assert restore(node, cache, options=("--dry-run",)) == ""
        assert (file.read_text() if file.exists() else None) == wrong
        assert restore(node, cache) == "1 present\n"
        assert told(pod) == before
    file.unlink()
    node.lose_ruleset()
    restore(node, cache)
    assert told(pod) == before


def test_who_lost_its_note_takes_no_port_that_another_one_noted(node: Node, cache: Cache) -> None:
    lost = [running(node, cache, "80", ports="40000-40005", name="web") for _ in range(3)]
    kept = [running(node, cache, "80", ports="40000-40005", name="web") for _ in range(3)]
    before = given(node)
    for pod in lost:
        node.run("ip", "-n", pod.name, "link", "set", "eth0", "alias", "")
    node.lose_ruleset()
    assert restore(node, cache) == "6 restored\n"
    after = given(node)
    assert [after[pod.id] for pod in kept] == [before[pod.id] for pod in kept]
    assert sorted(ports["80/tcp"] for ports in after.values()) == [*range(40000, 40006)]
    for pod in lost:
        assert checked(node, pod, "80", "40000-40005") == 0
        assert told(pod) == {"80/tcp": {"hostPort": after[pod.id]["80/tcp"]}}
        assert noted(pod) == f"hostport 80/tcp={after[pod.id]['80/tcp']}"


def test_a_noted_port_that_somebody_else_has_now_is_refused_with_the_holders_name(node: Node, cache: Cache) -> None:
    pods = [running(node, cache, "80") for _ in range(2)]
    port = given(node)[pods[0].id]["80/tcp"]
    node.lose_ruleset()
    newer = node.pod(4)
    node.add(newer, mapping(port))
    output = restore(node, cache, status=1)
    assert f"host port {port}/tcp is taken by container {newer.id[:12]}" in output
    assert output.endswith("1 failed, 1 restored\n")
    assert [*given(node)] == [pods[1].id]
    node.delete(newer)
    newer.remove()
    assert restore(node, cache).endswith("1 present, 1 restored\n")
    assert given(node)[pods[0].id] == {"80/tcp": port}


@pytest.mark.parametrize(
    "forged",
    ["hostport 80/tcp=22", "hostport 80/tcp=99999", "hostport 80/tcp=41000", "x", "hostport 80/tcp=" + "9" * 200],
)
def test_a_note_that_a_pod_forged_gives_it_nothing_outside_the_range(node: Node, cache: Cache, forged: str) -> None:
    pod, other = running(node, cache, "80"), running(node, cache, "80")
    before = given(node)
    node.lose_ruleset()
    node.run("ip", "-n", pod.name, "link", "set", "eth0", "alias", forged)
    assert restore(node, cache).endswith("2 restored\n")
    assert given(node)[other.id] == before[other.id]
    assert given(node)[pod.id]["80/tcp"] in range(40000, 40064)


@pytest.mark.parametrize(("text", "host_ip"), [("80", NODE4), (f"{NODE4}:80", "")])
def test_a_note_that_a_pod_forged_gives_it_nobodys_fixed_port(
    node: Node, cache: Cache, text: str, host_ip: str
) -> None:
    fixed = restored_pod(node, cache, mapping(40005, hostIP=host_ip))
    forger = running(node, cache, text, name="forger")
    node.lose_ruleset()
    node.run("ip", "-n", forger.name, "link", "set", "eth0", "alias", f"hostport {text}/tcp=40005")
    output = restore(node, cache, status=1)
    assert f"is taken by pod shop/{fixed.host_end}, container {fixed.id[:12]}" in output
    assert output.endswith("1 failed, 1 restored\n")
    assert given(node) == {}


@pytest.mark.parametrize(("text", "host_ip"), [("80", NODE4), ("80", NODE6), (f"{NODE4}:80", "")])
@pytest.mark.parametrize("is_noted", [True, False], ids=["noted", "without a note"])
def test_a_port_that_is_mapped_for_other_addresses_during_the_restoration_is_given_up(
    node: Node, cache: Cache, monkeypatch: pytest.MonkeyPatch, text: str, host_ip: str, *, is_noted: bool
) -> None:
    pod, other = running(node, cache, text, families=(4, 6)), running(node, cache, "81/udp")
    before = given(node)
    [port] = before[pod.id].values()
    node.lose_ruleset()
    if not is_noted:
        node.run("ip", "-n", pod.name, "link", "set", "eth0", "alias", "")
    newer, reinstate = node.pod(), ownership.reinstate
    call = config(newer, mapping(port, hostIP=host_ip))

    def reinstate_late(nft: Nft, reinstatements: Sequence[ownership.Reinstatement]) -> None:
        forwards = [forward for reinstatement in reinstatements for forward in reinstatement.held.forwards]
        if any(forward.host_port == port for forward in forwards) and not node.holds(newer):
            assert node.cni("ADD", newer, call).code == 0
        reinstate(nft, reinstatements)

    monkeypatch.setattr(ownership, "reinstate", reinstate_late)

    def run() -> int:
        cli.main(["restore", "--watch=0", f"--cache-dir={cache.directory}"], standalone_mode=False)
        return 0

    output = fork.forked(node, run).stderr.decode()
    assert (node.cni("CHECK", newer, call).code, given(node)[other.id]) == (0, before[other.id])
    if is_noted:
        assert (f"is taken by container {newer.id[:12]}" in output, node.holds(pod)) == (True, False)
        node.delete(newer)
        assert restore(node, cache) == "1 present, 1 restored\n"
        assert given(node) == before
    else:
        assert output == "2 restored\n"
        assert checked(node, pod, text) == 0
        assert [*given(node)[pod.id].values()] != [port]


def test_where_the_ports_that_pods_have_cannot_be_read_others_are_restored(
    node: Node, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod, fixed = running(node, cache, "80"), restored_pod(node, cache, mapping(8080))
    node.lose_ruleset()
    monkeypatch.setattr(assignment, "PAUSES", (0,))
    monkeypatch.setattr(Lookup, "dump", lambda *_: None)  # others change them all the time

    def run() -> int:
        cli.main(["restore", "--watch=0", f"--cache-dir={cache.directory}"], standalone_mode=False)
        return 0

    output = fork.forked(node, run).stderr.decode()
    assert "the elements of dynamic_ports are changed all the time" in output
    assert "1 failed, 1 restored\n" in output
    assert (node.holds(pod), node.holds(fixed)) == (False, True)


def test_a_dry_run_shows_the_ports_that_pods_had(node: Node, cache: Cache) -> None:
    pods = [running(node, cache, "80, 7777/udp", name="web") for _ in range(2)]
    before = given(node)
    files = [told(pod) for pod in pods]
    node.lose_ruleset()
    node.nft_file(restore(node, cache, options=("--dry-run",)))
    assert given(node) == before
    assert [told(pod) for pod in pods] == files


NOTES: dict[str, Any] = {
    "none": ("80", "", ""),
    "an older one": ("80", "hostport 99/tcp=40003", ""),
    "somebody else's": ("80", "uplink of shop", "somebody else has put a note there: uplink of shop"),
    "one that gets too long": (
        ", ".join(f"{n}/sctp" for n in range(10001, 10043)),
        "hostport 80/tcp=40001",
        "it would be longer than 255 bytes",
    ),
}


@pytest.mark.parametrize("note", NOTES)
def test_a_note_is_written_where_it_can_be(node: Node, note: str) -> None:
    text, before, reason = NOTES[note]
    pod = node.pod(4)
    if before:
        node.run("ip", "-n", pod.name, "link", "set", "eth0", "alias", before)
    added = node.cni("ADD", pod, config(pod) | asking(text, dynamicPortsPerPod=64))
    said = f"hostport: the dynamic host ports of {pod.id} are not noted on eth0: {reason}\n"
    assert (added.code, added.stderr) == (0, said if reason else "")
    written = "" if reason else f"hostport 80/tcp={given(node)[pod.id]['80/tcp']}"
    assert noted(pod) == (before if reason and "hostport" not in before else written)


def test_a_pod_that_asks_for_much_gets_it_again_too(node: Node, cache: Cache) -> None:
    text = ", ".join(f"{NODE4}:{number}/sctp" for number in range(10001, 10015)) + ", 9000-9001/udp"
    pod = running(node, cache, text)
    before = given(node)
    assert noted(pod) == "hostport " + ",".join(
        str(before[pod.id][f"{NODE4}:{n}/sctp"] if n else before[pod.id]["9000/udp"]) for n in [*range(10001, 10015), 0]
    )
    node.lose_ruleset()
    assert restore(node, cache) == "1 restored\n"
    assert given(node) == before
