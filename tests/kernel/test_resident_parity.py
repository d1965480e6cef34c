from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from lab import Node, config, mapping
from resident import NATIVE, NEVER_COLD, PATIENT, PYTHON, Resident, launcher, run, server, with_executables

from cni_hostport.handover import IDENTITY, VARIABLES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab import Outcome

CALL = {"cniVersion": "1.1.0", "name": "pods", "prevResult": {"cniVersion": "1.1.0"}}
VALID = {"COMMAND": "ADD", "CONTAINERID": "c1", "NETNS": "/run/netns/absent", "IFNAME": "eth0", "PATH": "/"}
# without a rehearsal, a child has imported nothing but what the resident process has imported beforehand
WATCHED = """
import json, os, sys
resident._rehearse = lambda stage: None
call = run
def watched(environ):
    before = set(sys.modules)
    status = call(environ)
    note = [status, sorted(set(sys.modules) - before), sorted(environ), sorted(os.environ)]
    with open("{notes}", "a") as out:
        out.write(json.dumps(note) + "\\n")
    return status
run = watched
"""


@pytest.fixture(scope="module")
def resident(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resident]:
    with Resident(tmp_path_factory.mktemp("resident") / "socket") as made:
        yield made


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where a watched resident process writes a line for each call."""
    return tmp_path / "notes"


@pytest.fixture
def watched(_kernel: None, tmp_path: Path, notes: Path) -> Iterator[Resident]:
    with Resident(tmp_path / "watched", WATCHED.format(notes=notes)) as made:
        yield made


def life(node: Node, directory: Path) -> list[tuple[Outcome, str]]:
    """Return what the calls for two pods answer, and the ruleset after each; pods are named alike on every node."""
    pods = {"web": node.pod(4), "db": node.pod(4)}
    for name, pod in pods.items():
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(pod.path)
    mapped = [mapping(8080), mapping(5353, 53, "udp"), mapping(9090, hostIP="2001:db8::1")]
    outcomes = []
    for command, name, mappings in [
        ("ADD", "web", mapped),
        ("ADD", "web", mapped),
        ("CHECK", "web", mapped),
        ("CHECK", "web", [mapping(8081)]),
        ("ADD", "db", [mapping(8080)]),
        ("ADD", "db", [mapping(70000)]),
        ("ADD", "db", [mapping(8081)]),
        ("DEL", "web", mapped),
        ("DEL", "web", mapped),
        ("CHECK", "web", mapped),
    ]:
        call = config(pods[name], *mappings)
        call["prevResult"]["interfaces"][2]["sandbox"] = f"/run/netns/{name}"
        outcome = node.cni(command, None, call, CONTAINERID=name, NETNS=str(directory / name), IFNAME="eth0")
        without_identities = re.sub(r"@[\d:]+ \d+:\d+ /", " /", node.nft("-s list ruleset"))
        outcomes.append((outcome, without_identities))
    return outcomes


@with_executables()
def test_all_calls_for_a_pod_are_answered_as_they_are_without_the_resident_process(
    node: Node, resident: Resident, tmp_path: Path
) -> None:
    cold = life(node, tmp_path)
    with Node(launcher(tmp_path, resident.path, NEVER_COLD)) as warm:
        assert life(warm, tmp_path) == cold
    assert [outcome.code for outcome, _ in cold] == [0, 0, 0, 103, 100, 7, 0, 0, 0, 103]
    assert "is not mapped" in cold[0][0].stderr


@with_executables()
def test_an_executable_that_is_never_cold_fails_without_the_resident_process(node: Node, tmp_path: Path) -> None:
    node.launcher = launcher(tmp_path, tmp_path / "absent", NEVER_COLD)
    pod = node.pod(4)
    outcome = node.cni("ADD", pod, config(pod, mapping(8080)))
    assert (outcome.status, outcome.stderr, outcome.code) == (1, "", 5)
    assert "cannot be loaded: import of cni_hostport.skel" in outcome.msg


@with_executables()
def test_another_version_is_not_served(resident: Resident, tmp_path: Path) -> None:
    lines = (*PATIENT, f"h.IDENTITY = {IDENTITY + 'x'!r}", NEVER_COLD)
    outcome = run(launcher(tmp_path, resident.path, *lines), json.dumps(CALL).encode(), **VALID)
    assert (outcome.returncode, json.loads(outcome.stdout)["code"]) == (1, 5)


@with_executables()
def test_nothing_of_the_callers_environment_is_sent_but_what_cni_defines(tmp_path: Path) -> None:
    requests = list[bytes]()

    def reads(connection: socket.socket) -> None:
        requests.append(connection.recv(1 << 18))

    with server(tmp_path / "socket", reads):
        executable = launcher(tmp_path, tmp_path / "socket")
        variables = {f"CNI_{name}": value for name, value in VALID.items()} | {"CNI_ARGS": "A=b\udcff"}
        others = {"LD_LIBRARY_PATH": "/nowhere", "PYTHONPATH": "/nowhere", "CNI_OTHER": "1", "LANG": "C"}
        subprocess.run(executable, input=json.dumps(CALL).encode(), env=variables | others, check=True)
    identity, netns, *sent = os.fsdecode(requests[0]).split("\0")
    assert (identity, netns) == (IDENTITY, "")
    assert dict(variable.split("=", 1) for variable in sent) == variables


@with_executables()
def test_a_call_does_not_get_variables_that_cni_does_not_define(
    node: Node, watched: Resident, notes: Path, tmp_path: Path
) -> None:
    sends_all = "h.VARIABLES = ('LD_PRELOAD', 'PYTHONPATH', *h.VARIABLES)"
    executable = launcher(tmp_path, watched.path, NEVER_COLD, *PATIENT, sends_all)
    node.launcher = ["env", "PYTHONPATH=/nowhere", "LD_PRELOAD=", *executable]
    pod = node.pod(4)
    node.add(pod, mapping(8080))
    _, _, given, own = json.loads(notes.read_text())
    assert set(given) < set(VARIABLES)
    assert set(own) <= {name for name in os.environ if not name.startswith("CNI_")}


@with_executables()
def test_a_child_that_did_not_rehearse_imports_nothing(
    node: Node, watched: Resident, notes: Path, tmp_path: Path
) -> None:
    node.launcher = launcher(tmp_path, watched.path, NEVER_COLD, *PATIENT)
    first, second = node.pod(), node.pod()
    tcp, both = [mapping(8080)], [mapping(8080), mapping(53, 53, "udp"), mapping(9090, hostIP="192.0.2.1")]
    lookup = config(first, *both) | {"prevResult": {"cniVersion": "1.1.0", "interfaces": [{"name": "eth0"}]}}
    expected = []
    for pod, command, call, code in [
        (first, "ADD", config(first, *tcp), 0),
        (first, "ADD", config(first, *both), 0),
        (first, "ADD", lookup, 0),
        (first, "CHECK", config(first, *both), 0),
        (first, "CHECK", config(first, mapping(8081)), 103),
        (second, "ADD", config(second, *tcp), 100),
        (second, "ADD", config(second, mapping(70000)), 7),
        (second, "ADD", config(second, *tcp, conditionsV4=["nonsense"]), 101),
        (second, "DEL", config(second, *tcp), 0),
        (second, "ADD", config(second), 0),
    ]:
        assert (command, call["runtimeConfig"], node.cni(command, pod, call).code)[2] == code
        expected.append([min(code, 1), []])
    first.remove()
    assert "is gone" in node.add(second, *both).stderr
    node.delete(second)
    node.delete(second)
    assert [json.loads(line)[:2] for line in notes.read_text().splitlines()] == expected + [[0, []]] * 3


@with_executables()
@pytest.mark.parametrize("variables", [{"NETNS": ""}, {"CONTAINERID": "../c1"}, {"IFNAME": "a/b"}])
def test_a_call_with_a_wrong_environment_is_refused_before_its_input_ends(
    resident: Resident, tmp_path: Path, variables: dict[str, str]
) -> None:
    environment = {f"CNI_{name}": value for name, value in (VALID | variables).items() if value}
    executable = launcher(tmp_path, resident.path)
    with subprocess.Popen(executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as started:
        try:
            assert started.wait(60) == 1
            assert started.stdout is not None
            assert json.load(started.stdout)["code"] == 4
        finally:
            started.kill()


@with_executables()
def test_input_may_come_slowly(node: Node, resident: Resident, tmp_path: Path) -> None:
    node.launcher = launcher(tmp_path, resident.path)
    pod = node.pod(4)
    slowly = "head -c 10; sleep 1.5; cat"
    node.launcher = ["sh", "-c", f'{{ {slowly}; }} | "$@"', "sh", *node.launcher]
    assert node.add(pod, mapping(8080)).json == config(pod)["prevResult"]
    assert node.nft("list map inet hostport hostports").count("goto dnat-") == 1


@with_executables()
@pytest.mark.parametrize("unwritable", [">/dev/full", "2>/dev/full", ">&- </dev/null"])
def test_an_answer_that_cannot_be_written_is_a_failure_as_it_is_without_the_resident_process(
    resident: Resident, tmp_path: Path, unwritable: str
) -> None:
    outcomes = []
    for path in (resident.path, tmp_path / "absent"):
        command = ["sh", "-c", f'exec "$0" "$@" {unwritable}', *launcher(tmp_path, path)]
        ran = run(command, json.dumps(CALL).encode(), **VALID)
        outcomes.append((bool(ran.returncode), ran.stdout))
    assert outcomes[0] == outcomes[1]


@with_executables()
@pytest.mark.parametrize("version", [IDENTITY, "another"], ids=["served", "not served"])
@pytest.mark.parametrize("size", [2000, 200_000])
@pytest.mark.parametrize("blocks", [0, 100])
def test_a_limit_on_the_size_of_files_does_not_matter(
    resident: Resident, tmp_path: Path, blocks: int, size: int, version: str
) -> None:
    executable = launcher(tmp_path, resident.path, "import cni_hostport.handover as h", f"h.IDENTITY = {version!r}")
    command = ["sh", "-c", f'ulimit -f {blocks}; exec "$0" "$@"', *executable]
    outcome = run(command, json.dumps(CALL | {"note": "x" * size}).encode(), **VALID)
    assert (outcome.returncode, json.loads(outcome.stdout)) == (0, CALL["prevResult"])


@with_executables(PYTHON, NATIVE)
def test_with_few_descriptors_a_call_is_as_good(resident: Resident, tmp_path: Path) -> None:
    executable = launcher(tmp_path, resident.path)
    for descriptors in range(5, 14):
        for _ in range(4):
            command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$0" "$@"', *executable]
            outcome = run(command, json.dumps(CALL).encode(), **VALID | {"COMMAND": "DEL"})
            assert (outcome.returncode, outcome.stdout, descriptors) == (0, b"", descriptors)


@with_executables(PYTHON, NATIVE)
@pytest.mark.parametrize("limit", ["-d 16000", "-d 12000"])
def test_with_little_memory_a_command_is_answered(resident: Resident, tmp_path: Path, limit: str) -> None:
    command = ["sh", "-c", f'ulimit {limit}; exec "$0" "$@"', *launcher(tmp_path, resident.path)]
    outcome = run(command, b"", COMMAND="VERSION")
    assert (outcome.returncode, "supportedVersions" in json.loads(outcome.stdout)) == (0, True)


@with_executables()
def test_an_error_that_ends_the_input_is_told(resident: Resident, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(b'{"cniVersion": "1.1.0"')
        theirs.setblocking(False)  # noqa: FBT003 - the method's own
        environment = {f"CNI_{name}": value for name, value in VALID.items()}
        ran = subprocess.run(
            launcher(tmp_path, resident.path), stdin=theirs.fileno(), capture_output=True, env=environment, check=False
        )
    assert (ran.returncode, ran.stderr) == (1, b"")
    assert json.loads(ran.stdout)["msg"] == (
        "cannot read the network configuration from stdin: [Errno 11] Resource temporarily unavailable"
    )


@with_executables()
@pytest.mark.parametrize("path", ["/proc/self/fd/9", "/proc/thread-self/fd/9", "/dev/fd/9"])
def test_a_namespace_that_the_caller_has_open_is_found(
    node: Node, resident: Resident, tmp_path: Path, path: str
) -> None:
    pod = node.pod(4)
    node.launcher = ["sh", "-c", f'exec "$@" 9<{pod.path}', "sh", *launcher(tmp_path, resident.path)]
    call = config(pod, mapping(8080)) | {"prevResult": {"cniVersion": "1.1.0", "interfaces": [{"name": "eth0"}]}}
    assert node.cni("ADD", pod, call, NETNS=path).code == 0
    assert f"dnat ip to {pod.ip4}:80" in node.ruleset()
