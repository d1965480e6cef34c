from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from lab import LAUNCHER, NOBODY, NODE4, NODE6, Node, config, mapping, require

from cni_hostport import __version__
from cni_hostport.operate.cli import main

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = sorted(main.commands)
UNPRIVILEGED = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[([0-9;]*)m")
LONG6 = "2001:db8:1111:2222:3333:4444:5555:6666"
PATH = os.environ["PATH"]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": PATH, **environment}
    return subprocess.run(
        command, env=environ, cwd="/", stdin=subprocess.DEVNULL, check=False, capture_output=True, text=True
    )


@pytest.fixture
def as_nobody(_kernel: None) -> list[str]:
    require(shutil.which("setpriv"), "needs the program setpriv")
    return [*NOBODY, *LAUNCHER]


@pytest.fixture
def full(node: Node) -> Node:
    node.ip(f"addr add {LONG6}/64 dev uplink nodad")
    item, other = node.pod(), node.pod()
    asked = config(
        item, mapping(8080), mapping(53, 53, "udp", hostIP=NODE4), mapping(65535, 65535, "sctp", hostIP=LONG6)
    )
    args = f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-{'x' * 60}"
    assert node.cni("ADD", item, asked, ARGS=args).code == 0
    node.add(other, mapping(9090), name="n" * 100)
    return node


def at_a_terminal(node: Node, columns: int, *arguments: str, **environment: str) -> str:
    command = " ".join(["stty", "cols", str(columns), "&&", *LAUNCHER, *arguments])
    ran = node.run(
        "script", "--quiet", "--return", "--command", command, "/dev/null",
        env={"PATH": PATH, "TERM": "xterm", **environment}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return ran.stdout.replace("\r\n", "\n")


def test_without_arguments_it_says_what_it_is(as_nobody: list[str]) -> None:
    for command in ({}, {"CNI_COMMAND": ""}):
        ran = run(*as_nobody, **command)
        assert (ran.returncode, ran.stdout) == (0, "")
        assert f"CNI hostport plugin v{__version__}\n" in ran.stderr


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_command_and_needs_no_root(as_nobody: list[str], option: str) -> None:
    ran = run(*as_nobody, option)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.findall(r"^  ([a-z]+)  ", ran.stdout.partition("Commands:")[2], re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_each_command_has_help_that_needs_no_root(as_nobody: list[str], command: str, option: str) -> None:
    ran = run(*as_nobody, command, option)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"Usage: hostport {command} ")
    assert all(len(line) <= 80 for line in ran.stdout.splitlines())


def test_the_version_needs_no_root(as_nobody: list[str]) -> None:
    ran = run(*as_nobody, "--version")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"hostport, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("frobnicate", "No such command 'frobnicate'."),
        ("--frobnicate", "No such option '--frobnicate'."),
        ("list --frobnicate", "No such option '--frobnicate'."),
        ("list 8080", "Got unexpected extra argument (8080)"),
        ("list --port", "Option '--port' requires an argument."),
        ("list --port http", "Invalid value for '--port': 'http' is not PORT or PORT/PROTOCOL, as in 8080 or 53/udp"),
        ("list --port 0", "Invalid value for '--port': '0' is not PORT or PORT/PROTOCOL, as in 8080 or 53/udp"),
        ("list --port 53/", "Invalid value for '--port': '53/' is not PORT or PORT/PROTOCOL, as in 8080 or 53/udp"),
        ("port", "Missing argument 'POD'."),
        (
            "port web http",
            "Invalid value for '[PORT[/PROTOCOL]]': 'http' is not PORT or PORT/PROTOCOL, as in 8080 or 53/udp",
        ),
        ("explain", "Missing argument 'PORT[/PROTOCOL]'."),
        (
            "explain 65536",
            "Invalid value for 'PORT[/PROTOCOL]': '65536' is not PORT or PORT/PROTOCOL, as in 8080 or 53/udp",
        ),
        (
            "explain 53/icmp",
            "Invalid value for 'PORT[/PROTOCOL]': '53/icmp' is not PORT or PORT/PROTOCOL, as in 8080 or 53/udp",
        ),
        ("explain 53 --from here", "Invalid value for '--from': 'here' is not an IP address"),
        ("serve /run/a /run/b", "Got unexpected extra argument (/run/b)"),
        ("serve --frobnicate", "No such option '--frobnicate'."),
    ],
)
def test_wrong_usage_is_said_in_a_sentence(arguments: str, sentence: str) -> None:
    ran = run(*LAUNCHER, *arguments.split())
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.splitlines()[-1] == f"Error: {sentence}"


@pytest.mark.parametrize(
    "arguments", ["list", "list --json", "port web", "metrics", "restore", "doctor", "explain 8080"]
)
@pytest.mark.parametrize("without", [NOBODY, UNPRIVILEGED], ids=["nobody", "root without CAP_NET_ADMIN"])
@pytest.mark.usefixtures("_kernel")
def test_a_missing_privilege_is_said_in_a_sentence(without: list[str], arguments: str) -> None:
    command = arguments.split()
    ran = run(*without, *LAUNCHER, *command)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"Error: 'hostport {command[0]}' uses nftables, which needs root (CAP_NET_ADMIN)\n"


def test_serving_without_privileges_is_refused_in_a_sentence(as_nobody: list[str], tmp_path: Path) -> None:
    for arguments in ([], [str(tmp_path / "socket")]):
        ran = run(*as_nobody, "serve", *arguments)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert re.fullmatch(r"Error: cannot serve[^\n]*: [^\n]+\n", ran.stderr)


