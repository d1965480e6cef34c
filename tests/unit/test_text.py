from __future__ import annotations

import ast
import io
import json
import sys
import syslog
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import cni_hostport
from cni_hostport import plugin, skel
from cni_hostport.errors import CNIError, Code
from cni_hostport.log import announce
from cni_hostport.operate import arguments, cli, firewalls, metrics, terminal
from cni_hostport.operate.mappings import HolderState
from cni_hostport.operate.statements import problem
from cni_hostport.text import escaped, escaped_lines

if TYPE_CHECKING:
    from cni_hostport.log import Log
    from cni_hostport.skel import Call

HOSTILE = "a\x1b[2J\nok all is well\r\x9b31m\u202eb\u2028\udcff\x00"
SHOWN = r"a\x1b[2J\nok all is well\r\x9b31m\u202eb\u2028\udcff\x00"
ENVIRON = {"CNI_COMMAND": "STATUS", "CNI_PATH": "/bin"}
WRITERS = {
    *("click.echo", "click.secho", "handover.write", "os.write", "print", "sys.stderr", "sys.stdout", "syslog.syslog")
}
OUTLETS = {
    "__main__.py": {"handover.write", "sys.stderr", "sys.stdout"},
    "handover.py": {"os.write"},  # what others have made printable
    "kernel/ipvs.py": {"os.write"},
    "kernel/library_process.py": {"os.write"},  # for an error's text
    "log.py": {"syslog.syslog"},
    "native.py": {"sys.stdout"},  # for install.sh
    "operate/arguments.py": {"sys.stdout"},
    "operate/cli.py": {"click.echo"},
    "operate/explain/probe.py": {"os.write"},  # packets
    "operate/terminal.py": {"sys.stderr", "sys.stdout"},
    "resident/process.py": {"handover.write", "os.write"},
}


def test_a_text_for_people_is_printable_whatever_it_was() -> None:
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        shown = escaped(f"a{character}b")
        assert shown.isprintable()
        assert shown.encode()
        assert (shown == f"a{character}b") == (unicodedata.category(character)[0] not in "CZ" or character == " ")


def test_a_text_for_people_is_told_once_however_often_it_is_handed_on() -> None:
    assert escaped(HOSTILE) == escaped(escaped(HOSTILE)) == SHOWN
    assert escaped("Grüße, 東京 \\n '$x'") == "Grüße, 東京 \\n '$x'"
    assert escaped_lines("one\ntwo\x1b\n") == "one\ntwo\\x1b\n"


def run(monkeypatch: pytest.MonkeyPatch, raised: Exception | None) -> tuple[str, str]:
    def status(_call: Call, log: Log) -> None:
        log(HOSTILE)
        if raised:
            raise raised

    monkeypatch.setitem(plugin.OPERATIONS, "STATUS", status)
    stdout, stderr = io.StringIO(), io.StringIO()
    config = io.BytesIO(b'{"cniVersion": "1.1.0", "name": "pods"}')
    skel.run(ENVIRON, config, stdout, stderr, plugin.OPERATIONS.__getitem__)
    return stdout.getvalue(), stderr.getvalue()


def test_a_line_of_the_log_is_one_line_that_is_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, None) == ("", f"hostport: {SHOWN}\n")


def test_what_kubelets_put_into_events_is_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, _ = run(monkeypatch, CNIError(Code.PORT_TAKEN, HOSTILE, f"{HOSTILE}\n{HOSTILE}"))
    error = json.loads(stdout)
    assert error["msg"] == SHOWN
    assert error["details"].count("\n") == 3
    assert all(line.isprintable() for line in error["details"].splitlines())


def test_the_text_of_an_unexpected_error_makes_no_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr = run(monkeypatch, ValueError(HOSTILE))
    assert json.loads(stdout)["msg"] == f"unexpected ValueError: {SHOWN}"
    assert stderr.startswith(f"hostport: {SHOWN}\nTraceback (most recent call last):\n  File ")
    assert stderr.endswith(f"\nValueError: {SHOWN}\n")
    assert "\x1b" not in stderr


