from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab import LAUNCHER, LIBC, Node, config, mapping, require
from resident import NEVER_COLD, NOTES, PATIENT, SLOW_CALLERS, Resident, launcher

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lab import Pod

OLDER_KERNEL = "from cni_hostport.resident import credentials\ncredentials.SO_PEERPIDFD = -1"
MULTIARCH = sysconfig.get_config_var("MULTIARCH") or "lib64"
FOLDERS = ("lib", "usr/lib", "lib64", "usr/lib64", f"lib/{MULTIARCH}", f"usr/lib/{MULTIARCH}")
LIBRARIES = ("libnftables.so.1", "libnss_db.so.2", "libnss_evil.so.2", "libnss_files.so.2")
LATE = """
call = run
def late(environ):
    with open("{notes}", "w"):
        import wave
    return call(environ)
run = late
"""
IN_OPEN, IN_NONBLOCK = 0x20, 0o4000  # linux/inotify.h

# asks as a caller does, with the socket, the process of the descriptor and the variables that it is given
ASKS = """
import os, socket, sys
from cni_hostport import handover
connection, process = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
streams = [os.memfd_create("stream") for _ in range(3)]
os.write(streams[0], sys.stdin.buffer.read())
os.lseek(streams[0], 0, 0)
variables = sys.argv[3:]
message = "\\0".join([handover.IDENTITY, handover.file_at(variables[0].partition("=")[2]), *variables])
socket.send_fds(connection, [message.encode()], [*streams, os.pidfd_open(process or os.getpid())])
print(connection.recv(100))
"""


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where the resident process writes the commands that it runs."""
    return tmp_path / "notes"


@pytest.fixture(params=["this kernel", "an older kernel"])
def noting(request: pytest.FixtureRequest, _kernel: None, tmp_path: Path, notes: Path) -> Iterator[Resident]:
    lines = [NOTES.format(notes=notes), SLOW_CALLERS] + ([OLDER_KERNEL] if request.param == "an older kernel" else [])
    with Resident(tmp_path / "socket", *lines) as made:
        yield made


def without(*capabilities: str) -> list[str]:
    require(Path("/usr/bin/setpriv").exists(), "needs setpriv")
    listed = ",".join(f"-{capability}" for capability in capabilities)
    return ["setpriv", f"--bounding-set={listed}", f"--inh-caps={listed}"]


def variables_of(pod: Pod, command: str = "ADD") -> list[str]:
    given = {"NETNS": pod.path, "COMMAND": command, "CONTAINERID": pod.id, "IFNAME": "eth0", "PATH": "/"}
    return [f"CNI_{name}={value}" for name, value in given.items()]


def asked(
    node: Node, pod: Pod, connection: int, prefix: Sequence[str] = (), process: int = 0
) -> subprocess.CompletedProcess[str]:
    """Ask for an ADD on a connection, by another process than this one, and return what that prints."""
    return node.run(
        *prefix, sys.executable, "-c", ASKS, str(connection), str(process), *variables_of(pod),
        input=json.dumps(config(pod, mapping(8080))), pass_fds=[connection],
    )  # fmt: skip


@contextlib.contextmanager
def connection_to(resident: Resident) -> Iterator[int]:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as made:
        made.connect(str(resident.path))
        yield made.fileno()


@pytest.mark.parametrize("lacking", [["audit_write"], ["sys_chroot"], ["sys_ptrace", "net_raw"], ["all"]])
def test_a_caller_that_lacks_a_capability_runs_its_call_itself(
    node: Node, noting: Resident, notes: Path, tmp_path: Path, lacking: list[str]
) -> None:
    pod = node.pod(4)
    call = config(pod, mapping(8080))
    outcomes = []
    for executable in (LAUNCHER, launcher(tmp_path, noting.path, *PATIENT)):
        node.launcher = [*without(*lacking), *executable]
        outcome = node.cni("ADD", pod, call)
        outcomes.append((outcome.status, outcome.stdout, node.holds(pod)))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][2] is (lacking != ["all"])
    assert not notes.exists()


def test_a_caller_in_a_user_namespace_of_its_own_runs_its_call_itself(
    node: Node, noting: Resident, notes: Path, tmp_path: Path
) -> None:
    pod = node.pod(4)
    unshared = subprocess.run(["unshare", "--user", "--map-root-user", "true"], check=False, capture_output=True)
    require(not unshared.returncode, "needs user namespaces")
    node.launcher = ["unshare", "--user", "--map-root-user", *launcher(tmp_path, noting.path, *PATIENT)]
    assert node.cni("ADD", pod, config(pod, mapping(8080))).status == 1
    assert not notes.exists()
    assert not node.ruleset()


def test_a_caller_with_all_capabilities_is_served(node: Node, noting: Resident, notes: Path, tmp_path: Path) -> None:
    node.launcher = launcher(tmp_path, noting.path, NEVER_COLD, *PATIENT)
    pod = node.pod(4)
    node.add(pod, mapping(8080))
    node.delete(pod)
    assert notes.read_text() == "ADDDEL"


def test_a_connection_is_not_passed_on_to_who_may_less(node: Node, noting: Resident, notes: Path) -> None:
    pod = node.pod(4)
    for process in (0, os.getpid()):
        with connection_to(noting) as connection:
            assert asked(node, pod, connection, without("all"), process).stdout == "b''\n"
    assert not notes.exists()


def test_a_descriptor_of_somebody_else_is_not_the_callers(node: Node, noting: Resident, notes: Path) -> None:
    pod = node.pod(4)
    connects = f"""
