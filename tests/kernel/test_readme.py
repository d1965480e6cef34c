from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab import require
from transcripts import transcripts as run_transcripts

from cni_hostport.config import NetworkConfig
from cni_hostport.dynamic_ports import keys, pod_files
from cni_hostport.dynamic_ports.request import named, parse
from cni_hostport.errors import Code
from cni_hostport.runtime_keys import PortMapping

if TYPE_CHECKING:
    from collections.abc import Callable

    from installation import Machine
    from lab import Node

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    """Return the fenced block that follows the comment ``<!-- NAME -->``."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```\n", README, re.DOTALL)
    assert found, name
    return found.group(1)


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table whose first column has this heading."""
    found = re.search(rf"^\| {re.escape(heading)} \|.*\n\| ---.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert found, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found.group(1).splitlines()]


def test_the_demonstration_prints_what_the_readme_shows(installed_machine: Machine) -> None:
    version = subprocess.run(["nft", "--version"], capture_output=True, text=True, check=True).stdout
    require("v1.0.6 " in version, f"the README shows the output of nftables 1.0.6, and this is {version}")
    demonstrated = installed_machine.install("--demo")
    assert demonstrated.returncode == 0, demonstrated.stderr
    shown = re.sub(r"demo\d+-", "demo-", demonstrated.stdout)
    shown = re.sub(r"@[\d:]+ \d+:\d+ /run", "@25:1389:6291 4:4026532281 /run", shown)
    assert shown.strip() == block("demo").strip()


@pytest.fixture(scope="module")
def transcripts(_kernel: None) -> dict[str, str]:
    return run_transcripts()


@pytest.mark.parametrize("name", re.findall(r"<!-- (hostport .*?) -->", README))
def test_the_operators_commands_print_what_the_readme_shows(transcripts: dict[str, str], name: str) -> None:
    version = subprocess.run(["nft", "--version"], capture_output=True, text=True, check=True).stdout
    require("v1.0.6 " in version, f"the README shows the output of nftables 1.0.6, and this is {version}")
    assert transcripts[name] == block(name)


def test_every_transcript_is_in_the_readme(transcripts: dict[str, str]) -> None:
    assert {name for name in transcripts if f"<!-- {name} -->" not in README} == set()


def test_the_conflist_is_the_one_in_conf() -> None:
    name = "conf/10-hostport.conflist"
    assert json.loads(block(name)) == json.loads((ROOT / name).read_text())


@pytest.fixture
def run_cnitool(
    installed_machine: Machine, node: Node, cnitool: Path, plugin_dir: Path, tmp_path: Path
) -> Callable[[str], str]:
    """Run a block's commands on a node, and return what they print."""
    node.ip("link del cni0")
    (tmp_path / "conf").symlink_to(ROOT / "conf")

    def run(name: str) -> str:
        script = re.sub(r"^\$ |sudo (-E )?", "", block(name), flags=re.MULTILINE)
        script = script.replace("/opt/cni/bin", str(installed_machine.bin)).replace("/usr/lib/cni", str(plugin_dir))
        script = re.sub(r"hostport-(web|game)", rf"{node.name}-\1", script).replace("cnitool ", f"{cnitool} ")
        own_state = 'mkdir -p /var/lib/cni; mount -t tmpfs none /var/lib/cni; cd "$0"; set -eux\n'
        ran = node.run("unshare", "--mount", "sh", "-c", own_state + script, str(tmp_path), check=False)
        assert ran.returncode == 0, ran.stderr
        assert "dnat-" not in node.ruleset()
        return ran.stdout

    return run


def test_the_cnitool_commands_work(run_cnitool: Callable[[str], str]) -> None:
    run_cnitool("cnitool")


def test_the_cnitool_commands_for_dynamic_host_ports_work(run_cnitool: Callable[[str], str]) -> None:
    printed = run_cnitool("cnitool, dynamic")
    assert re.search(r"hostport 80/tcp=40\d{3} 9000-9002/udp=40\d{3}$", printed, re.MULTILINE), printed


def test_the_pod_that_asks_for_dynamic_host_ports_reads_them_where_they_are() -> None:
    pod = block("dynamic pod")
    [asked] = re.findall(rf"^    {keys.REQUEST}: (.+)$", pod, re.MULTILINE)
    assert [named(found) for found in parse(asked)] == ["80/tcp", "9000-9002/udp"]
    [mounted] = re.findall(r"mountPath: ([^,]+), subPathExpr: \$\(POD_UID\)", pod)
    assert f"cat {mounted}/{pod_files.NAME};" in pod
    assert f"path: {pod_files.DIRECTORY}," in pod


def test_the_object_for_dynamic_host_ports_is_that_for_others_and_two_keys() -> None:
    shown, dynamic = json.loads(block("object")), json.loads(block("dynamic object"))
    NetworkConfig.parse(dynamic)
    assert dynamic.pop("dynamicPorts")
    assert dynamic["capabilities"].pop(keys.ANNOTATIONS) is True
    assert dynamic == shown


def test_the_object_for_a_conflist_is_in_the_one_in_conf_and_of_install_sh() -> None:
    conflist = json.loads((ROOT / "conf" / "10-hostport.conflist").read_text())
    shown, whole = json.loads(block("object")), conflist["plugins"][1]
    assert whole == shown | {"capabilities": whole["capabilities"] | shown["capabilities"]}
    assert block("object").strip() in (ROOT / "install.sh").read_text()


def test_the_commands_for_a_second_uplink_are_taken_by_nft_and_ip(node: Node) -> None:
    script = re.sub(r"^\$ sudo ", "", block("second uplink"), flags=re.MULTILINE)
    node.run("sh", "-eu", "-c", script)
    assert 'iifname "uplink2" ct state new ct mark set 0x00000066' in node.nft("list table inet uplinks")
    assert "fwmark 0x66 lookup 102" in node.run("ip", "rule").stdout


def test_every_key_of_the_configuration_has_its_row() -> None:
    documented = {key for row in table("key")[1:] for key in re.findall(r"`(\w+)`", row[0])}
    fields = {field.alias or name for name, field in NetworkConfig.model_fields.items()}
    assert documented == fields - {"runtimeConfig", "prevResult"}


def test_every_key_of_a_mapping_has_its_row() -> None:
    found = re.search(r"^\| key \| meaning \|\n\| ---.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert found
    assert set(re.findall(r"^\| `(\w+)`", found.group(1), re.MULTILINE)) == {
        field.alias or name for name, field in PortMapping.model_fields.items()
    }


def test_every_error_code_has_its_row() -> None:
    assert {int(code) for row in table("code") for code in row[0].split(",")} == set(Code)


def test_ci_runs_the_test_command() -> None:
    assert "$ sudo ./install.sh --test\n" in README
    assert "./install.sh --test\n" in (ROOT / ".ci" / "run").read_text()