def test_syslog_gets_a_line_that_is_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    written = list[str]()
    monkeypatch.setattr(syslog, "syslog", lambda _priority, line: written.append(line))
    logged = list[str]()
    announce(logged.append, HOSTILE)
    assert (logged, written) == ([HOSTILE], [SHOWN])


def test_a_statement_and_a_table_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_statement(problem(HOSTILE, HOSTILE, HOSTILE, (HOSTILE,)))
    terminal.print_table(["POD"], [[HOSTILE]])
    terminal.print_line(HOSTILE)
    terminal.log(HOSTILE)
    output, log = capsys.readouterr()
    assert output == (
        f"problem  {SHOWN}\n           {SHOWN}\n         {SHOWN}\n         -> {SHOWN}\nPOD\n{SHOWN}\n{SHOWN}\n"
    )
    assert log == f"{SHOWN}\n"


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"\u6771 Gr\xfc\xdfe"), ("latin-1", r"\u6771 Grüße")])
def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    terminal.print_line("東 Grüße")
    terminal.print_statement(problem("東 Grüße"))
    sys.stdout.flush()
    assert written.getvalue().decode(encoding) == f"{shown}\nproblem  {shown}\n"


@pytest.mark.parametrize("arguments", [[HOSTILE], [f"--{HOSTILE}"], ["list", "--port", HOSTILE], ["list", HOSTILE]])
def test_what_is_wrong_with_a_command_line_is_printable(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments, prog_name="hostport")
    output = capsys.readouterr().err
    assert output.splitlines()[-1].startswith("Error: ")
    assert r"a\x1b[2J\nok all is well" in output.splitlines()[-1]


def test_what_goes_wrong_on_a_node_is_printable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, HOSTILE, HOSTILE)

    monkeypatch.setattr(arguments, "_may_use_nftables", lambda: True)
    monkeypatch.setattr(cli, "Nft", fail)
    with pytest.raises(SystemExit):
        cli.main(["list"], prog_name="hostport")
    assert capsys.readouterr().err == f"Error: {SHOWN}: {SHOWN}\n"


class Tables:
    def __init__(self, family: str, table: str, *chains: str) -> None:
        self.family, self.table = family, table
        hooked = [{"family": family, "table": table, "name": chain, "hook": chain.lower()} for chain in chains]
        self.chains = [{"chain": chain} for chain in hooked]

    def listing(self, _what: str) -> list[dict[str, dict[str, str]]]:
        return self.chains


@pytest.mark.parametrize(
    ("tables", "command"),
    [
        (Tables("inet", "$(id)"), "nft insert rule inet '$(id)' 'a;b' ct status dnat accept "),
        (Tables("ip", "`id`", "FORWARD"), "iptables -t '`id`' -I 'a;b' -m conntrack --ctstate DNAT -j ACCEPT "),
    ],
)
def test_what_is_to_be_pasted_into_a_shell_is_quoted(
    monkeypatch: pytest.MonkeyPatch, tables: Tables, command: str
) -> None:
    class Owners:
        def owner(self, _table: str, _family: str) -> None:
            return None

    monkeypatch.setattr(firewalls, "Lookup", Owners)
    assert firewalls.acceptance(tables, tables.family, tables.table, "a;b").startswith(command)  # type: ignore[arg-type]


def test_figures_are_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mapping:
        protocol, version, host_ip, host_port, key, connections = "tcp", 4, "0.0.0.0", 80, "k", 1
        pod = request = container_id = ifname = network = HOSTILE
        holder = HolderState.ALIVE

    monkeypatch.setattr(metrics, "Nft", object)
    monkeypatch.setattr(metrics, "read", lambda _: [Mapping])
    lines = metrics.text().decode().splitlines()
    assert all(map(str.isprintable, lines))
    doubled = SHOWN.replace("\\", "\\\\")
    assert f'pod="{doubled}"' in lines[-1]


def test_nothing_is_written_but_by_those_who_escape_it() -> None:
    package = Path(cni_hostport.__file__).parent
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func if isinstance(node, ast.Call) else node) if isinstance(node, ast.expr) else ""
            if name in WRITERS:
                found.setdefault(str(path.relative_to(package)), set()).add(name)
    assert found == OUTLETS
