from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab import LAUNCHER, NOBODY, NODE4, Node, config, mapping, require, wait
from resident import NATIVE, NEVER_COLD, PYTHON, Resident, eventually, launcher, run, server, with_executables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab import Pod

DIFFERENT = [
    ("ADD", [mapping(8080)], {}),
    ("ADD", [mapping(8080), mapping(9090, hostIP="2001:db8::1")], {}),
    ("ADD", [], {}),
    ("ADD", [mapping(-1)], {}),
    ("ADD", [mapping(8080)], {"prevResult": None}),
    ("CHECK", [mapping(8080)], {}),
    ("CHECK", [], {}),
    ("DEL", [mapping(8080)], {}),
    ("ADD", [mapping(8080)], {"conditionsV4": ["nonsense"]}),
]


@pytest.fixture(scope="module")
def resident(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resident]:
    with Resident(tmp_path_factory.mktemp("resident") / "socket") as made:
        yield made


@pytest.fixture
def warm(resident: Resident, tmp_path: Path) -> Iterator[Node]:
    """A node whose executable has nothing but the resident process."""
    with Node(launcher(tmp_path, resident.path, NEVER_COLD)) as made:
        yield made


@with_executables()
@pytest.mark.parametrize(("command", "mappings", "keys"), DIFFERENT)
def test_a_call_ends_as_it_does_without_the_resident_process(
    warm: Node, node: Node, command: str, mappings: list[dict[str, object]], keys: dict[str, object]
) -> None:
    outcomes = []
    for where in (warm, node):
        pod = where.pod(4)
        call = config(pod, *mappings, **keys)
        outcome = where.cni(command, pod, call, CONTAINERID="web", NETNS="/run/netns/web")
        texts = (outcome.stdout.replace(pod.path, ""), outcome.stderr)
        outcomes.append((outcome.status, *texts, where.nft("-s list ruleset").replace(pod.path, "")))
    assert outcomes[0] == outcomes[1]


@with_executables()
def test_connections_reach_the_pod_until_it_is_deleted(warm: Node) -> None:
    pod = warm.pod()
    pod.serve("tcp", 80, "web")
    pod.serve("udp", 53, "dns")
    mappings = mapping(8080), mapping(53, 53, "udp")
    warm.add(pod, *mappings)
    assert warm.client.ask("tcp", NODE4, 8080) == "web 192.0.2.2"
    assert warm.client.ask("udp", NODE4, 53) == "dns 192.0.2.2"
    assert warm.cni("CHECK", pod, config(pod, *mappings)).status == 0
    warm.delete(pod)
    assert warm.client.is_silent("tcp", NODE4, 8080)
    assert warm.cni("CHECK", pod, config(pod, *mappings)).code == 103


@with_executables()
def test_a_taken_port_is_refused_with_the_holder_named(warm: Node) -> None:
    first, second = warm.pod(4), warm.pod(4)
    warm.add(first, mapping(8080))
    outcome = warm.cni("ADD", second, config(second, mapping(8080)))
    assert (outcome.status, outcome.code) == (1, 100)
    assert first.id[:12] in outcome.msg


@with_executables()
def test_a_port_of_a_container_that_is_gone_is_taken_over_and_that_is_said(warm: Node) -> None:
    first, second = warm.pod(4), warm.pod(4)
    warm.add(first, mapping(8080))
    first.remove()
    assert "is gone" in warm.add(second, mapping(8080)).stderr


@with_executables()
@pytest.mark.parametrize("command", ["VERSION", "STATUS", "GC"])
def test_rare_commands_do_not_ask_the_resident_process(tmp_path: Path, command: str) -> None:
    asked = list[socket.socket]()
    stdin = json.dumps({"cniVersion": "1.1.0", "name": "pods"}).encode()
    with server(tmp_path / "socket", asked.append):
        executable = launcher(tmp_path, tmp_path / "socket")
        assert run(executable, stdin, COMMAND=command, PATH="/").returncode == 0
    assert asked == []


@with_executables()
def test_the_environment_is_reduced_to_what_cni_defines(resident: Resident, tmp_path: Path, node: Node) -> None:
    pod = node.pod(4)
    executable = launcher(tmp_path, resident.path, NEVER_COLD)
    others = ["CNI_ARGS=K8S_POD_NAME=x", "PYTHONPATH=/nowhere", "LD_LIBRARY_PATH=/nowhere", "CNI_OTHER=1"]
    node.launcher = ["env", *others, *executable]
    node.add(pod, mapping(8080))
    assert 'comment "x"' in node.nft("list ruleset")


@with_executables(PYTHON, NATIVE)
def test_many_pods_at_once_all_get_their_ports(warm: Node, resident: Resident, tmp_path: Path) -> None:
    warm.launcher = launcher(tmp_path, resident.path)
    pods = [warm.pod(4) for _ in range(32)]
    started = [warm.start("ADD", pod, config(pod, mapping(8000 + number))) for number, pod in enumerate(pods)]
    assert [wait(item).status for item in started] == [0] * 32
    assert warm.nft("list map inet hostport hostports").count("goto dnat-") == 32
    started = [warm.start("DEL", pod, config(pod)) for pod in pods]
    assert [wait(item).status for item in started] == [0] * 32
    assert "goto dnat-" not in warm.nft("list map inet hostport hostports")


