from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab import NODE4, Node, config, mapping, wait
from resident import NATIVE, NEVER_COLD, NOTES, PATIENT, PYTHON, Resident, eventually, launcher, with_executables

from cni_hostport.handover import IDENTITY, file_at

if TYPE_CHECKING:
    from lab import Pod

HURRIED = (*PATIENT, "h.UNTIL_DONE = 0.3")
MOMENTS = {
    "before it takes the call": "resident._answer = lambda *_: die()",
    "before it runs the call": "run = lambda environ: die()",
    "after it has read the input": "skel._check_network_name = lambda config: die()",
    "after it has changed the ruleset": (
        "install, remove = nft.Nft.run, lookup.Lookup.remove\n"
        "nft.Nft.run = lambda *arguments, **keys: (install(*arguments, **keys), die())\n"
        "lookup.Lookup.remove = lambda *arguments: (remove(*arguments), die())"
    ),
    "after it has answered": "call = run\nrun = lambda environ: (call(environ), die())",
}
DIES = """
import os, signal
from cni_hostport import lookup, skel
from cni_hostport.kernel import nft
resident._rehearse = lambda stage: None
def die():
    with open("{deaths}", "a") as out:
        out.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
{moment}
"""


def ports(node: Node) -> int:
    return node.nft("list map inet hostport hostports").count("goto dnat-")


@with_executables()
@pytest.mark.parametrize("moment", MOMENTS)
def test_each_call_is_done_and_answered_once_when_the_child_dies(node: Node, tmp_path: Path, moment: str) -> None:
    deaths = tmp_path / "deaths"
    with Resident(tmp_path / "socket", DIES.format(deaths=deaths, moment=MOMENTS[moment])):
        pod, other = node.pod(4), node.pod(4)
        pod.serve("tcp", 80, "web")
        call = config(pod, mapping(8080))
        node.add(other, mapping(8081))
        node.launcher = launcher(tmp_path, tmp_path / "socket", *PATIENT)
        assert node.add(pod, mapping(8080)).json == call["prevResult"]
        assert node.client.ask("tcp", NODE4, 8080) == "web 192.0.2.2"
        assert node.footprint(pod) == node.footprint(other)
        assert node.add(pod, mapping(8080)).json == call["prevResult"]
        assert node.footprint(pod) == node.footprint(other)
        assert (node.cni("CHECK", pod, call).status, node.cni("CHECK", pod, call).stdout) == (0, "")
        assert node.cni("CHECK", pod, config(pod, mapping(8081))).code == 103
        assert node.cni("ADD", other, config(other, mapping(8080))).code == 100
        assert node.delete(pod).stdout == ""
        assert not node.footprint(pod)
        assert node.delete(pod).stdout == ""
        assert node.client.is_silent("tcp", NODE4, 8080)
        # an operation that finds nothing to change does not die after it has changed something
        assert len(deaths.read_text()) == 8 if "changed" not in moment else len(deaths.read_text()) >= 3


def test_a_child_that_ends_just_before_it_is_killed_leaves_the_call_to_the_caller(node: Node, tmp_path: Path) -> None:
    slow = "import time\ncall = run\nrun = lambda environ: (time.sleep(1), call(environ))[1]"
    late = """
import select
kill = h._kill
def late(process):
    death = select.poll()
    death.register(process, select.POLLIN)
    death.poll()
    kill(process)
h._kill = late
"""
    with Resident(tmp_path / "socket", slow):
        node.launcher = launcher(tmp_path, tmp_path / "socket", *HURRIED, late)
        pod = node.pod(4)
        assert node.add(pod, mapping(8080)).json == config(pod)["prevResult"]
    assert ports(node) == 1


