from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest

from cni_hostport.operate import terminal
from cni_hostport.operate.statements import Statement, note, ok, problem

PROBLEM = problem(
    "Host port 8080 is not reachable.", "Clients get no answer.", "Open it in the firewall.", ("a rule", "another rule")
)
PRINT = """
import json, sys
from cni_hostport.operate.statements import Statement, Status
from cni_hostport.operate.terminal import print_statement
for parts in json.loads(sys.argv[1]):
    print_statement(Statement(**{**parts, "status": Status(parts["status"])}))
"""


def printed(capsys: pytest.CaptureFixture[str], *statements: Statement) -> str:
    for statement in statements:
        terminal.print_statement(statement)
    return capsys.readouterr().out


def at_a_terminal(columns: int, *statements: Statement, **environment: str) -> str:
    reader, terminal_end = pty.openpty()
    os.set_blocking(reader, False)
    terminal_size = ["stty", "cols", str(columns)]
    subprocess.run(terminal_size, stdin=terminal_end, check=True)
    arguments = json.dumps([statement.json() for statement in statements])
    environ: dict[str, Any] = {"TERM": "xterm", **environment}
    subprocess.run(
        [sys.executable, "-c", PRINT, arguments], stdin=terminal_end, stdout=terminal_end, env=environ, check=True
    )
    written = os.read(reader, 1 << 16).decode()
    os.close(reader)
    os.close(terminal_end)
    return written.replace("\r\n", "\n")


def test_a_statement_says_what_it_means_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, ok("All is well."), note("Worth knowing."), PROBLEM)
    assert (
        text
        == """\
ok       All is well.
note     Worth knowing.
problem  Host port 8080 is not reachable.
           a rule
           another rule
         Clients get no answer.
         -> Open it in the firewall.
"""
    )


def test_a_statement_is_not_wrapped_where_a_program_reads(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(f"8080/tcp on 192.0.2.{number}" for number in range(1000))
    assert printed(capsys, note(text)) == f"note     {text}\n"


def test_what_looks_like_markup_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, ok("[::]:80 [bold]x[/bold] :smile: [/]")) == "ok       [::]:80 [bold]x[/bold] :smile: [/]\n"


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_statement_keeps_within_the_terminal(columns: int) -> None:
    lines = re.sub(r"\x1b\[[0-9;]*m", "", at_a_terminal(columns, PROBLEM)).splitlines()
    assert max(map(len, lines)) <= columns
    assert not [line for line in lines if line.endswith(" ")]
    assert lines[0].startswith("problem  Host port")
    assert all(line.startswith(" " * 9) for line in lines[1:])
    assert "".join("".join(lines).split()) == "".join(
        f"problem{PROBLEM.text}{''.join(PROBLEM.details)}{PROBLEM.meaning}->{PROBLEM.remedy}".split()
    )


def test_a_status_has_a_colour_unless_none_is_wanted() -> None:
    assert "\x1b[1;31mproblem  \x1b[0mHost" in at_a_terminal(80, PROBLEM)
    assert "\x1b[1mproblem  \x1b[0mHost" in at_a_terminal(80, PROBLEM, NO_COLOR="1")


def test_in_json_a_statement_has_what_there_is_to_say() -> None:
    assert ok("All is well.").json() == {"status": "ok", "text": "All is well."}
    assert json.loads(json.dumps(PROBLEM.json())) == {
        "status": "problem",
        "text": "Host port 8080 is not reachable.",
        "meaning": "Clients get no answer.",
        "remedy": "Open it in the firewall.",
        "details": ["a rule", "another rule"],
    }