@with_executables(PYTHON, NATIVE)
def test_one_of_many_that_want_the_same_port_gets_it(warm: Node, resident: Resident, tmp_path: Path) -> None:
    warm.launcher = launcher(tmp_path, resident.path)
    pods = [warm.pod(4) for _ in range(16)]
    started = [warm.start("ADD", pod, config(pod, mapping(8080))) for pod in pods]
    assert sorted(wait(item).code for item in started) == [0] + [100] * 15


@with_executables(PYTHON, NATIVE)
def test_a_storm_loses_and_doubles_nothing_while_the_resident_process_is_killed_again_and_again(
    node: Node, tmp_path: Path
) -> None:
    with Resident(tmp_path / "socket") as resident:
        node.launcher = launcher(tmp_path, resident.path)
        pods = [node.pod(4) for _ in range(8)]

        def come_and_go(number: int, pod: Pod) -> None:
            for _ in range(6):
                node.add(pod, mapping(8000 + number), mapping(53, 53, "udp", hostIP=f"127.0.1.{number}"))
                node.delete(pod)
            node.add(pod, mapping(8000 + number))

        with concurrent.futures.ThreadPoolExecutor() as pool:
            running = [pool.submit(come_and_go, *item) for item in enumerate(pods)]
            while not all(one.done() for one in running):
                resident.signal(signal.SIGKILL)
                resident.process.wait()
                resident.start()
        for one in running:
            one.result()
    listed = node.nft("list map inet hostport hostports")
    assert listed.count("goto dnat-") == 8
    assert all(f" {8000 + number} " in listed for number in range(8))
    assert "goto" not in node.nft("list map inet hostport hostports_ip4")


def test_only_root_is_served(resident: Resident, tmp_path: Path) -> None:
    assert stat.S_IMODE(resident.path.stat().st_mode) == 0o600
    assert resident.path.stat().st_uid == 0
    require(Path("/usr/bin/setpriv").exists(), "needs setpriv")
    with Resident(tmp_path / "socket") as open_to_all:
        open_to_all.path.chmod(0o666)
        asks = f"""
import os, socket
from cni_hostport import handover
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.connect("{open_to_all.path}")
    places = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)] + [os.pidfd_open(os.getpid())]
    socket.send_fds(connection, [handover.IDENTITY.encode() + b"\\0\\0CNI_COMMAND=ADD"], places)
    print(connection.recv(100))
"""
        command = [*NOBODY, "/usr/bin/python3", "-c", asks]
        environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
        served = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (served.stdout, served.stderr) == ("b''\n", "")


def test_no_child_stays_behind_when_the_resident_process_ends(tmp_path: Path) -> None:
    with Resident(tmp_path / "socket") as resident:
        children = resident.children
        resident.kill()
        assert len(children) > 1
        assert eventually(lambda: not any(Path(f"/proc/{child}/fd/0").exists() for child in children))


def test_a_second_resident_process_is_refused(resident: Resident) -> None:
    command = [*LAUNCHER, "serve", str(resident.path)]
    second = subprocess.run(command, env={}, capture_output=True, text=True, check=False, timeout=60)
    assert (second.returncode, second.stderr) == (1, f"hostport: another process listens on {resident.path}\n")


@with_executables()
def test_a_socket_that_systemd_hands_over_is_used(node: Node, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen()
        activate = 'import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ["LISTEN_PID"] = str(os.getpid())'
        command = [sys.executable, "-Ic", f"{activate}; os.execv(sys.argv[2], sys.argv[2:])", str(listening.fileno())]
        served = subprocess.Popen(
            [*command, *LAUNCHER, "serve"], env={"LISTEN_FDS": "1"}, pass_fds=[listening.fileno(), 3]
        )
    try:
        node.launcher = launcher(tmp_path, path, NEVER_COLD)
        pod = node.pod(4)
        node.add(pod, mapping(8080))
    finally:
        served.kill()
        served.wait()


@with_executables()
def test_all_that_calls_need_is_imported_before_there_is_one(tmp_path: Path) -> None:
    late = tmp_path / "late"
    watch = f"""
import os, sys
from cni_hostport.__main__ import run
from cni_hostport.resident import process as resident
answer = resident._answer
def watched(*arguments):
    before = set(sys.modules)
    answer(*arguments)
    with open("{late}", "a") as out:
        out.write("".join(f"{{name}}\\n" for name in set(sys.modules) - before))
resident._answer = watched
resident.serve(run, "{tmp_path / "socket"}")
"""
    os.environ.pop("CNI_COMMAND", None)
    served = subprocess.Popen([sys.executable, "-Ic", watch])
    try:
        assert eventually((tmp_path / "socket").exists)
        with Node(launcher(tmp_path, tmp_path / "socket", NEVER_COLD)) as node:
            first, second = node.pod(), node.pod()
            node.add(first, mapping(8080), mapping(53, 53, "udp"))
            node.cni("CHECK", first, config(first, mapping(8080), mapping(53, 53, "udp")))
            node.cni("CHECK", first, config(first, mapping(8081)))
            node.cni("ADD", second, config(second, mapping(8080)))
            node.cni("ADD", second, config(second, mapping(0), mapping(70000)))
            first.remove()
            node.add(second, mapping(8080), mapping(53, 53, "udp"))
            node.delete(second)
            node.cni("DEL", second, config(second, mapping(8080)))
            bare = config(second, mapping(8080)) | {"prevResult": {"cniVersion": "1.1.0"}}
            assert node.cni("ADD", second, bare).status == 0
            node.nft("flush chain inet hostport dispatch")
            node.cni("CHECK", second, config(second, mapping(8080)))
            node.delete(second)
    finally:
        served.kill()
        served.wait()
    assert late.read_text() == ""
