from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from go_tools import ROOT
from installation import SHIPPED, Machine
from lab import require
from resident import eventually
from systemd import PROGRAM, Systemd

if TYPE_CHECKING:
    from lab import Node

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


def test_host_ports_are_restored_when_the_firewall_was_started_restarted_and_reloaded(
    node: Node, tmp_path: Path
) -> None:
    require(PROGRAM.exists(), "needs systemd")
    note = "/bin/sh -c 'sleep 0.2; echo %s >>/run/noted'"
    nftables = f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart={note % 'loaded'}\n"
    restore = (SYSTEMD / "hostport-restore.service").read_text()
    for stays in ("60", "5"):  # and fails then, for one of the pods
        failing = f"=/bin/sh -c 'echo restored >>/run/noted; sleep {int(stays) // 2}; exit 1'"
        restore = restore.replace(f"=/opt/cni/bin/hostport restore --watch {stays}", failing)
    units = {
        "nftables.service": f"{nftables}ExecReload={note % 'loaded again'}\n",
        "hostport-restore.service": restore,
        "nftables.service.d/wants.conf": "[Unit]\nWants=hostport-restore.service\n",
    }
    with Systemd(node, tmp_path, units) as systemd:
        noted = Path(f"/proc/{systemd.process}/root/run/noted")
        reload = ("reload", "loaded again")
        for verb, loaded in (("start", "loaded"), ("restart", "loaded"), reload, reload):
            noted.write_text("")
            systemd.run("systemctl", verb, "nftables.service")
            assert eventually(lambda: "restored" in noted.read_text())
            assert noted.read_text() == f"{loaded}\nrestored\n"