@pytest.mark.usefixtures("_kernel")
def test_serving_at_an_impossible_place_is_refused_in_a_sentence() -> None:
    ran = run(*LAUNCHER, "serve", "/nowhere/socket")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "Error: cannot serve /nowhere/socket: No such file or directory\n"


@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["frobnicate"]])
def test_with_a_command_of_cnis_arguments_mean_nothing(node: Node, arguments: list[str]) -> None:
    ran = node.run(*LAUNCHER, *arguments, env={"CNI_COMMAND": "VERSION"})
    assert json.loads(ran.stdout)["cniVersion"] == "1.1.0"
    ran = node.run(*LAUNCHER, *arguments, env={"CNI_COMMAND": "ADD"}, check=False)
    assert (ran.returncode, json.loads(ran.stdout)["code"]) == (1, 4)


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["metrics"], ["--help"]])
def test_a_reader_that_has_seen_enough_is_left_in_peace(full: Node, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        ["nsenter", f"--net={full.path}", *LAUNCHER, *arguments],
        check=False, stdout=writing, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    assert ran.stderr == ""


def test_the_first_line_of_many_can_be_cut_out(node: Node) -> None:
    node.add(node.pod(), *map(mapping, range(8000, 8400)))
    ran = node.run("sh", "-c", '"$@" | head -1', "sh", *LAUNCHER, "list")
    assert (ran.stdout.split()[0], ran.stdout.count("\n"), ran.stderr) == ("HOST", 1, "")


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["metrics"]])
def test_output_for_which_there_is_no_room_is_an_error(full: Node, arguments: list[str]) -> None:
    ran = full.run("sh", "-c", '"$@" > /dev/full', "sh", *LAUNCHER, *arguments, check=False)
    assert ran.returncode == 1
    assert re.fullmatch(r"Error: (standard output: )?No space left on device\n", ran.stderr)


def test_without_a_standard_output_nothing_is_shown(full: Node) -> None:
    ran = full.run("sh", "-c", '"$@" >&-', "sh", *LAUNCHER, "list")
    assert (ran.stdout, ran.stderr) == ("", "")


@pytest.mark.parametrize("columns", [40, 80, 132])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(full: Node, columns: int) -> None:
    lines = ESCAPE.sub("", at_a_terminal(full, columns, "list")).splitlines()
    assert max(map(len, lines)) <= columns
    assert not [line for line in lines if line != line.rstrip()]
    shown = "".join(line.strip() for line in lines).replace(" ", "")
    for load in json.loads(full.run(*LAUNCHER, "list", "--json").stdout):
        for part in ("host_ip", "host_port", "protocol", "pod_ip", "pod_port", "pod", "network", "ifname", "holder"):
            assert str(load[part]) in shown
        assert load["container_id"][:12] in shown
        address = f"[{load['pod_ip']}]" if ":" in load["pod_ip"] else load["pod_ip"]
        assert any(f"POD ADDRESS {address}:{load['pod_port']}" in line for line in lines)


def test_rows_that_do_not_fit_the_terminal_stand_below_each_other(node: Node) -> None:
    pod = node.pod(4)
    pod.id = "0123456789abcdef"
    asked = config(pod, mapping(8080), mapping(53, 53, "udp", hostIP=NODE4))
    assert node.cni("ADD", pod, asked, ARGS="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web").code == 0
    assert (
        ESCAPE.sub("", at_a_terminal(node, 80, "list"))
        == f"""\
{NODE4}:53/udp
  POD ADDRESS {pod.ip4}:53  POD shop/web  CONTAINER 0123456789ab  INTERFACE eth0
  NETWORK pods  DYNAMIC -  CONNECTIONS 0  HOLDER alive
0.0.0.0:8080/tcp
  POD ADDRESS {pod.ip4}:80  POD shop/web  CONTAINER 0123456789ab  INTERFACE eth0
  NETWORK pods  DYNAMIC -  CONNECTIONS 0  HOLDER alive
"""
    )
    assert ESCAPE.sub("", at_a_terminal(node, 120, "list")) == node.run(*LAUNCHER, "list").stdout


def test_there_is_colour_at_a_terminal_only_and_only_if_that_is_wanted(full: Node) -> None:
    assert "\x1b[1m" in at_a_terminal(full, 80, "list")
    plain = at_a_terminal(full, 80, "list", NO_COLOR="1")
    assert not [code for codes in COLOUR.findall(plain) for code in codes.split(";") if int(code or 0) >= 30]
    assert ESCAPE.sub("", plain) == ESCAPE.sub("", at_a_terminal(full, 80, "list"))
    for arguments in (["list"], ["list", "--json"], ["metrics"], ["doctor"], ["--help"], ["list", "--help"]):
        ran = full.run(*LAUNCHER, *arguments, env={"PATH": PATH, "TERM": "xterm"}, check=False)
        assert "\x1b" not in ran.stdout + ran.stderr


def test_json_is_the_same_at_a_terminal(full: Node) -> None:
    assert at_a_terminal(full, 40, "list", "--json") == full.run(*LAUNCHER, "list", "--json").stdout


def test_nothing_is_wrapped_where_a_program_reads(full: Node) -> None:
    lines = full.run(*LAUNCHER, "list", env={"PATH": PATH, "COLUMNS": "40"}).stdout.splitlines()
    assert len(lines) == 1 + 2 + 1 + 1 + 2
    assert f"[{LONG6}]:65535/sctp" in lines[-1]
    assert len({len(line) for line in lines[1:]}) == 1
    assert NODE6 not in "".join(lines)