@with_executables(PYTHON, NATIVE)
def test_a_call_that_takes_too_long_is_ended_there_and_done_here(node: Node, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    slow = "import os, time\nrun = lambda environ: (open('{0}', 'w').write(str(os.getpid())), time.sleep(60))"
    with Resident(tmp_path / "socket", slow.format(notes)):
        node.launcher = launcher(tmp_path, tmp_path / "socket", *HURRIED)
        pod = node.pod(4)
        assert node.add(pod, mapping(8080)).json == config(pod)["prevResult"]
        assert not Path(f"/proc/{notes.read_text()}/fd/0").exists()
    assert ports(node) == 1


@with_executables(PYTHON, NATIVE)
@pytest.mark.parametrize("module", ["nft.Nft", "netlink.Netlink"])
def test_a_call_that_gets_on_is_not_ended_however_long_it_takes(node: Node, tmp_path: Path, module: str) -> None:
    slow = f"""
from cni_hostport import netlink
from cni_hostport.kernel import nft
import time
resident._rehearse = lambda stage: None
resident.REPORT_INTERVAL = 0.1
slow, name = {module}, "{"_ask" if "nft" in module else "ask"}"
ask = getattr(slow, name)
setattr(slow, name, lambda *given, **keys: (time.sleep(0.5), ask(*given, **keys))[1])
"""
    pod = node.pod(4)
    node.add(pod, mapping(8080))
    with Resident(tmp_path / "socket", slow):
        node.launcher = launcher(tmp_path, tmp_path / "socket", *PATIENT, "h.UNTIL_DONE = 2", NEVER_COLD)
        begun = time.monotonic()
        node.add(pod, mapping(8081))
        assert time.monotonic() > begun + 3
    assert ports(node) == 1


@with_executables(PYTHON, NATIVE)
def test_calls_that_were_done_here_are_not_done_again_when_the_resident_process_goes_on(
    node: Node, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    with Resident(tmp_path / "socket", NOTES.format(notes=notes)) as resident:
        node.launcher = launcher(tmp_path, tmp_path / "socket")
        pod, stopped = node.pod(4), resident.children
        resident.signal(signal.SIGSTOP)
        try:
            node.add(pod, mapping(8080))
            node.delete(pod)
        finally:
            resident.signal(signal.SIGCONT)
        assert eventually(lambda: not set(stopped) & set(resident.children))
    assert not notes.exists()
    assert not node.footprint(pod)
    assert resident.log.read_text() == ""


@with_executables(PYTHON, NATIVE)
def test_a_call_cannot_be_taken_any_more_once_the_caller_begins_to_run_it(node: Node, tmp_path: Path) -> None:
    notes, begun, gate = tmp_path / "notes", tmp_path / "begun", tmp_path / "gate"
    waits = f"""
import os, time
class Waits:
    def find_spec(self, name, *rest):
        if name == "cni_hostport.__main__":
            open("{begun}", "w").close()
            while not os.path.exists("{gate}"):
                time.sleep(0.01)
sys.meta_path.insert(0, Waits())
"""
    with Resident(tmp_path / "socket", NOTES.format(notes=notes)) as resident:
        node.launcher = launcher(tmp_path, tmp_path / "socket", waits)
        pod, stopped = node.pod(4), resident.children
        resident.signal(signal.SIGSTOP)
        try:
            started = node.start("ADD", pod, config(pod, mapping(8080)))
            assert eventually(begun.exists)
        finally:
            resident.signal(signal.SIGCONT)
        assert eventually(lambda: not set(stopped) <= set(resident.children))
        assert not notes.exists()
        assert "hostport" not in node.nft("list ruleset")
        gate.touch()
        assert wait(started).json == config(pod)["prevResult"]
    assert ports(node) == 1
    assert not notes.exists()


def send(connection: socket.socket, pod: Pod) -> None:
    """Ask for an ADD."""
    stdin = os.memfd_create("stdin")
    os.write(stdin, json.dumps(config(pod, mapping(8080))).encode())
    os.lseek(stdin, 0, os.SEEK_SET)
    outputs = [os.memfd_create("output") for _ in range(2)]
    process = os.pidfd_open(os.getpid())
    variables = {"COMMAND": "ADD", "CONTAINERID": pod.id, "NETNS": pod.path, "IFNAME": "eth0", "PATH": "/"}
    message = "\0".join([IDENTITY, file_at(pod.path), *(f"CNI_{name}={value}" for name, value in variables.items())])
    socket.send_fds(connection, [message.encode()], [stdin, *outputs, process])
    for descriptor in (stdin, *outputs, process):
        os.close(descriptor)


@pytest.mark.parametrize("withdrawn", [False, True])
def test_a_child_runs_a_call_unless_it_was_withdrawn(node: Node, tmp_path: Path, withdrawn: bool) -> None:
    pod = node.pod(4)
    with (
        Resident(tmp_path / "socket") as resident,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller,
        node.inside(),
    ):
        stopped = resident.children
        resident.signal(signal.SIGSTOP)
        try:
            caller.connect(str(tmp_path / "socket"))
            send(caller, pod)
            if withdrawn:
                caller.shutdown(socket.SHUT_RDWR)
        finally:
            resident.signal(signal.SIGCONT)
        assert eventually(lambda: not set(stopped) <= set(resident.children))
        if not withdrawn:
            assert eventually(lambda: "goto dnat-" in node.nft("list ruleset"))
        time.sleep(0.3)
        assert ("goto dnat-" in node.nft("list ruleset")) is not withdrawn


@with_executables(PYTHON, NATIVE)
@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_a_child_that_is_stopped_when_its_caller_is_killed_ends_without_a_trace(
    node: Node, tmp_path: Path, command: str
) -> None:
    stops = """
import os, signal
call = run
def stopping(environ):
    with open("{notes}", "w") as out:
        out.write(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)
    return call(environ)
run = stopping
"""
    notes = tmp_path / "notes"
    pod = node.pod(4)
    if command == "DEL":
        node.add(pod, mapping(8080))
    before = node.nft("-s list ruleset")
    with Resident(tmp_path / "socket", stops.format(notes=notes)):
        node.launcher = launcher(tmp_path, tmp_path / "socket", *PATIENT)
        started = node.start(command, pod, config(pod, mapping(8080)))
        assert eventually(lambda: notes.exists() and notes.read_text())
        child = int(notes.read_text())
        assert eventually(lambda: Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        started.kill()
        started.communicate()
        os.kill(child, signal.SIGCONT)
        assert eventually(lambda: not Path(f"/proc/{child}/fd/0").exists())
    assert node.nft("-s list ruleset") == before
