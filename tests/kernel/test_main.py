from __future__ import annotations

import json
import subprocess

import pytest
from lab import LAUNCHER, Outcome, result

ENVIRONMENT = {"CNI_CONTAINERID": "c1", "CNI_NETNS": "/run/netns/absent", "CNI_IFNAME": "eth0", "CNI_PATH": "/bin"}
CONFIG = {"cniVersion": "1.1.0", "name": "pods", "prevResult": result("10.1.0.2/24")}
WITHOUT_STDIN = ["sh", "-c", 'exec "$0" "$@" <&-', *LAUNCHER]


def run(command: str, stdin: str, *launcher: str) -> Outcome:
    environ = ENVIRONMENT | {"CNI_COMMAND": command}
    ran = subprocess.run(launcher or LAUNCHER, env=environ, input=stdin, check=False, capture_output=True, text=True)
    return Outcome(ran.returncode, ran.stdout, ran.stderr)


def test_the_process_answers_on_stdout_and_exits_with_0() -> None:
    outcome = run("ADD", json.dumps(CONFIG))
    assert (outcome.status, outcome.stderr) == (0, "")
    assert outcome.json == CONFIG["prevResult"]


def test_the_process_exits_with_1_and_an_error_on_stdout() -> None:
    outcome = run("ADD", "{")
    assert (outcome.status, outcome.stderr, outcome.code) == (1, "", 6)


@pytest.mark.parametrize(("command", "code"), [("VERSION", 0), ("ADD", 5)])
def test_a_closed_stdin_is_one_that_cannot_be_read(command: str, code: int) -> None:
    outcome = run(command, "", *WITHOUT_STDIN)
    assert outcome.stderr == ""
    assert outcome.code == code
