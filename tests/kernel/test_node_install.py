from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from errno import ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab import file_state
from node_root import BIN_DIR, LIB_DIR, LIMITED, Fault, NodeRoot, Ran, forked, make_bundle, name_of
from resident import eventually

from cni_hostport.operate.node import installation, installations, root_directory
from cni_hostport.operate.node.bundle import MARKER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INSTALL = """
import sys
from pathlib import Path
from cni_hostport.operate.node import installation
installation.install(*map(Path, sys.argv[1:]), print)
"""
LONG_AGO = 2 * installations.CALL_BEGINS_WITHIN


def fresh(root: NodeRoot, bundle: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """Install in a process that has imported nothing else, started by what stands before it."""
    command = [*before, sys.executable, "-c", INSTALL, *map(str, (bundle, root.path, BIN_DIR, LIB_DIR))]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def bundles(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("bundles")
    return {version: make_bundle(top / version, version) for version in ("first", "second", "third")}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[NodeRoot]:
    with NodeRoot.mounted(tmp_path / "root") as made:
        yield made


@pytest.fixture
def root_with_proc(root: NodeRoot) -> Iterator[NodeRoot]:
    """A root directory in which the machine's processes are seen, as in that of a node."""
    (root.path / "proc").mkdir()
    subprocess.run(["mount", "--bind", "/proc", root.path / "proc"], check=True)
    yield root
    subprocess.run(["umount", "--lazy", root.path / "proc"], check=True)


def said(version: str) -> str:
    return f'"is": "{version}"'


def tree(top: Path) -> dict[str, tuple[int, bytes, float]]:
    """Return what is in a directory, but for what it is and for the marker."""
    return {
        str(path.relative_to(top)): (
            path.lstat().st_mode,
            os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b"",
            path.stat().st_mtime if path.is_file() and not path.is_symlink() else 0,
        )
        for path in sorted(top.rglob("*"))
        if path.name != MARKER
    }


def test_a_bundle_is_copied_as_it_is_and_the_executable_leads_to_it(root: NodeRoot, bundles: dict[str, Path]) -> None:
    name = name_of(bundles["first"])
    ran = root.install(bundles["first"])
    assert ran == Ran(
        0,
        f"Copied to {LIB_DIR}/{name}\nInstalled {BIN_DIR}/hostport, which leads to {LIB_DIR}/{name}\n",
    )
    assert (root.installed, root.current) == ([name], name)
    assert said("first") in root.answer()
    assert tree(root.at(LIB_DIR) / name) == tree(bundles["first"])
    assert os.listdir(root.link.parent) == ["hostport"]
    assert root.at(LIB_DIR).stat().st_mode & 0o777 == (root.at(LIB_DIR) / name).stat().st_mode & 0o777 == 0o755


def test_nothing_is_imported_in_an_empty_root_and_no_privilege_is_needed(
    root: NodeRoot, bundles: dict[str, Path]
) -> None:
    ran = fresh(root, bundles["first"], *LIMITED)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert said("first") in root.answer()


def test_the_same_version_is_not_copied_again(root: NodeRoot, bundles: dict[str, Path]) -> None:
    root.install(bundles["first"])
    places = root.link, root.at(LIB_DIR) / root.current / "bin" / "hostport"
    before = list(map(file_state, places))
    ran = root.install(bundles["first"])
    assert (ran.status, "Copied" in ran.text) == (0, False)
    assert list(map(file_state, places)) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "lib" / "module.py").write_text(""),
        lambda path: (path / "lib" / "module.py").unlink(),
        lambda path: (path / "bin" / "hostport").chmod(0o644),
        lambda path: (path / "bin" / "hostport").write_bytes(b"\0" * (path / "bin" / "hostport").stat().st_size),
        lambda path: (path / "bin" / "python3").unlink(),
        lambda path: (path / MARKER).unlink(),
    ],
    ids=["cut", "missing", "mode", "executable", "link", "marker"],
)
def test_a_damaged_installation_is_copied_again(
    root: NodeRoot, bundles: dict[str, Path], damage: Callable[[Path], object]
) -> None:
    root.install(bundles["first"])
    damage(root.at(LIB_DIR) / root.current)
    ran = root.install(bundles["first"])
    assert (ran.status, "Copied" in ran.text) == (0, True)
    assert root.installed == [name_of(bundles["first"])]
    assert tree(root.at(LIB_DIR) / root.current) == tree(bundles["first"])
    assert said("first") in root.answer()


