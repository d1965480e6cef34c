from __future__ import annotations

import errno
import io
import json
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
from lab import Outcome, mapping, result

from cni_hostport import __version__, plugin, skel
from cni_hostport.errors import CNIError, Code

if TYPE_CHECKING:
    from pathlib import Path

    from cni_hostport.log import Log

ENVIRONMENT = {
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/absent",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin",
}
CONFIG = {"cniVersion": "1.1.0", "name": "pods", "type": "hostport", "prevResult": result("10.1.0.2/24")}
OWN_NAMESPACE = "/proc/self/ns/net"
VERSIONS = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]


class Unreadable(io.BytesIO):
    def read(self, _size: int | None = -1, /) -> bytes:
        raise OSError(5, "Input/output error")


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_call: skel.Call, _log: Log) -> None:
        pass

    for command in plugin.OPERATIONS:
        monkeypatch.setitem(plugin.OPERATIONS, command, nothing)


class EmptyTable:
    """A ruleset in which no attachment has anything."""

    def leave_open(self) -> None:
        pass

    def find(self, _key: str) -> None:
        return None


def run(command: str, stdin: object = CONFIG, **variables: str | None) -> Outcome:
    changed = {f"CNI_{name}": value for name, value in variables.items()}
    environ = {k: v for k, v in (ENVIRONMENT | {"CNI_COMMAND": command} | changed).items() if v is not None}
    if not isinstance(stdin, io.BytesIO):
        stdin = io.BytesIO(stdin if isinstance(stdin, bytes) else json.dumps(stdin).encode())
    stdout, stderr = io.StringIO(), io.StringIO()
    status = skel.run(environ, stdin, stdout, stderr, plugin.OPERATIONS.__getitem__)
    return Outcome(status, stdout.getvalue(), stderr.getvalue())


@pytest.mark.parametrize("unset", [None, ""])
def test_without_a_command_it_says_on_stderr_what_it_is(unset: str | None) -> None:
    outcome = run("ADD", Unreadable(), COMMAND=unset)
    assert (outcome.status, outcome.stdout) == (0, "")
    assert outcome.stderr == (
        f"CNI hostport plugin v{__version__}\n"
        "CNI protocol versions supported: 0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0\n"
    )


def test_version_needs_neither_stdin_nor_other_variables() -> None:
    outcome = run("VERSION", Unreadable(), **dict.fromkeys(["CONTAINERID", "NETNS", "IFNAME", "PATH"]))
    assert (outcome.status, outcome.stderr) == (0, "")
    assert outcome.json == {"cniVersion": "1.1.0", "supportedVersions": VERSIONS}


@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
@pytest.mark.parametrize(
    ("command", "required"),
    [
        ("ADD", ["CONTAINERID", "NETNS", "IFNAME", "PATH"]),
        ("CHECK", ["CONTAINERID", "NETNS", "IFNAME", "PATH"]),
        ("DEL", ["CONTAINERID", "IFNAME", "PATH"]),
        ("GC", ["PATH"]),
        ("STATUS", ["PATH"]),
    ],
)
def test_missing_variables_are_listed_in_one_error(command: str, required: list[str], value: str | None) -> None:
    outcome = run(command, **dict.fromkeys(["CONTAINERID", "NETNS", "IFNAME", "PATH"], value))
    missing = ", ".join(f"CNI_{name}" for name in required)
    assert (outcome.code, outcome.msg) == (4, f"required environment variables are missing: {missing}")


@pytest.mark.parametrize("container_id", ["-a", ".a", "_a", "a b", "a/b", "a;b", "a\n", "\u00e9", 'a"'])
def test_an_invalid_container_id_is_refused(container_id: str) -> None:
    outcome = run("ADD", CONTAINERID=container_id)
    assert outcome.code == 4
    assert f"CNI_CONTAINERID {container_id!r}" in outcome.msg


@pytest.mark.parametrize("ifname", [".", "..", "a/b", "a:b", "a b", "a\t", "a\u00a0b", "a" * 16, "\u00e9" * 8])
def test_an_invalid_interface_name_is_refused(ifname: str) -> None:
    outcome = run("ADD", IFNAME=ifname)
    assert outcome.code == 4
    assert f"CNI_IFNAME {ifname!r}" in outcome.msg


@pytest.mark.parametrize(
    "variables", [{"CONTAINERID": "a" * 200}, {"CONTAINERID": "0._-"}, {"IFNAME": "a" * 15}, {"IFNAME": "\u00e9.1"}]
)
def test_container_ids_of_any_length_and_interface_names_of_15_bytes_are_fine(variables: dict[str, str]) -> None:
    assert run("ADD", **variables).status == 0


@pytest.mark.parametrize("command", ["add", "Add", "ADD ", "UPDATE"])
def test_an_unknown_command_is_refused(command: str) -> None:
    outcome = run(command)
    assert (outcome.code, outcome.msg) == (4, f"unknown CNI_COMMAND {command!r}")


