"""Whatever system call fails: the caller gets an answer that is true, and the ruleset is as before or as after.

Each operation runs once without faults, watched by strace, and then once for each fault, cold, warm on the executable's
side, and warm on the resident process's. Some of the faults are tried; ``HOSTPORT_TESTS_ATTACK=1000`` tries all. Of the
native executable, which asks the kernel for little, every call fails with every error.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from attack import fork, ruleset
from attack.answer import Answer
from attack.effort import FACTOR
from attack.faults import BEGINNING, NATIVE_BEGINNING, Fault, Trace, options, traced, watching
from lab import Node, config, mapping, require
from libcni_cache import Cache
from resident import NATIVE, Resident, eventually, launcher, with_executables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

FAULTS = 8 * FACTOR  # of each operation
EVERY = 1 << 20
UNWRITABLE = b"cannot write the result"
MAPPINGS = [mapping(8080), mapping(8081, 81, hostIP="192.0.2.1"), mapping(5353, 53, "udp")]


@dataclass(frozen=True)
class Operation:
    """A call, or a command for people, on a node that ``present`` names; ``keys`` alter its configuration."""

    command: str
    present: str = "nothing"
    keys: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


OPERATIONS = {
    "add": Operation("ADD"),
    "add again": Operation("ADD", "own", {"runtimeConfig": {"portMappings": [mapping(9090), mapping(8080, 88)]}}),
    "add for nothing": Operation("ADD", keys={"runtimeConfig": {}}),
    "add a gone holder's port": Operation("ADD", "gone holder"),
    "add a taken port": Operation("ADD", keys={"runtimeConfig": {"portMappings": [mapping(7000)]}}),
    "add what the pod's namespace tells": Operation("ADD", keys={"prevResult": {"cniVersion": "1.1.0"}}),
    "check": Operation("CHECK", "own"),
    "check what is not there": Operation("CHECK"),
    "del": Operation("DEL", "own"),
    "del without mappings": Operation("DEL", "own", {"runtimeConfig": {}, "prevResult": None}),
    "del of nothing": Operation("DEL"),
    "gc": Operation("GC", "own", {"cni.dev/valid-attachments": []}),
    "status": Operation("STATUS"),
    "restore": Operation("", arguments=("restore", "--watch=0")),
    "list": Operation("", "own", arguments=("list",)),
}
WARM = [name for name, operation in OPERATIONS.items() if operation.command in {"ADD", "CHECK", "DEL"}]


class Stage:
    """A node with a bystander, and rulesets from which operations begin."""

    def __init__(self, node: Node, directory: Path) -> None:
        self.node, self.directory = node, directory
        self.pod, bystander = node.pod(), node.pod()
        self.cache = Cache(directory / "cni")
        self.cache.add(self.pod, *MAPPINGS)
        node.add(bystander, mapping(7000), name="bystanders")
        self.starts = {"nothing": self._dump()}
        node.add(self.pod, *MAPPINGS)
        self.starts["own"] = self._dump()
        node.delete(self.pod)
        absent = node.pod()
        node.add(absent, mapping(8080), name="others")
        absent.remove()
        self.starts["gone holder"] = self._dump()

    def _dump(self) -> str:
        return f"flush ruleset\n{self.node.nft('-s list ruleset')}"

    def begin(self, present: str) -> None:
        self.node.nft_file(self.starts[present])

    def environ(self, command: str) -> dict[str, str]:
        named = {"COMMAND": command, "CONTAINERID": self.pod.id, "NETNS": self.pod.path, "IFNAME": "eth0", "PATH": "/x"}
        return {f"CNI_{name}": value for name, value in named.items() if command}

    def delete(self) -> Answer:
        bare = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport"}
        return fork.call(self.node, self.environ("DEL"), json.dumps(bare).encode())


class Attack:
    """One operation, which is known to work without faults, and what may become of it with one."""

    def __init__(
        self,
        stage: Stage,
        operation: Operation,
        executable: Sequence[str],
        resident: Resident | None = None,
        beginning: str = BEGINNING,
    ) -> None:
        self.stage, self.operation, self.executable, self.resident = stage, operation, executable, resident
        self.beginning = beginning
        self.path = stage.directory / "trace"
        sent = config(stage.pod, *MAPPINGS) | operation.keys
        self.stdin = json.dumps({key: value for key, value in sent.items() if value is not None}).encode()
        stage.begin(operation.present)
        self.before = ruleset.read(stage.node)
        self.answer, self.trace = self.run()
        self.after = ruleset.read(stage.node)
        stage.delete()
        self.cleaned = ruleset.read(stage.node)
        assert not self.breach(self.answer, self.trace), self.answer

    def run(self, fault: Fault | None = None) -> tuple[Answer, Trace]:
        """Run the operation with a fault, or without."""
        self.path.unlink(missing_ok=True)
        node, environ = self.stage.node, self.stage.environ(self.operation.command)
        arguments = [*self.operation.arguments]
        if "restore" in arguments:
            arguments.append(f"--cache-dir={self.stage.cache.directory}")
        command = [*self.executable, *arguments]
        if self.resident is None:
            answer = traced(node, command, environ, self.stdin, *options(self.path, fault))
            return answer, Trace.read(self.path, beginning=self.beginning)
        resident = self.resident
        assert eventually(lambda: len(resident.children) > 1), "the resident process has no children"
        with watching(resident.children, *options(self.path, fault)):
            ran = node.run(*command, input=self.stdin.decode(), env=environ, check=False)
        answer = Answer(ran.returncode, ran.stdout.encode(), ran.stderr.encode())
        return answer, Trace.read(self.path, has_begun=True)

    def breach(self, answer: Answer, trace: Trace) -> str:
        """Tell what is wrong with the text and the status of an answer."""
        if not self.operation.command:
            return ""  # a person sees by the status that it failed, however
        if answer.status == 1 and (
            UNWRITABLE in answer.stderr or any(line.startswith("write(1,") for line in trace.injected)
        ):
            return "it shows a traceback" if b"Traceback" in answer.stderr else ""
        return answer.breach(self.operation.command)

    def outcome(self, fault: Fault) -> str:
        """Run the operation with a fault, and tell what is wrong with what came out, empty if nothing."""
        self.stage.begin(self.operation.present)
        try:
            answer, trace = self.run(fault)
        except subprocess.TimeoutExpired:
            return f"{fault}: it hangs"
        wrong = self.breach(answer, trace) or self._state(answer) or self._rest()
        return f"{fault}: {wrong}; {'; '.join(trace.injected)}; {answer}" if wrong else ""

    def _state(self, answer: Answer) -> str:
        found = ruleset.read(self.stage.node)
        if not answer.status and self.answer.status:
            return "it succeeded"
        if not answer.status and found != self.after:
            return f"it succeeded, and the ruleset {ruleset.difference(self.after, found)}"
        if found not in (self.before, self.after, self.cleaned):
            return f"neither as before nor as after: {ruleset.difference(self.before, found)}"
        return ""

    def _rest(self) -> str:
        deleted = self.stage.delete()
        if deleted.status:
            return f"DEL afterwards: {deleted}"
        rests = [self.cleaned] if self.operation.present == "own" else [self.cleaned, self.before]
        found = ruleset.read(self.stage.node)
        return "" if found in rests else f"DEL afterwards leaves: {ruleset.difference(self.cleaned, found)}"


@pytest.fixture
def stage(node: Node, tmp_path: Path) -> Stage:
    require(shutil.which("strace"), "needs the program strace")
    return Stage(node, tmp_path)


@pytest.fixture(
    params=[*(("cold", name) for name in OPERATIONS), *((mode, name) for mode in ("warm", "child") for name in WARM)],
    ids="-".join,
)
def attack(request: pytest.FixtureRequest, stage: Stage, tmp_path: Path) -> Iterator[tuple[Attack, str]]:
    mode, name = request.param
    begins = ("import os", "from cni_hostport import handover", f"os.access({BEGINNING!r}, 0)")
    executable = launcher(tmp_path, tmp_path / "socket", *begins)
    if mode == "cold":
        yield Attack(stage, OPERATIONS[name], executable), f"{mode} {name}"
        return
    with Resident(tmp_path / "socket") as resident:
        made = Attack(stage, OPERATIONS[name], executable, resident if mode == "child" else None)
        yield made, f"{mode} {name}"


def test_an_operation_is_answered_truly_and_is_whole(
    attack: tuple[Attack, str], record_property: Callable[[str, object], None]
) -> None:
    made, name = attack
    chosen = made.trace.faults(name, FAULTS)
    assert chosen
    record_property("system calls that fail", len(chosen))
    wrong = [outcome for fault in chosen if (outcome := made.outcome(fault))]
    assert not wrong, "\n\n".join(wrong)


DIES = "import os, signal\nrun = lambda environ: os.kill(os.getpid(), signal.SIGKILL)"
STOPS = "import os, signal\nrun = lambda environ: os.kill(os.getpid(), signal.SIGSTOP)"
HURRIED = ("import cni_hostport.handover as h", "h.UNTIL_TAKEN = 20", "h.UNTIL_DONE = 0.1")


@with_executables(NATIVE)
@pytest.mark.parametrize(
    ("name", "altered"),
    [("add", ""), ("add a taken port", ""), ("del", ""), ("add", DIES), ("add", STOPS)],
    ids=["add", "a refused add", "del", "add that another has begun", "add that another does not end"],
)
def test_whatever_call_of_the_native_executable_fails_the_operation_is_whole(
    stage: Stage, tmp_path: Path, name: str, altered: str
) -> None:
    with Resident(tmp_path / "socket", *filter(None, [altered])) as resident:
        executable = launcher(tmp_path, resident.path, *(HURRIED if altered == STOPS else HURRIED[:2]))
        made = Attack(stage, OPERATIONS[name], executable, beginning=NATIVE_BEGINNING)
        faults = made.trace.faults(name, EVERY)
        assert len(faults) > 2 * len(made.trace.all - made.trace.before)
        wrong = [outcome for fault in faults if (outcome := made.outcome(fault))]
    assert not wrong, "\n\n".join(wrong)