def test_paths_on_the_node_lead_where_they_do_on_the_node(root: NodeRoot, bundles: dict[str, Path]) -> None:
    for path, target in (("opt/cni", "/var/data/cni"), ("opt/hostport", "/var/data/hostport")):
        (root.path / target.lstrip("/")).mkdir(parents=True)
        (root.path / path).parent.mkdir(exist_ok=True)
        (root.path / path).symlink_to(target)
    assert root.install(bundles["first"]).status == 0
    assert (root.path / "var/data/cni/bin/hostport").readlink() == LIB_DIR / name_of(bundles["first"]) / "bin/hostport"
    assert os.listdir(root.path / "var/data/hostport") == [name_of(bundles["first"])]
    assert said("first") in root.answer()
    assert not Path("/var/data").exists()


def test_without_a_look_at_processes_the_version_before_stays_and_older_ones_go(
    root: NodeRoot, bundles: dict[str, Path]
) -> None:
    first, second, third = map(name_of, bundles.values())
    for version in ("first", "second"):
        assert root.install(bundles[version]).status == 0
    assert root.installed == sorted([first, second])
    root.install(bundles["third"])
    root.switched_before(LONG_AGO)
    root.install(bundles["third"])
    assert root.installed == sorted([second, third])
    root.install(bundles["second"])  # back again
    root.install(bundles["first"])
    assert root.installed == sorted([first, second])
    assert said("first") in root.answer()