@pytest.mark.parametrize(
    ("command", "faults"),
    [
        ("ADD", ["CONTAINERID", "IFNAME", "NETNS", "stdin", "name", "cniVersion"]),
        ("CREATE", ["stdin", "name", "COMMAND", "cniVersion"]),
    ],
)
def test_of_several_faults_the_first_in_the_order_of_checks_is_reported(command: str, faults: list[str]) -> None:
    reports = {
        "CONTAINERID": "CNI_CONTAINERID '-'",
        "IFNAME": "CNI_IFNAME '..'",
        "NETNS": "missing: CNI_NETNS",
        "stdin": "not JSON",
        "name": "network name '-'",
        "COMMAND": "unknown CNI_COMMAND",
        "cniVersion": "cniVersion '9.9.9'",
    }
    bad = {"CONTAINERID": "-", "IFNAME": "..", "NETNS": "", "name": "-", "cniVersion": "9.9.9"}
    for number, fault in enumerate(faults):
        rest = {name: bad[name] for name in faults[number:] if name in bad}
        variables = {name: value for name, value in rest.items() if name.isupper()}
        config = CONFIG | {name: value for name, value in rest.items() if not name.isupper()}
        current = "ADD" if fault == "cniVersion" else command
        outcome = run(current, b"{" if "stdin" in faults[number:] else config, **variables)
        assert reports[fault] in outcome.msg


def test_a_stdin_that_fails_is_an_io_failure() -> None:
    outcome = run("ADD", Unreadable())
    assert outcome.code == 5
    assert "Input/output error" in outcome.msg


@pytest.mark.parametrize(
    "stdin",
    [b"", b"{", b"null", b"[]", b'"x"', b"5", b"{} {}", b"{}x", b"\xff", b"\xef\xbb\xbf{}", b'{"a": NaN}',
     b'{"a": 1e999}', b'{"a": -Infinity}', b'{"cniVersion": 1}', b'{"cniVersion": ["1.1.0"]}',
     pytest.param(b"[" * 100_000, id="deep")],
)  # fmt: skip
def test_stdin_that_is_not_one_json_object_is_a_decoding_failure(stdin: bytes) -> None:
    assert run("ADD", stdin).code == 6


@pytest.mark.parametrize("name", [None, "", 5, ["pods"], "-a", "a b", "a/b", "a\n", "\u00e9", "a;flush ruleset"])
def test_a_missing_or_invalid_network_name_is_refused(name: object) -> None:
    outcome = run("DEL", CONFIG | {"name": name})
    assert outcome.code == 7
    assert "network" in outcome.msg


@pytest.mark.parametrize("version", ["1.1", "v1.1.0", " 1.1.0", "1.2.0", "0.0.0", "latest"])
def test_a_version_that_is_not_exactly_a_supported_one_is_refused(version: str) -> None:
    outcome = run("ADD", CONFIG | {"cniVersion": version})
    assert (outcome.code, outcome.json["cniVersion"]) == (1, "1.1.0")
    assert f"cniVersion {version!r}" in outcome.msg


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("command", "since"), [("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0")])
@pytest.mark.usefixtures("idle")
def test_a_command_newer_than_the_version_is_refused(command: str, since: str, version: str) -> None:
    outcome = run(command, CONFIG | {"cniVersion": version})
    assert outcome.code == (0 if version >= since else 1)
    assert not outcome.status or f"cniVersion {version!r} does not have {command}" in outcome.msg


@pytest.mark.parametrize("config", [{"cniVersion": ""}, {"cniVersion": None}, {}])
def test_no_version_means_the_first(config: dict[str, Any]) -> None:
    assert run("ADD", {"name": "pods", "prevResult": {}, **config}).json == {"cniVersion": "0.1.0"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "keys",
    [{}, {"runtimeConfig": None}, {"runtimeConfig": {"portMappings": None, "bandwidth": None}},
     {"runtimeConfig": {"portMappings": []}}, {"runtimeConfig": {"portMappings": [mapping(0), {"HostPort": 0}]}}],
)  # fmt: skip
def test_add_without_mappings_echoes_every_key_of_prevresult(
    monkeypatch: pytest.MonkeyPatch, version: str, keys: dict[str, Any]
) -> None:
    monkeypatch.setattr("cni_hostport.lookup.Lookup", EmptyTable)
    previous = result("10.1.0.2/24", version="0.3.1") | {"ip4": None, "x": {"y": [1, 2.5, "\u00e9", True]}}
    outcome = run("ADD", {"cniVersion": version, "name": "pods", "prevResult": previous, **keys})
    assert (outcome.status, outcome.stderr) == (0, "")
    assert outcome.json == previous | {"cniVersion": version}