import os, socket, sys
made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
made.connect({str(noting.path)!r})
os.set_inheritable(made.fileno(), True)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1], str(made.fileno()), *sys.argv[2:]])
"""
    for process, prefix in ((str(os.getpid()), without("all")), ("1", without("all"))):
        asks = [sys.executable, "-c", connects, ASKS, process, *variables_of(pod)]
        assert node.run(*prefix, *asks, input=json.dumps(config(pod, mapping(8080)))).stdout == "b''\n"
    assert not notes.exists()


@pytest.fixture
def barren(_kernel: None, tmp_path: Path) -> Iterator[Resident]:
    """A resident process whose children have not rehearsed."""
    with Resident(tmp_path / "barren", "resident._rehearse = lambda stage: None") as made:
        yield made


@contextlib.contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[str]]:
    """Note which of the files are opened in the block."""
    found: list[str] = []
    events = LIBC.inotify_init1(IN_NONBLOCK)
    watches = {LIBC.inotify_add_watch(events, os.fsencode(path), IN_OPEN): str(path) for path in paths}
    yield found
    with contextlib.suppress(BlockingIOError):
        for offset in range(0, len(data := os.read(events, 1 << 16)), 16):  # struct inotify_event, without a name
            found.append(watches[int.from_bytes(data[offset : offset + 4], sys.byteorder)])
    os.close(events)


def test_no_file_of_the_callers_root_becomes_code(node: Node, barren: Resident, tmp_path: Path) -> None:
    root = tmp_path / "root"
    libraries = [root / folder / name for folder in FOLDERS for name in LIBRARIES]
    modules = [root / Path(path).relative_to("/") / "nftables.py" for path in sys.path if path.startswith("/usr/lib")]
    for path in (*libraries, *modules):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not what it seems")
    (root / "etc").mkdir()
    databases = ("passwd", "group", "hosts", "networks", "protocols", "services")
    (root / "etc/nsswitch.conf").write_text("".join(f"{database}: evil db files\n" for database in databases))
    (root / "proc").mkdir()
    pods = [node.pod(4), node.pod(4)]
    for pod in pods:
        (root / pod.name).touch()
    (root / "socket").touch()
    places = {"/proc": "proc", barren.path: "socket"} | {pod.path: pod.name for pod in pods}
    mounts = [f"mount --rbind {source} {root}/{target}" for source, target in places.items()]
    enter = ("from cni_hostport import handover", "import os", f"os.chroot({str(root)!r})", "os.chdir('/')")
    executable = launcher(tmp_path, Path("/socket"), *enter, *PATIENT)
    node.launcher = ["unshare", "--mount", "sh", "-c", f'{" && ".join(mounts)} && exec "$@"', "sh", *executable]
    many = [mapping(9000 + number, protocol=protocol) for number in range(20) for protocol in ("tcp", "udp")]
    with opened([*libraries, *modules]) as found:
        for command, pod, mappings, keys, code in [
            ("ADD", pods[0], [mapping(8080), mapping(53, 53, "udp")], {}, 0),
            ("ADD", pods[0], many, {}, 0),
            ("CHECK", pods[0], many, {}, 0),
            ("CHECK", pods[0], [mapping(8080)], {}, 103),
            ("ADD", pods[1], many, {}, 100),
            ("ADD", pods[1], [mapping(8080)], {"conditionsV4": ["ip", "saddr", "host.invalid"]}, 101),
            ("ADD", pods[1], [mapping(8080)], {"conditionsV4": ["tcp", "sport", "1024-65535"]}, 0),
            ("ADD", pods[1], [mapping(-1)], {}, 7),
            ("DEL", pods[0], many, {}, 0),
        ]:
            outcome = node.cni(command, pod, config(pod, *mappings, **keys), NETNS=f"/{pod.name}")
            assert outcome.code == code, outcome
    assert found == []


def test_a_module_that_was_not_imported_is_not_taken_from_the_callers_root(node: Node, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with Resident(tmp_path / "socket", LATE.format(notes=notes)):
        node.launcher = launcher(tmp_path, tmp_path / "socket", *PATIENT)
        pod = node.pod(4)
        assert node.add(pod, mapping(8080)).json == config(pod)["prevResult"]
        assert notes.exists()
