from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from lab import Node, mapping
from libcni_cache import CAPABLE, Cache
from node_root import BIN_DIR, LIB_DIR, LIMITED, Fault, NodeRoot, Ran, forked, make_bundle, name_of
from resident import eventually

from cni_hostport.operate.node import uninstallation

if TYPE_CHECKING:
    from collections.abc import Iterator

CONF_DIR, CACHE = Path("/etc/cni/net.d"), Path("/var/lib/cni")
OURS = {
    "cniVersion": "1.0.0", "name": "pods", "hostportDerivedFrom": "10-pods.conflist",
    "plugins": [{"type": "bridge"}, CAPABLE],
}  # fmt: skip
PRIMARY = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}]}
REMOVED = f"Removed hostport from {BIN_DIR} and {LIB_DIR}.\n"
TURN, OVER = b".", b"!"
UNINSTALL = """
import sys
from pathlib import Path
from cni_hostport.operate.node import uninstallation
uninstallation.QUIET = 0
root, bin_dir, lib_dir, conf_dir, cache = map(Path, sys.argv[1:])
uninstallation.uninstall(root, bin_dir, lib_dir, conf_dir, [cache], log=print)
"""


class Installed:
    """A node with the plugin, in a root directory of its own."""

    def __init__(self, node: Node, root: NodeRoot, bundle: Path) -> None:
        self.node, self.root = node, root
        self.cache = Cache(root.at(CACHE))
        self.conf_dir = root.at(CONF_DIR)
        self.conf_dir.mkdir(parents=True)
        self.write("00-hostport.conflist", OURS)
        self.write("10-pods.conflist", PRIMARY)
        assert root.install(bundle).status == 0

    def write(self, name: str, conflist: dict[str, Any]) -> None:
        (self.conf_dir / name).write_text(json.dumps(conflist))

    @property
    def configurations(self) -> list[str]:
        return sorted(path.name for path in self.conf_dir.iterdir())

    @property
    def is_installed(self) -> bool:
        return self.root.link.is_symlink() and bool(self.root.installed) and len(self.configurations) > 1

    @property
    def is_removed(self) -> bool:
        return not self.root.link.is_symlink() and not self.root.at(LIB_DIR).exists() and len(self.configurations) == 1

    def uninstall(self, fault: Fault | None = None, **options: Any) -> Ran:
        directories = options.pop("bin_dir", BIN_DIR), options.pop("lib_dir", LIB_DIR)

        def work(log: Any) -> None:
            if fault:
                sys.addaudithook(fault)
            uninstallation.uninstall(self.root.path, *directories, CONF_DIR, [CACHE], log=log, **options)

        with self.node.inside():
            return forked(work)


@pytest.fixture(scope="module")
def bundle(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "only", "only")  # no name of what test_node_install has