@pytest.mark.parametrize("previous", [None, [], "x", 5])
@pytest.mark.parametrize("command", ["ADD", "CHECK"])
def test_a_result_to_continue_is_needed(command: str, previous: object) -> None:
    outcome = run(command, CONFIG | {"prevResult": previous})
    assert outcome.code == 7
    assert "prevResult" in outcome.msg


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_the_plugins_own_namespace_is_refused_before_anything_is_done(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(plugin.OPERATIONS, command)
    outcome = run(command, NETNS=OWN_NAMESPACE)
    assert outcome.code == 8
    assert OWN_NAMESPACE in outcome.msg


@pytest.mark.parametrize("override", ["1", "true", "TRUE"])
def test_the_plugins_own_namespace_can_be_asked_for(override: str) -> None:
    assert run("ADD", NETNS=OWN_NAMESPACE, NETNS_OVERRIDE=override).status == 0
    assert run("CHECK", NETNS=OWN_NAMESPACE).status == 0


def test_a_namespace_that_cannot_be_opened_is_not_the_plugins_own(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for netns in (tmp_path / "absent", tmp_path / "file", tmp_path):
        assert run("ADD", NETNS=str(netns)).status == 0


@pytest.mark.parametrize("command", ["DEL", "CHECK", "GC", "STATUS"])
@pytest.mark.usefixtures("idle")
def test_success_without_a_result_prints_nothing(command: str) -> None:
    assert run(command) == Outcome(0, "", "")


@pytest.mark.parametrize(("command", "unneeded"), [("DEL", ["NETNS"]), ("GC", ["CONTAINERID", "NETNS", "IFNAME"])])
@pytest.mark.usefixtures("idle")
def test_what_a_command_does_not_need_may_be_missing(command: str, unneeded: list[str]) -> None:
    assert run(command, {"cniVersion": "1.1.0", "name": "pods"}, **dict.fromkeys(unneeded)).status == 0


@pytest.mark.parametrize(("details", "more"), [("", {}), ("longer", {"details": "longer"})])
@pytest.mark.parametrize("version", ["0.4.0", "1.1.0"])
def test_an_error_is_one_json_object_on_stdout_and_nothing_else(
    details: str, more: dict[str, str], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CNIError(Code.TRY_AGAIN, "a sentence", details)

    monkeypatch.setitem(plugin.OPERATIONS, "ADD", fail)
    outcome = run("ADD", CONFIG | {"cniVersion": version})
    assert (outcome.status, outcome.stderr, outcome.stdout.count("\n")) == (1, "", 1)
    assert outcome.json == {"cniVersion": version, "code": 11, "msg": "a sentence", **more}


def test_an_unexpected_failure_is_told_where_no_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugin.OPERATIONS, "ADD", lambda *_: 1 // 0)
    monkeypatch.setitem(sys.modules, "traceback", None)
    outcome = run("ADD")
    assert (outcome.json["code"], outcome.stderr) == (999, "")


def test_an_unexpected_failure_shows_its_traceback_on_stderr_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_call: skel.Call, log: Log) -> None:
        log("so far, so good")
        raise ZeroDivisionError("by nought")  # noqa: EM101, TRY003 - as any exception would come

    monkeypatch.setitem(plugin.OPERATIONS, "ADD", fail)
    outcome = run("ADD")
    assert outcome.json == {"cniVersion": "1.1.0", "code": 999, "msg": "unexpected ZeroDivisionError: by nought"}
    assert outcome.stderr.startswith("hostport: so far, so good\nTraceback")


@pytest.mark.parametrize(("command", "code"), [("ADD", 101), ("STATUS", 50)])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "there is not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "there is not enough memory"),
        (OSError(errno.EIO, "Input/output error", "/x"), "a system call failed: [Errno 5] Input/output error: '/x'"),
        (OSError(errno.EMFILE, "Too many open files"), "there are not enough file descriptors: Too many open files"),
        (SystemError("no value"), "Python itself failed, as it does without memory: no value"),
        (ImportError("No module named 'x'"), "a module cannot be loaded: ImportError: No module named 'x'"),
    ],
)
def test_what_the_node_or_the_installation_lacks_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, command: str, code: int, error: Exception, reason: str
) -> None:
    def fail(_call: skel.Call, _log: Log) -> None:
        raise error

    monkeypatch.setitem(plugin.OPERATIONS, command, fail)
    outcome = run(command)
    assert outcome.json == {"cniVersion": "1.1.0", "code": code, "msg": f"{command} cannot be carried out: {reason}"}
    assert outcome.stderr == ""


def test_whatever_a_module_raises_while_it_is_imported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("{}['key']")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(plugin.OPERATIONS, "ADD", lambda *_: import_module("broken"))
    outcome = run("ADD")
    assert outcome.msg == "ADD cannot be carried out: a module cannot be loaded: KeyError: 'key'"
    assert outcome.stderr == ""
