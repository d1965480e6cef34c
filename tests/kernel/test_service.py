from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab import NODE4, Node, config, mapping, require
from machine import SHIPPED, Machine
from resident import eventually
from tools import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS = ("hostport.service", "hostport.socket", "hostport-restore.service")
SYSTEMD = ROOT / "conf" / "systemd"
# what install.sh would change is this machine's own only in appearance, and systemctl only writes down what it is told
ON_A_MACHINE_OF_ITS_OWN = """
set -eu
for directory in /etc/systemd /run/systemd /opt /usr/local/lib /usr/local/bin; do
    mkdir -p $directory
    mount -t tmpfs tmpfs $directory
done
mkdir -p /etc/systemd/system /run/systemd/system
printf '#!/bin/sh\\necho "$@" >>"%s/systemctl.log"\\n' "$1" >/run/systemd/systemctl
chmod +x /run/systemd/systemctl
export PATH=/run/systemd:$PATH
cd "$1/source"
./install.sh $2
cp /etc/systemd/system/* "$1"
hostport --version
./install.sh $2 --uninstall
ls /etc/systemd/system /opt/cni/bin /usr/local/bin
"""
# a systemd that has no more to do than the units of a test
SYSTEMD_OF_ITS_OWN = """
set -eu
mount -t proc proc /proc
for directory in /run /etc/systemd/system /var/log; do mount -t tmpfs tmpfs $directory; done
cp "$1"/*.service "$1"/bare.target /etc/systemd/system
mkdir /etc/systemd/system/nftables.service.wants
ln -s ../hostport-restore.service /etc/systemd/system/nftables.service.wants
export container=other
exec /lib/systemd/systemd --system --unit=bare.target --log-target=console --log-level=warning
"""
BARE = "[Unit]\nDefaultDependencies=no\n"


def test_systemd_finds_nothing_wrong_with_the_units(installed_machine: Machine, tmp_path: Path) -> None:
    require(shutil.which("systemd-analyze"), "needs systemd-analyze")
    for name in UNITS:
        text = (SYSTEMD / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/cni/bin/hostport", str(installed_machine.executable)))
    command = ["systemd-analyze", "verify", *(str(tmp_path / name) for name in UNITS)]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize(("options", "bin_dir"), [("", "/opt/cni/bin"), ("--bin-dir /opt/bin", "/opt/bin")])
def test_an_installation_starts_the_resident_process_where_systemd_runs(
    tmp_path: Path, options: str, bin_dir: str
) -> None:
    (tmp_path / "machine").mkdir()
    machine = Machine(tmp_path / "machine")
    assert all((machine.source / name).exists() for name in SHIPPED)
    command = ["unshare", "--mount", "sh", "-c", ON_A_MACHINE_OF_ITS_OWN, "sh", str(machine.top), options]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "hostport, version " in ran.stdout, ran.stderr
    assert "hostport.service" not in ran.stdout
    socket, service = (machine.top / "hostport.socket").read_text(), (machine.top / "hostport.service").read_text()
    assert socket == (SYSTEMD / "hostport.socket").read_text()
    assert f"\nExecStart={bin_dir}/hostport serve\n" in service
    restore = (machine.top / "hostport-restore.service").read_text()
    assert f"\nExecStart={bin_dir}/hostport restore --watch 60\n" in restore
    assert f"\nExecReload={bin_dir}/hostport restore --watch 5\n" in restore
    assert (machine.top / "systemctl.log").read_text().splitlines() == [
        "daemon-reload",
        "enable hostport.socket hostport.service hostport-restore.service",
        "restart hostport.socket hostport.service hostport-restore.service",
        "disable --now hostport.socket hostport.service hostport-restore.service",
        "daemon-reload",
    ]


@pytest.fixture
def confined(installed_machine: Machine, tmp_path: Path) -> Iterator[Node]:
    """A node whose resident process has the capabilities of the unit, and whose executable cannot do without it."""
    require(shutil.which("setpriv"), "needs setpriv")
    service = (SYSTEMD / "hostport.service").read_text()
    line = next(line for line in service.splitlines() if line.startswith("CapabilityBoundingSet="))
    capabilities = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in line.partition("=")[2].split())
    path = tmp_path / "hostport.sock"
    launcher = installed_machine.executable.read_text()
    executable = tmp_path / "hostport"
    executable.write_text(launcher.replace("main()", f'sys.modules["cni_hostport.skel"] = None\nmain("{path}")'))
    executable.chmod(0o755)
    confine = ["setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set=-all,{capabilities}"]
    resident = subprocess.Popen([*confine, installed_machine.executable, "serve", path], env={})
    try:
        until = time.monotonic() + 20
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.05)
        with Node(launcher=[str(executable)]) as node:
            yield node
    finally:
        resident.kill()
        resident.wait()


def test_the_resident_process_needs_no_more_than_the_unit_allows(confined: Node) -> None:
    pod = confined.pod()
    pod.serve("tcp", 80, "web")
    pod.serve("udp", 53, "dns")
    mappings = mapping(8080), mapping(53, 53, "udp")
    confined.add(pod, *mappings)
    assert confined.client.ask("tcp", NODE4, 8080).startswith("web")
    assert confined.client.ask("udp", NODE4, 53).startswith("dns")
    assert confined.ask("tcp", "127.0.0.1", 8080).startswith("web")
    assert confined.cni("CHECK", pod, config(pod, *mappings)).status == 0
    confined.delete(pod)
    assert confined.client.is_silent("tcp", NODE4, 8080)


@pytest.mark.usefixtures("_kernel")
def test_host_ports_are_restored_when_the_firewall_was_started_restarted_and_reloaded(tmp_path: Path) -> None:
    require(Path("/lib/systemd/systemd").exists(), "needs systemd")
    log = tmp_path / "log"
    note = f"/bin/sh -c 'sleep 0.2; echo %s >>{log}'"
    nftables = f"{BARE}[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart={note % 'loaded'}\n"
    (tmp_path / "nftables.service").write_text(f"{nftables}ExecReload={note % 'loaded again'}\n")
    restore = (SYSTEMD / "hostport-restore.service").read_text().replace("[Unit]\n", BARE)
    for stays in ("60", "5"):  # and fails then, for one of the pods
        failing = f"=/bin/sh -c 'echo restored >>{log}; sleep {int(stays) // 2}; exit 1'"
        restore = restore.replace(f"=/opt/cni/bin/hostport restore --watch {stays}", failing)
    (tmp_path / "hostport-restore.service").write_text(restore)
    (tmp_path / "bare.target").write_text(BARE)
    spaces = ["unshare", "--mount", "--pid", "--fork", "--ipc", "--uts", "--net", "--kill-child"]
    with subprocess.Popen([*spaces, "sh", "-c", SYSTEMD_OF_ITS_OWN, "sh", tmp_path]) as started:
        try:
            children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
            assert eventually(lambda: children.read_text().strip())
            systemctl = ["nsenter", f"--target={children.read_text().strip()}", "--mount", "--pid", "systemctl"]
            running = [*systemctl, "is-active", "bare.target"]
            assert eventually(lambda: not subprocess.run(running, capture_output=True, check=False).returncode)
            reload = ("reload", "loaded again")
            for verb, loaded in (("start", "loaded"), ("restart", "loaded"), reload, reload):
                log.write_text("")
                subprocess.run([*systemctl, verb, "nftables.service"], check=True)
                assert eventually(lambda: "restored" in log.read_text())
                assert log.read_text() == f"{loaded}\nrestored\n"
        finally:
            started.kill()