@pytest.fixture
def installed(node: Node, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    monkeypatch.setattr(uninstallation, "QUIET", 0.1)
    monkeypatch.setattr(uninstallation, "INTERVAL", 0.02)
    with NodeRoot.mounted(tmp_path / "root") as root:
        yield Installed(node, root, bundle)


def test_all_that_is_of_this_plugin_goes(installed: Installed) -> None:
    told = installed.root.at(Path("/run/hostport/pods/12345678/dynamic-ports.json"))
    told.parent.mkdir(parents=True)
    told.touch()
    ran = installed.uninstall()
    assert os.listdir(installed.root.at(Path("/run"))) == []
    assert ran == Ran(0, f"{CONF_DIR}/00-hostport.conflist is removed\n{REMOVED}")
    assert installed.is_removed
    assert installed.configurations == ["10-pods.conflist"]
    assert installed.root.link.parent.exists()
    again = installed.uninstall()
    assert again == Ran(0, f"{CONF_DIR} has no network configuration of this plugin\n{REMOVED}")


def test_files_of_others_stay(installed: Installed) -> None:
    other = installed.root.link.with_name("bridge")
    other.touch()
    kept = installed.root.at(LIB_DIR) / "notes"
    kept.touch()
    installed.write("05-broken.conf", {})
    assert installed.uninstall().status == 0
    assert other.exists()
    assert installed.root.installed == ["notes"]
    assert installed.configurations == ["05-broken.conf", "10-pods.conflist"]


def test_it_refuses_while_containers_need_it_and_names_them(installed: Installed) -> None:
    pod, other = installed.node.pod(), installed.node.pod()
    installed.cache.add(pod)
    installed.cache.add(other, plugin={"type": "portmap"})
    ran = installed.uninstall()
    assert ran == Ran(
        1,
        f"Error: {BIN_DIR}/hostport: it is needed by pod shop/{pod.host_end} (eth0, network pods). Delete these first;"
        " or use --wait, with which new pods do without this plugin; or --force, with which the end of these fails\n",
    )
    assert installed.is_installed
    installed.cache.remove(pod)
    assert installed.uninstall().status == 0


def test_what_cannot_be_read_may_be_of_a_container(installed: Installed) -> None:
    pod = installed.node.pod()
    path = installed.cache.add(pod)
    path.write_text("{")
    ran = installed.uninstall()
    assert ran.status == 1
    assert f"needed by whoever {CACHE}/results/{path.name} is of (it cannot be read: " in ran.text
    assert installed.is_installed


def test_many_containers_are_not_all_named(installed: Installed) -> None:
    pod = installed.node.pod()
    for number in range(uninstallation.NAMED + 3):
        installed.cache.add(pod, ifname=f"eth{number}")
    ran = installed.uninstall()
    assert "(eth1, network pods)" in ran.text
    assert ", and 3 others. " in ran.text
    assert ran.text.count("network pods") == uninstallation.NAMED


class Uninstalling:
    """An uninstallation whose pauses last until ``turn``; no time passes for it before the end of the context."""

    def __init__(self, installed: Installed, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.installed, self.outcomes = installed, list[Ran]()
        self._waits, self._turns = os.pipe()
        self._is_over = False
        monkeypatch.setattr(uninstallation, "time", self)  # in the fork that does the work
        self._thread = threading.Thread(target=lambda: self.outcomes.append(installed.uninstall(**options)))

    def sleep(self, _seconds: float) -> None:
        self._is_over = self._is_over or os.read(self._waits, 1) == OVER

    def monotonic(self) -> float:
        return time.monotonic() if self._is_over else 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._turns, OVER)
        self._thread.join()
        for end in (self._waits, self._turns):
            os.close(end)

    def turn(self) -> None:
        os.write(self._turns, TURN)

    def wait_for_removal(self) -> None:
        assert eventually(lambda: self.installed.configurations == ["10-pods.conflist"])


def test_a_container_that_came_while_the_configuration_went_is_seen(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = installed.node.pod()
    with Uninstalling(installed, monkeypatch) as uninstalling:
        uninstalling.wait_for_removal()
        installed.cache.add(pod)
    assert uninstalling.outcomes[0].status == 1
    assert f"needed by pod shop/{pod.host_end}" in uninstalling.outcomes[0].text
    assert installed.root.answer()


def test_a_configuration_that_comes_back_is_refused(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    with Uninstalling(installed, monkeypatch) as uninstalling:
        uninstalling.wait_for_removal()
        installed.write("00-hostport.conflist", OURS)
    reason = "it is there again: end what keeps it there first, the DaemonSet"
    assert uninstalling.outcomes[0].text.endswith(f"Error: {CONF_DIR}/00-hostport.conflist: {reason}\n")
    assert installed.is_installed


def test_who_waits_removes_a_configuration_that_comes_back(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Uninstalling(installed, monkeypatch, wait=True) as uninstalling:
        for _ in range(2):
            uninstalling.wait_for_removal()
            installed.write("00-hostport.conflist", OURS)
            uninstalling.turn()
        uninstalling.wait_for_removal()
    [ran] = uninstalling.outcomes
    assert (ran.status, ran.text.count("is removed\n")) == (0, 3)
    assert installed.is_removed


def test_by_force_it_does_not_ask(installed: Installed) -> None:
    pod = installed.node.pod()
    installed.cache.add(pod)
    installed.cache.path(pod, "broken").write_text("{")
    assert installed.uninstall(force=True).status == 0
    assert installed.is_removed


def test_it_waits_until_no_container_needs_it(installed: Installed, tmp_path: Path) -> None:
    pods = [installed.node.pod() for _ in range(2)]
    for pod in pods:
        installed.cache.add(pod)
    log = tmp_path / "log"
    code = UNINSTALL.replace("QUIET = 0", "QUIET = 0.5; uninstallation.INTERVAL = 0.02").replace(
        "log=print", "log=print, wait=True"
    )
    command = [sys.executable, "-uc", code, *map(str, (installed.root.path, BIN_DIR, LIB_DIR, CONF_DIR, CACHE))]
    names = [f"pod shop/{pod.host_end} (eth0, network pods)" for pod in pods]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as waiting:
        try:
            assert eventually(lambda: f"Waiting for the end of {', '.join(names)}\n" in log.read_text())
            assert installed.configurations == ["10-pods.conflist"]
            assert installed.root.answer()
            installed.cache.remove(pods[0])
            assert eventually(lambda: f"Waiting for the end of {names[1]}\n" in log.read_text())
            installed.cache.remove(pods[1])
            assert waiting.wait(30) == 0, log.read_text()
        finally:
            waiting.kill()
    assert installed.is_removed
    lines = log.read_text().splitlines()
    assert (lines[3], f"{lines[4]}\n") == ("No container is left", REMOVED)


@pytest.mark.parametrize("name", ["05-own.conflist", "20-single.conf"])
def test_a_configuration_of_others_that_has_it_comes_first(installed: Installed, name: str) -> None:
    installed.write(name, PRIMARY | {"plugins": [CAPABLE]} if name.endswith("list") else {"name": "x", **CAPABLE})
    for wait in (False, True):
        ran = installed.uninstall(wait=wait)
        reason = "it has the plugin hostport, without which all pods fail: change it first"
        assert ran == Ran(1, f"Error: {CONF_DIR}/{name}: {reason}\n")
        assert installed.is_installed
    assert installed.uninstall(force=True).status == 0
    assert name in installed.configurations


def test_what_is_not_of_this_installation_stays(installed: Installed) -> None:
    ran = installed.uninstall(lib_dir=Path("/elsewhere"))
    assert ran.status == 1
    assert (
        f"{BIN_DIR}/hostport: it is of the installation in {LIB_DIR}/{installed.root.current}, which stays" in ran.text
    )
    installed.root.link.unlink()
    for content, reason in (
        (
            "#!/x/bin/python -IS\nfrom cni_hostport.handover import main\n",
            "it is of the installation in /x, which stays",
        ),
        ("#!/bin/sh\n", "it is not of this program's making"),
    ):
        installed.root.link.write_text(content)
        ran = installed.uninstall(force=True)
        assert ran.status == 1
        assert f"Error: {BIN_DIR}/hostport: {reason}" in ran.text
        assert installed.root.installed
        assert installed.root.link.read_text() == content


def test_an_installation_that_another_directory_leads_to_stays(installed: Installed, bundle: Path) -> None:
    other = Path("/other")
    installed.root.install(bundle, other)
    ran = installed.uninstall()
    name = name_of(bundle)
    assert f"{LIB_DIR}/{name} stays: an executable in another directory leads to it\n" in ran.text
    assert installed.root.installed == [name]
    assert installed.uninstall(bin_dir=other).status == 0
    assert not installed.root.at(LIB_DIR).exists()


@pytest.fixture
def _proc(installed: Installed) -> Iterator[None]:
    """Mount ``/proc`` in the root directory, as it is in that of a node."""
    place = installed.root.path / "proc"
    place.mkdir()
    subprocess.run(["mount", "--bind", "/proc", place], check=True)
    yield
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.usefixtures("_proc")
def test_the_table_goes_with_its_last_mapping(installed: Installed) -> None:
    node = installed.node
    pod = node.pod()
    node.add(pod, mapping(8080))
    ran = installed.uninstall()
    assert ran.status == 0
    assert ran.text.endswith(
        "The table inet hostport stays: host ports are in it. When nobody needs them, 'nft delete table inet hostport'"
        " removes it.\n"
    )
    node.delete(pod)
    assert "table inet hostport" in node.ruleset()
    ran = installed.uninstall()
    assert ran.text.endswith(f"{REMOVED}Removed the table inet hostport.\n")
    assert node.nft("list ruleset") == ""


ROUTE_LOCALNET = "net/ipv4/conf/cni0/route_localnet"


def opened_and_left(node: Node) -> None:
    """Leave an interface as a DEL does that is killed in its last steps."""
    pod = node.pod()
    node.add(pod, mapping(8080))
    node.delete(pod)
    with node.inside():
        index = socket.if_nametoindex("cni0")
    node.nft_file(
        f'add chain inet hostport localnet-{index}\nadd element inet hostport localnet {{ "cni0" comment "opened" }}\n'
    )
    node.set_sysctl(ROUTE_LOCALNET, 1)


@pytest.mark.usefixtures("_proc")
def test_an_interface_that_this_plugin_opened_is_closed(installed: Installed) -> None:
    opened_and_left(installed.node)
    assert installed.uninstall().text.endswith(f"{REMOVED}Removed the table inet hostport.\n")
    assert installed.node.get_sysctl(ROUTE_LOCALNET).strip() == "0"


def test_an_interface_that_cannot_be_closed_stays_guarded(installed: Installed) -> None:
    opened_and_left(installed.node)
    before = installed.node.ruleset()
    ran = installed.uninstall()
    assert "may be left in the node's network namespace (/proc/sys/net/ipv4/conf: No such" in ran.text
    assert installed.node.ruleset() == before


@pytest.mark.usefixtures("_proc")
def test_an_interface_that_somebody_else_opened_is_named(installed: Installed) -> None:
    node = installed.node
    pod = node.pod()
    node.set_sysctl(ROUTE_LOCALNET, 1)
    node.add(pod, mapping(8080))
    node.delete(pod)
    assert installed.uninstall().text.endswith(
        "Removed the table inet hostport.\n"
        "net.ipv4.conf.cni0.route_localnet is 1, which somebody else may need; without the table, neighbours there can"
        " reach the node's 127.0.0.1. If nobody needs it, set it to 0.\n"
    )
    assert node.get_sysctl(ROUTE_LOCALNET).strip() == "1"
    assert node.nft("list ruleset") == ""


def test_in_an_empty_root_and_without_rights_it_says_what_is_left(installed: Installed) -> None:
    pods = [installed.node.pod() for _ in range(3)]
    installed.cache.add(pods[0], plugin={"type": "portmap"})
    installed.cache.add(pods[1], netns=None)
    installed.cache.path(pods[2]).write_text('{"kind": "cniCacheV1"}')
    directories = map(str, (installed.root.path, BIN_DIR, LIB_DIR, CONF_DIR, CACHE))
    command = [*LIMITED, sys.executable, "-c", UNINSTALL, *directories]
    refused = installed.node.run(*command, check=False)
    assert refused.returncode == 1
    unreadable = f"whoever {CACHE}/results/pods-{pods[2].id}-eth0 is of (it cannot be read: containerId: Field required"
    assert f"it is needed by pod shop/{pods[1].host_end} (eth0, network pods), {unreadable}" in refused.stderr
    for pod in pods[1:]:
        installed.cache.remove(pod)
    done = installed.node.run(*command, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(
        "The table inet hostport may be left in the node's network namespace (Operation not permitted). There, with"
        " CAP_NET_ADMIN, 'nft delete table inet hostport' removes it.\n"
    )
    assert installed.is_removed


def test_where_it_is_killed_the_next_one_goes_on(installed: Installed, bundle: Path) -> None:
    def die() -> None:
        signal.raise_signal(signal.SIGKILL)

    at, ran = 0, Ran(-signal.SIGKILL, "")
    while ran.status == -signal.SIGKILL:
        installed.write("00-hostport.conflist", OURS)
        installed.root.install(bundle)
        at += 1
        ran = installed.uninstall(Fault(die, at), force=True)
        if installed.root.link.is_symlink():
            assert installed.root.answer()
        if at % 5 == 0:
            assert installed.uninstall(force=True).status == 0
            assert installed.is_removed
    assert ran.status == 0
    assert at > 20
    assert installed.is_removed


def test_a_node_without_any_of_it_is_left_alone(node: Node, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with node.inside():
        ran = forked(
            lambda log: uninstallation.uninstall(
                tmp_path / "root", BIN_DIR, LIB_DIR, CONF_DIR, [CACHE], log=log, force=True
            )
        )
    assert ran == Ran(0, f"{CONF_DIR} is no directory: there is no network configuration to remove\n{REMOVED}")
    assert list((tmp_path / "root").iterdir()) == []


def test_the_command_takes_one_of_two_options() -> None:
    command = [sys.executable, "-m", "cni_hostport", "node", "uninstall", "--wait", "--force"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, "--wait and --force do not go together" in ran.stderr) == (2, True)