def test_a_version_stays_while_a_process_uses_it(root_with_proc: NodeRoot, bundles: dict[str, Path]) -> None:
    root = root_with_proc
    first, _, third = map(name_of, bundles.values())
    root.install(bundles["first"])
    with root.start("wait", stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        root.install(bundles["second"])
        root.install(bundles["third"])
        root.switched_before(LONG_AGO)
        root.install(bundles["third"])
        assert root.installed == sorted([first, third])
        process.kill()
    root.install(bundles["third"])
    assert root.installed == [third]


def test_a_version_that_was_replaced_just_now_stays(root_with_proc: NodeRoot, bundles: dict[str, Path]) -> None:
    for version in ("first", "second"):
        root_with_proc.install(bundles[version])
        root_with_proc.install(bundles[version])
    assert root_with_proc.installed == sorted([name_of(bundles["first"]), name_of(bundles["second"])])


def test_a_process_that_may_not_be_looked_into_is_told_by_its_command_line(
    root_with_proc: NodeRoot, bundles: dict[str, Path], tmp_path: Path
) -> None:
    root = root_with_proc
    for version in ("first", "second"):
        root.install(bundles[version])
    root.switched_before(LONG_AGO)
    shutil.copy(bundles["first"] / "bin" / "hostport", tmp_path / "hostport")
    with subprocess.Popen([tmp_path / "hostport", "wait"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert fresh(root, bundles["second"], *LIMITED).returncode == 0
        assert root.installed == sorted(map(name_of, (bundles["first"], bundles["second"])))
        process.kill()


def test_a_version_that_another_directory_leads_to_stays(root: NodeRoot, bundles: dict[str, Path]) -> None:
    root.install(bundles["first"], Path("/other"))
    for version in ("second", "third"):
        root.install(bundles[version])
    assert root.installed == sorted(map(name_of, bundles.values()))
    root.install(bundles["third"], Path("/other"))
    assert root.installed == sorted([name_of(bundles["second"]), name_of(bundles["third"])])


FOREIGN = {
    "a script": lambda place: place.write_text("#!/bin/sh\nexec something\n"),
    "a link": lambda place: place.symlink_to("/usr/bin/hostport"),
    "a link to something like it": lambda place: place.symlink_to("/opt/else/1.0/bin/hostport"),
    "a directory": lambda place: place.mkdir(),
    "a device": os.mkfifo,
    "nothing in it": lambda place: place.touch(),
}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_of_this_programs_making_stays(
    root: NodeRoot, bundles: dict[str, Path], foreign: Callable[[Path], object]
) -> None:
    root.link.parent.mkdir(parents=True)
    foreign(root.link)
    before = file_state(root.link)
    ran = root.install(bundles["first"])
    assert ran == Ran(1, f"Error: {BIN_DIR}/hostport: it is not of this program's making: move it away first\n")
    assert file_state(root.link) == before
    assert root.installed == []


def test_what_a_package_has_installed_stays(root: NodeRoot, bundles: dict[str, Path]) -> None:
    root.at(LIB_DIR).mkdir(parents=True)
    (root.at(LIB_DIR) / "packaged").symlink_to("0.1.0-x")
    ran = root.install(bundles["first"])
    assert ran.status == 1
    assert "hostport: it is of a package of this system, which has to be removed first\n" in ran.text
    assert root.installed == ["packaged"]


@pytest.mark.parametrize(
    "content",
    [
        b"#!/usr/local/lib/hostport/0.1.0-x/bin/python -IS\nimport sys\n\nfrom cni_hostport.handover import main\n",
        b"\x7fELF\0\0\nnative executable of /usr/local/lib/hostport/0.1.0-x/bin/hostport\n\0\0",
    ],
    ids=["Python", "native"],
)
def test_an_executable_that_the_script_made_is_replaced(
    root: NodeRoot, bundles: dict[str, Path], content: bytes
) -> None:
    root.link.parent.mkdir(parents=True)
    root.link.write_bytes(content)
    ran = root.install(bundles["first"])
    assert ran.status == 0
    assert ran.text.endswith(
        "The executable before was of the installation in /usr/local/lib/hostport/0.1.0-x, which stays as it is\n"
    )
    assert said("first") in root.answer()


def test_what_does_not_work_on_the_node_does_not_come_into_use(
    root: NodeRoot, bundles: dict[str, Path], tmp_path: Path
) -> None:
    root.install(bundles["first"])
    broken = make_bundle(tmp_path / "broken", "broken")
    strange = (bundles["first"] / "bin" / "hostport").read_bytes().replace(b"supportedVersions", b"unsupportedOnes__")
    for content, reason in (
        (b"#!/bin/sh\n", "No such file or directory"),
        (b"\x7fELF", "Exec format error"),
        (strange, "{"),
    ):
        (broken / "bin" / "hostport").write_bytes(content)
        ran = root.install(broken)
        assert (ran.status, ran.text.startswith(f"Error: {LIB_DIR}/.new-")) == (1, True)
        assert f"/bin/hostport: it does not work on this node: {reason}" in ran.text
        assert root.installed == [name_of(bundles["first"])]
        assert said("first") in root.answer()


def test_a_root_without_proc_is_named_where_that_may_be_why(root_with_proc: NodeRoot, tmp_path: Path) -> None:
    broken = make_bundle(tmp_path / "broken", "broken")
    (broken / "bin" / "hostport").write_text("")
    assert "/proc" not in root_with_proc.install(broken).text
    with NodeRoot.mounted(tmp_path / "other") as other:
        assert other.install(broken).text.endswith(", and there is no /proc in this root directory\n")


def test_a_file_of_another_kind_is_in_no_bundle(root: NodeRoot, tmp_path: Path) -> None:
    strange = make_bundle(tmp_path / "strange", "strange")
    os.mkfifo(strange / "lib" / "fifo")
    assert root.install(strange) == Ran(1, "Error: lib/fifo: it is neither a file nor a directory nor a link\n")


def install_on(root: NodeRoot, options: str, bundle: Path) -> Ran:
    """Install with another file system in the directory of installations, as in ``mount -o``."""
    place = root.at(LIB_DIR)
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try:
        ran = root.install(bundle)
        assert root.installed == []
    finally:
        subprocess.run(["umount", place], check=True)
    return ran


@pytest.mark.parametrize(
    ("options", "reason"),
    [("size=64k", "No space left on device"), ("ro", "Read-only file system"), ("noexec", "Permission denied")],
)
def test_a_file_system_that_does_not_do_is_named_and_all_stays(
    root: NodeRoot, bundles: dict[str, Path], options: str, reason: str
) -> None:
    (root.path / "opt/cni/bin").mkdir(parents=True)
    (root.path / "opt/cni/bin/hostport").symlink_to(LIB_DIR / "0.0.1" / "bin" / "hostport")
    ran = install_on(root, options, bundles["first"])
    assert (ran.status, ran.text.startswith(f"Error: {LIB_DIR}"), reason in ran.text) == (1, True, True), ran
    assert root.current == "0.0.1"


def test_a_read_only_plugin_directory_is_named(root: NodeRoot, bundles: dict[str, Path]) -> None:
    root.install(bundles["first"])
    bin_dir = root.at(BIN_DIR)
    subprocess.run(["mount", "--bind", bin_dir, bin_dir], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", bin_dir], check=True)
    try:
        ran = root.install(bundles["second"])
    finally:
        subprocess.run(["umount", bin_dir], check=True)
    assert ran.status == 1
    assert f"Error: {BIN_DIR}" in ran.text
    assert "Read-only file system" in ran.text
    assert said("first") in root.answer()
    assert root.install(bundles["second"]).status == 0
    assert said("second") in root.answer()


def faulty(root: NodeRoot, bundle: Path, strike: Callable[[], None], at: int) -> Ran:
    def work(log: Callable[[str], None]) -> None:
        fault = Fault(strike, at)
        sys.addaudithook(fault)
        installation.install(bundle, root.path, BIN_DIR, LIB_DIR, log)
        log(f"{fault.number} events")

    return forked(work)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(ENOSPC, os.strerror(ENOSPC))


@pytest.mark.parametrize("strike", [die, fail])
def test_an_installation_that_ends_anywhere_is_whole_or_not_there(
    root: NodeRoot, bundles: dict[str, Path], strike: Callable[[], None]
) -> None:
    versions = {name_of(bundles[version]): version for version in ("first", "second")}
    root.install(bundles["first"])
    events = int(faulty(root, bundles["second"], strike, 0).text.split()[-2])
    assert events > 60
    switched = 0
    for at in range(1, events + 1):
        current = root.current
        [other] = versions.keys() - {current}
        assert root.install(bundles[versions[current]]).status == 0
        assert {*root.installed} <= {*versions}
        shutil.rmtree(root.at(LIB_DIR) / other, ignore_errors=True)
        ran = faulty(root, bundles[versions[other]], strike, at)
        assert ran.status in ((-signal.SIGKILL,) if strike is die else (0, 1)), ran
        assert "Traceback" not in ran.text
        assert root.current in ({current, other} if ran.status else {other})
        switched += root.current == other
        whole = [name for name in root.installed if not name.startswith(".")]
        assert root.current in whole
        assert all(tree(root.at(LIB_DIR) / name) == tree(bundles[versions[name]]) for name in whole)
    assert 0 < switched < events
    assert root.answer()


def test_installations_at_once_do_not_disturb_each_other(root: NodeRoot, bundles: dict[str, Path]) -> None:
    ran: list[tuple[str, Ran]] = []

    def install(version: str) -> None:
        done = fresh(root, bundles[version])
        ran.append((version, Ran(done.returncode, done.stderr)))

    threads = [threading.Thread(target=install, args=[version]) for version in ("first", "second") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome for _, outcome in ran] == [Ran(0, "")] * 4
    assert root.installed == sorted(map(name_of, (bundles["first"], bundles["second"])))
    assert root.answer()


def test_an_installation_that_waited_while_the_directory_went_makes_another(
    root: NodeRoot, bundles: dict[str, Path]
) -> None:
    root.install(bundles["first"])
    lib_dir = root.at(LIB_DIR)
    outcomes: list[subprocess.CompletedProcess[str]] = []
    waiting = threading.Thread(target=lambda: outcomes.append(fresh(root, bundles["second"])))
    with installations.locked(lib_dir):
        waiting.start()
        assert eventually(lambda: "FLOCK" in blocked(lib_dir))
        lib_dir.rename(lib_dir.with_name("gone"))
    waiting.join()
    assert outcomes[0].returncode == 0
    assert root.installed == [name_of(bundles["second"])]
    assert said("second") in root.answer()


def blocked(path: Path) -> str:
    """Return what waits for a lock on a path."""
    locks = Path("/proc/locks").read_text().splitlines()
    return "".join(line for line in locks if "->" in line and f":{path.stat().st_ino} " in line)


def test_what_an_exception_ends_is_not_done_twice(root: NodeRoot) -> None:
    with pytest.raises(FileNotFoundError, match="within"), installations.locked(root.at(LIB_DIR)):
        raise FileNotFoundError(2, "within")


def test_versions_are_tidied_without_an_installation(root_with_proc: NodeRoot, bundles: dict[str, Path]) -> None:
    root = root_with_proc

    def tidy(log: Callable[[str], None]) -> None:
        with root_directory.inside(root.path):
            installation.tidy(BIN_DIR, LIB_DIR, log)

    assert forked(tidy) == Ran(0, "")
    for version in ("first", "second"):
        root.install(bundles[version])
    assert forked(tidy) == Ran(0, "")
    assert len(root.installed) == 2
    root.switched_before(LONG_AGO)
    assert forked(tidy) == Ran(0, "")
    assert root.installed == [name_of(bundles["second"])]


def test_calls_while_versions_change_do_not_fail(root_with_proc: NodeRoot, bundles: dict[str, Path]) -> None:
    root, answers, end = root_with_proc, list[str](), threading.Event()
    root.install(bundles["first"])

    def call() -> None:
        while not end.is_set():
            answers.append(root.answer())

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        for version in ("second", "third", "first", "second"):
            before = len(answers)
            assert fresh(root, bundles[version]).returncode == 0
            assert eventually(lambda: said(version) in answers[-1] and len(answers) > before + 10)  # noqa: B023
    finally:
        end.set()
        for caller in callers:
            caller.join()
    assert not [answer for answer in answers if "supportedVersions" not in answer]
    assert {version for version in bundles for answer in answers if said(version) in answer} == {*bundles}


def test_who_does_not_run_from_a_bundle_is_told_so() -> None:
    command = [sys.executable, "-m", "cni_hostport", "node", "install"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr == (
        f"Error: {sys.prefix}: this program does not run from a bundle, which alone can be installed on a node\n"
    )


def test_a_root_that_is_not_there_is_named(bundles: dict[str, Path], tmp_path: Path) -> None:
    assert NodeRoot(tmp_path / "absent").install(bundles["first"]) == Ran(
        1, f"Error: {tmp_path}/absent: No such file or directory\n"
    )
