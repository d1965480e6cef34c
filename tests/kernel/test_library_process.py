from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from lab import LAUNCHER, Node, Outcome, Pod, config, mapping, require
from resident import Resident, launcher

from cni_hostport.kernel.library_process import Process

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CRASH = ["ip", "saddr", "map", "{", "1.1.1.1", ":", "2.2.2.2", "}", "1.1.1.1"]  # up to libnftables 1.1.1, at least
EXPECTED = {"ADD": 101, "CHECK": 101, "STATUS": 50}


def injected(*faults: str) -> list[str]:
    require(shutil.which("strace"), "needs strace")
    traced = ",".join(fault.partition(":")[0] for fault in faults)
    options = [option for fault in faults for option in ("-e", f"inject={fault}")]
    return ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={traced}", *options, *LAUNCHER]


def call(node: Node, command: str, pod: Pod, executable: Sequence[str] = (), **keys: Any) -> Outcome:
    node.launcher = executable
    return node.cni(command, pod, config(pod, mapping(8080), **keys))


def is_told(outcome: Outcome, command: str) -> bool:
    """Tell whether a call succeeded, or failed with an error JSON of its code and no traceback."""
    if outcome.status:
        return outcome.code == EXPECTED[command] and bool(outcome.msg) and "Traceback" not in outcome.stderr
    return "Traceback" not in outcome.stderr


def test_status_says_that_there_is_no_netlink_in_the_words_of_libnftables(node: Node) -> None:
    outcome = call(node, "STATUS", node.pod(), injected("socket:error=EPROTONOSUPPORT:when=1+"))
    assert outcome.code == 50
    assert "Protocol not supported" in outcome.json["details"]
    assert "libnftables" in outcome.json["details"]


def test_libnftables_is_told_no_chains_and_no_interfaces_for_an_add(node: Node, tmp_path: Path) -> None:
    require(shutil.which("strace"), "needs strace")
    node.add(node.pod(), mapping(8081))  # the first on the bridge has that guarded, by its index
    node.ip("link add bystander type veth peer name bystander1")
    node.nft_file(f"table inet others {{ {' '.join(f'chain bystander{number} {{ }};' for number in range(500))} }}")
    trace = tmp_path / "trace"
    traced = ["strace", "-f", "-xx", "-s", "40000", "-e", "trace=recvmsg", "-o", str(trace), *LAUNCHER]
    assert call(node, "ADD", node.pod(), traced).status == 0
    table, chain = ("".join(f"\\x{letter:02x}" for letter in name) for name in (b"others", b"bystander"))
    assert table in trace.read_text()
    assert chain not in trace.read_text()


@pytest.mark.parametrize("error", ["EIO", "ENOMEM"])
@pytest.mark.parametrize("command", ["ADD", "CHECK", "STATUS"])
def test_an_error_of_netlink_within_libnftables_is_told(node: Node, command: str, error: str) -> None:
    pod = node.pod()
    node.add(pod, mapping(8080))
    outcomes = [call(node, command, pod, injected(f"recvmsg:error={error}:when={when}+")) for when in (1, 2, 4, 8, 11)]
    assert [outcome for outcome in outcomes if not is_told(outcome, command)] == []
    assert any(outcome.status for outcome in outcomes)
    assert call(node, "ADD", pod).status == 0


@pytest.mark.parametrize("command", ["list", "doctor", "explain 8080", "restore", "metrics"])
def test_a_command_says_that_there_is_no_netlink(node: Node, command: str, tmp_path: Path) -> None:
    keys = [f"--cache-dir={tmp_path}"] if command in {"doctor", "restore"} else []
    executable = injected("socket:error=EPROTONOSUPPORT:when=1+")
    ran = node.run(*executable, *command.split(), *keys, check=False)
    assert ran.returncode == 1
    assert "Protocol not supported" in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("command", ["ADD", "CHECK", "STATUS"])
def test_a_condition_that_libnftables_does_not_bear_is_refused_by_its_name(node: Node, command: str) -> None:
    outcome = call(node, command, node.pod(), conditionsV4=CRASH)
    assert outcome.code == EXPECTED[command]
    assert "conditionsV4 'ip saddr map { 1.1.1.1 : 2.2.2.2 } 1.1.1.1'" in outcome.json.get("details", outcome.msg)
    assert node.nft("list ruleset") == ""


