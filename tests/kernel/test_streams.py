from __future__ import annotations

import json
import os
import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import resident as executables
from lab import LAUNCHER, Node, config, mapping
from resident import NATIVE, NEVER_COLD, PYTHON, SLOW_CALLERS, Resident, launcher

from cni_hostport import LARGEST_INPUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab import Pod

COMMANDS = ("ADD", "CHECK", "DEL", "GC", "STATUS", "VERSION")
STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}
USELESS = ("closed", "full", "broken", "null")
RESULTS = ("ADD", "VERSION")


@pytest.fixture(scope="module")
def resident(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resident]:
    # a large configuration takes its time to come to the caller
    with Resident(tmp_path_factory.mktemp("resident") / "socket", SLOW_CALLERS) as made:
        yield made


@pytest.fixture(params=["cold", PYTHON, NATIVE])
def ready(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, node: Node, resident: Resident, tmp_path: Path
) -> Node:
    """A node, without a resident process or with one, and one kind of executable."""
    if request.param != "cold":
        monkeypatch.setattr(executables, "kind", request.param)
        node.launcher = launcher(tmp_path, resident.path)
    return node


class Ran:
    """A call whose standard streams are what the test says: its status, and what it wrote to those that are left."""

    def __init__(self, node: Node, command: str, pod: Pod, call: dict[str, Any] | str, **kinds: str) -> None:
        variables = {"COMMAND": command, "CONTAINERID": pod.id, "NETNS": pod.path, "IFNAME": "eth0", "PATH": "/"}
        given: dict[str, int] = {
            "stdin": os.memfd_create("stdin"),
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        os.write(given["stdin"], (call if isinstance(call, str) else json.dumps(call)).encode())
        os.lseek(given["stdin"], 0, os.SEEK_SET)
        opened = [given["stdin"]]
        for stream, kind in kinds.items():
            if kind != "closed":
                given[stream] = useless(kind, stream)
                opened.append(given[stream])
        closing = " ".join(f"{STREAMS[stream]}>&-" for stream, kind in kinds.items() if kind == "closed")
        executable = ["nsenter", f"--net={node.path}", "sh", "-c", f'exec "$0" "$@" {closing}']
        ran: subprocess.CompletedProcess[bytes] = subprocess.run(
            [*executable, *(node.launcher or LAUNCHER)], env={f"CNI_{name}": text for name, text in variables.items()},
            check=False, timeout=60, stdin=given["stdin"], stdout=given["stdout"], stderr=given["stderr"],
        )  # fmt: skip
        for descriptor in opened:
            os.close(descriptor)
        self.status, self.stdout, self.stderr = ran.returncode, ran.stdout or b"", ran.stderr or b""

    @property
    def code(self) -> int:
        """The code of the error JSON, 0 where there is none."""
        found = re.match(rb'{"cniVersion": "[^"]+", "code": (\d+), ', self.stdout)
        return int(found[1]) if found else 0


def useless(kind: str, stream: str) -> int:
    if kind == "broken":
        ends = os.pipe()
        os.close(ends[stream == "stdin"])
        return ends[stream != "stdin"]
    return os.open(f"/dev/{kind}", os.O_RDONLY if stream == "stdin" else os.O_WRONLY)


def call_for(pod: Pod) -> dict[str, Any]:
    """A configuration with which an ADD succeeds, and logs a line; and every other command succeeds after it."""
    return config(pod, mapping(8080), mapping(8081, hostIP="2001:db8::1"), **{"cni.dev/valid-attachments": []})


def prepared(node: Node, command: str) -> Pod:
    pod = node.pod(4)
    if command in {"CHECK", "DEL", "GC"}:
        node.add(pod, mapping(8080), mapping(8081, hostIP="2001:db8::1"))
    return pod


@pytest.mark.parametrize("kind", USELESS)
@pytest.mark.parametrize("command", COMMANDS)
def test_messages_that_cannot_be_written_are_lost_and_the_call_is_as_good(ready: Node, command: str, kind: str) -> None:
    pod = prepared(ready, command)
    ran = Ran(ready, command, pod, call_for(pod), stderr=kind)
    assert ran.status == 0
    if command == "ADD":
        assert json.loads(ran.stdout) == call_for(pod)["prevResult"]
    assert bool(ready.holds(pod)) is (command in {"ADD", "CHECK"})
    refused = Ran(ready, "ADD", pod, config(pod, mapping(-1)), stderr=kind)
    assert (refused.status, refused.code) == (1, 7)


@pytest.mark.parametrize("kind", USELESS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_result_that_cannot_be_written_is_an_error_and_leaves_nothing(ready: Node, command: str, kind: str) -> None:
    pod = prepared(ready, command)
    ran = Ran(ready, command, pod, call_for(pod), stdout=kind)
    fails = command in RESULTS and kind != "null"
    assert ran.status == fails
    assert (b"hostport: cannot write the result to stdout: " in ran.stderr) is fails
    assert b"Traceback" not in ran.stderr
    assert bool(ready.holds(pod)) is (command == "CHECK" or (command == "ADD" and not fails))


@pytest.mark.parametrize("kind", USELESS)
def test_an_error_that_cannot_be_written_is_said_on_stderr(ready: Node, kind: str) -> None:
    pod = ready.pod(4)
    ran = Ran(ready, "ADD", pod, config(pod, mapping(-1)), stdout=kind)
    assert ran.status == 1
    assert kind == "null" or b"-1" in ran.stderr
    assert b"Traceback" not in ran.stderr


@pytest.mark.parametrize(("kind", "code"), [("closed", 5), ("full", 5), ("broken", 6), ("null", 6)])
@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_input_that_is_none_is_an_error(ready: Node, command: str, kind: str, code: int) -> None:
    pod = ready.pod(4)
    ran = Ran(ready, command, pod, {}, stdin=kind)
    assert (ran.status, ran.code, ran.stderr) == (1, code, b"")


@pytest.mark.parametrize("kind", USELESS)
def test_the_version_needs_no_input(ready: Node, kind: str) -> None:
    ran = Ran(ready, "VERSION", ready.pod(4), {}, stdin=kind)
    assert (ran.status, ran.code) == (0, 0)


@pytest.mark.parametrize("kind", USELESS)
def test_without_any_stream_an_add_leaves_nothing(ready: Node, kind: str) -> None:
    pod = ready.pod(4)
    assert Ran(ready, "ADD", pod, call_for(pod), stdout=kind, stderr=kind).status == (kind != "null")
    assert ready.holds(pod) is (kind == "null")
    assert Ran(ready, "ADD", pod, call_for(pod), stdin=kind, stdout=kind, stderr=kind).status == 1


def test_a_repeated_add_whose_result_cannot_be_written_is_as_none(ready: Node) -> None:
    pod, other = ready.pod(4), ready.pod(4)
    ready.add(pod, mapping(8080))
    ready.add(other, mapping(9090))
    assert Ran(ready, "ADD", pod, call_for(pod), stdout="full").status == 1
    assert not ready.footprint(pod)
    assert ready.footprint(other)


def test_input_has_a_bound(ready: Node) -> None:
    pod = ready.pod(4)
    short = len(json.dumps(call_for(pod) | {"note": ""}))
    largest = call_for(pod) | {"note": "x" * (LARGEST_INPUT - short)}
    ran = Ran(ready, "ADD", pod, largest)
    assert (ran.status, json.loads(ran.stdout)) == (0, largest["prevResult"])
    ran = Ran(ready, "ADD", pod, largest | {"note": f"{largest['note']}x"})
    assert (ran.status, ran.code) == (1, 5)
    assert f"more than {LARGEST_INPUT} bytes" in json.loads(ran.stdout)["msg"]


@pytest.mark.parametrize(
    "depth", [900, 960, 970, 975, 980, 984, 986, 988, 990, 992, 994, 996, 1000, 3000, 12_000, 90_000]
)
def test_input_that_is_nested_too_deeply_is_an_error_and_leaves_nothing(ready: Node, depth: int) -> None:
    pod = ready.pod(4)
    call = config(pod, mapping(8080))
    call["prevResult"]["nested"] = "here"
    ran = Ran(ready, "ADD", pod, json.dumps(call).replace('"here"', "[" * depth + "]" * depth))
    assert (ran.status, ran.code) in {(0, 0), (1, 6), (1, 7)}
    assert ready.holds(pod) is (ran.status == 0)
    assert b"Traceback" not in ran.stderr


@pytest.mark.parametrize("text", ["[" * 1_000_000, '{"a":' * 500_000, "1" * 1_000_000, '{"name": ' + "[" * 100_000])
def test_input_that_is_made_to_break_a_parser_is_no_json(ready: Node, text: str) -> None:
    variables = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_PATH": "/"}
    ran = ready.run(*(ready.launcher or LAUNCHER), input=text, env=variables, check=False)
    assert (ran.returncode, json.loads(ran.stdout)["code"], ran.stderr) == (1, 6, "")


def test_a_large_configuration_is_handed_over_in_time_that_grows_with_it(
    node: Node, resident: Resident, tmp_path: Path
) -> None:
    node.launcher = launcher(tmp_path, resident.path, NEVER_COLD)
    pod = node.pod(4)
    large = config(pod, mapping(8080), note="x" * (LARGEST_INPUT - 10_000))
    large["prevResult"]["note"] = "y"
    assert Ran(node, "ADD", pod, large).status == 0