def test_a_crash_of_libnftables_leaves_no_file_of_its_memory(node: Node, tmp_path: Path) -> None:
    unlimited = ["prlimit", "--core=unlimited", "sh", "-c", f'cd {tmp_path}; exec "$@"', "sh", *LAUNCHER]
    assert "crashed" in call(node, "ADD", node.pod(), unlimited, conditionsV4=CRASH).msg
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_a_system_call_filter_without_limits_is_no_obstacle(node: Node, error: str) -> None:
    assert call(node, "ADD", node.pod(), injected(f"prlimit64:error={error}")).status == 0


def test_a_resident_process_outlives_such_a_condition_and_the_call_is_answered(node: Node, tmp_path: Path) -> None:
    pod = node.pod()
    with Resident(tmp_path / "socket") as resident:
        warm = launcher(tmp_path, resident.path)
        refused = call(node, "ADD", pod, warm, conditionsV4=CRASH)
        assert (refused.code, "conditionsV4" in refused.msg) == (101, True)
        assert call(node, "ADD", pod, warm).status == 0
        assert resident.process.poll() is None


def test_an_add_that_is_killed_changes_nothing_afterwards(node: Node) -> None:
    pod = node.pod()
    script = (
        "import os, signal; from cni_hostport.kernel import library_process\n"
        "def ask(self, command, output, **_):\n"
        "    library_process.marshal.dump(('', command, output, False), self._requests)\n"
        "    os.kill(self._pid, signal.SIGSTOP)\n"
        "    self._requests.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "library_process.Process.ask = ask; from cni_hostport.__main__ import main; main()"
    )
    killed = call(node, "ADD", pod, [sys.executable, "-Ic", script])
    assert killed.status == -9
    node.delete(pod)
    assert not node.holds(pod)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_host_name_in_a_condition_is_refused_and_no_name_server_is_asked(
    node: Node, tmp_path: Path, warm: bool
) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions attempts:1 timeout:1\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    mounts = "; ".join(f"mount --bind {tmp_path}/{name} /etc/{name}" for name in ("resolv.conf", "nsswitch.conf"))
    script = ["unshare", "--mount", "sh", "-c", f'{mounts}; exec "$@"', "sh"]
    with node.socket("udp", "127.0.0.1") as server:
        server.bind(("127.0.0.1", 53))
        server.settimeout(0)
        asked = node.run(*script, "getent", "ahosts", "db.example.org", check=False)
        assert asked.returncode
        assert len(server.recv(512))
        while True:
            try:
                server.recv(512)
            except BlockingIOError:
                break
        pod = node.pod()
        with Resident(tmp_path / "socket") as resident:
            executable = launcher(tmp_path, resident.path) if warm else LAUNCHER
            refused = call(node, "ADD", pod, [*script, *executable], conditionsV4=["ip", "saddr", "db.example.org"])
        assert (refused.code, "db.example.org" in refused.msg) == (101, True)
        with pytest.raises(BlockingIOError):
            server.recv(512)


@pytest.mark.parametrize(
    "broken",
    [
        ("pydantic", "def", "SyntaxError"),
        ("pydantic", "import nowhere", "No module named 'nowhere'"),
        ("annotated_types", "nowhere.name", "name 'nowhere' is not defined"),
        ("nftables", "import nowhere", "No module named 'nowhere'"),
        ("nftables", "Nftables = None", "'NoneType' object is not callable"),
    ],
)
@pytest.mark.parametrize("command", ["ADD", "STATUS"])
def test_a_module_that_cannot_be_used_is_told(
    node: Node, tmp_path: Path, command: str, broken: tuple[str, str, str]
) -> None:
    name, text, reason = broken
    (tmp_path / f"{name}.py").write_text(text)
    start = f"import sys; sys.path.insert(0, '{tmp_path}'); from cni_hostport.__main__ import main; main()"
    outcome = call(node, command, node.pod(), [sys.executable, "-Ic", start])
    assert is_told(outcome, command)
    assert reason in outcome.msg + str(outcome.json.get("details"))


def test_too_little_memory_is_told(node: Node) -> None:
    pod = node.pod()
    for size in range(24, 48, 4):
        limited = ["prlimit", f"--as={size << 20}", *LAUNCHER]
        for command in ("ADD", "STATUS"):
            outcome = call(node, command, pod, limited)
            assert is_told(outcome, command), (size, outcome)
    assert call(node, "ADD", pod).status == 0


def test_a_process_that_a_thread_has_started_does_not_end_with_the_thread(node: Node) -> None:
    with node.inside(), ThreadPoolExecutor(1) as thread:
        process = thread.submit(Process).result()
    with node.inside():
        assert [process.ask(b"list tables", ()) for _ in range(2)] == [(0, b"", b"")] * 2
