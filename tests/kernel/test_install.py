from __future__ import annotations

import concurrent.futures
import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from installation import Machine
from lab import Node, config, mapping, require
from resident import eventually

if TYPE_CHECKING:
    from lab import Node


@pytest.fixture(scope="module")
def machine(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine.installed(tmp_path_factory.mktemp("machine"))


def run(executable: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([executable, *arguments], capture_output=True, text=True, check=False, env=variables)


def test_the_executable_says_what_it_is(machine: Machine) -> None:
    shown = subprocess.run([machine.executable], capture_output=True, text=True, check=True, env={})
    assert shown.stdout == ""
    assert shown.stderr.startswith("CNI hostport plugin v")


def test_installing_again_builds_nothing_and_prints_the_line_for_a_conflist(machine: Machine) -> None:
    before = machine.builds()
    again = machine.install()
    assert again.returncode == 0
    assert "Building" not in again.stderr
    assert again.stdout == '    { "type": "hostport", "capabilities": { "portMappings": true } }\n'
    assert machine.builds() == before


def test_only_the_executable_is_in_the_plugin_directory(machine: Machine) -> None:
    assert list(machine.bin.iterdir()) == [machine.executable]
    assert machine.executable.stat().st_mode & 0o777 == 0o755


def test_with_a_compiler_the_executable_is_native_and_needs_no_library(machine: Machine) -> None:
    assert f"Installed {machine.executable} (0.1.0), native: " in machine.install().stderr
    content = machine.executable.read_bytes()
    assert content.startswith(b"\x7fELF")
    assert b"/ld-linux" not in content


NO_STATIC = """#!/bin/sh
case " $* " in *" -static "*) echo "no static libc"; exit 1 ;; esac
exec cc "$@"
"""


@pytest.mark.parametrize(("text", "options"), [(NO_STATIC, ""), ('#!/bin/sh\nexec cc "$@"\n', "-g -s")])
def test_a_compiler_may_have_options_and_need_not_have_a_static_libc(
    machine: Machine, tmp_path: Path, text: str, options: str
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(text)
    compiler.chmod(0o755)
    assert "native" in machine.install(CC=f"{compiler} {options}").stderr
    assert machine.executable.read_bytes().startswith(b"\x7fELF")
    assert machine.install().returncode == 0


@pytest.mark.parametrize("compiler", ["/nonexistent", "true", "false"])
def test_without_a_compiler_that_works_the_executable_is_the_python_one(machine: Machine, compiler: str) -> None:
    installed = machine.install(CC=compiler)
    assert installed.returncode == 0
    assert f"in Python: a C compiler that works ({compiler}) would make one" in installed.stderr
    assert machine.executable.read_bytes() == machine.python_executable.read_bytes()
    assert list(machine.bin.iterdir()) == [machine.executable]
    assert run(machine.executable, CNI_COMMAND="VERSION").returncode == 0
    builds = machine.builds()
    assert machine.install().returncode == 0
    assert machine.executable.read_bytes().startswith(b"\x7fELF")
    assert machine.builds() == builds


def test_while_one_executable_takes_the_place_of_another_there_always_is_one(machine: Machine) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        installing = pool.submit(lambda: [machine.install(**keys).returncode for keys in ({"CC": "false"}, {}) * 2])
        outcomes = []
        while not installing.done():
            outcomes.append(run(machine.executable, CNI_COMMAND="VERSION").returncode)
    assert installing.result() == [0] * 4
    assert set(outcomes) == {0}


def test_a_python_that_was_started_for_the_executable_before_finds_a_program(machine: Machine) -> None:
    python = machine.python_executable.with_name("python")
    ran = subprocess.run(
        [python, "-IS", machine.executable], capture_output=True, text=True, check=False, env={"CNI_COMMAND": "VERSION"}
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "supportedVersions" in ran.stdout


def test_the_native_executable_says_that_the_python_one_is_gone(machine: Machine) -> None:
    python = machine.python_executable
    away = python.rename(python.with_name("away"))
    gone = run(machine.executable, CNI_COMMAND="VERSION")
    away.rename(python)
    assert (gone.returncode, gone.stderr) == (1, "")
    assert json.loads(gone.stdout) == {
        "cniVersion": "1.1.0", "code": 5, "msg": "the plugin cannot be loaded: No such file or directory"
    }  # fmt: skip


def test_a_call_that_the_resident_process_runs_needs_no_other_executable(machine: Machine, node: Node) -> None:
    path = machine.top / "socket"
    node.launcher = [str(machine.executables(path)["native"])]
    pod, python = node.pod(4), machine.python_executable
    with subprocess.Popen([machine.executable, "serve", path], env={}) as resident:
        assert eventually(path.exists)
        away = python.rename(python.with_name("away"))
        try:
            assert eventually(lambda: node.cni("ADD", pod, config(pod, mapping(8080))).status == 0)
            assert node.cni("CHECK", pod, config(pod, mapping(8080))).status == 0
            node.delete(pod)
        finally:
            away.rename(python)
            resident.kill()


def test_bytecode_is_compiled_beforehand(machine: Machine) -> None:
    package = next(machine.lib.glob("*/lib/python3*/site-packages/cni_hostport"))
    assert {path.name.split(".")[0] for path in package.glob("__pycache__/*.pyc")} == {
        path.stem for path in package.glob("*.py")
    }


def test_neither_the_environment_nor_the_working_directory_changes_what_is_imported(
    machine: Machine, tmp_path: Path
) -> None:
    for module in ("json", "cni_hostport", "nftables", "sitecustomize"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('imported from outside')")
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONHOME": str(tmp_path), "CNI_COMMAND": "VERSION"}
    run = subprocess.run(
        [machine.executable], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "supportedVersions" in run.stdout


def test_the_installed_executable_answers_status_on_a_node(machine: Machine, node: Node) -> None:
    environment = ["env", "-i", "CNI_COMMAND=STATUS", "CNI_PATH=/opt/cni/bin"]
    run = node.run(*environment, str(machine.executable), input='{"cniVersion": "1.1.0", "name": "pods"}', check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_an_upgrade_keeps_the_installation_that_calls_may_still_be_running_from(machine: Machine) -> None:
    before = machine.builds()
    module = machine.source / "cni_hostport" / "errors.py"
    module.write_text(module.read_text() + "\n# a newer version\n")
    upgraded = machine.install()
    assert upgraded.returncode == 0, upgraded.stderr
    assert before < machine.builds()
    (new,) = machine.builds() - before
    assert machine.python_executable.parents[1].name == new


def test_another_plugin_directory_is_served_from_the_same_environment_directory(machine: Machine) -> None:
    other = machine.top / "other"
    assert machine.install("--bin-dir", str(other)).returncode == 0
    for executable in (machine.executable, other / "hostport"):
        shown = subprocess.run([executable], capture_output=True, text=True, check=True, env={})
        assert shown.stderr.startswith("CNI hostport plugin v")
    (other / "hostport").unlink()


def test_uninstalling_from_one_plugin_directory_leaves_what_another_uses(machine: Machine) -> None:
    other = machine.top / "other"
    assert machine.install("--bin-dir", str(other)).returncode == 0
    before = machine.builds()
    assert machine.install("--uninstall", "--bin-dir", str(other)).returncode == 0
    assert not (other / "hostport").exists()
    assert machine.builds() == before
    version = {"CNI_COMMAND": "VERSION"}
    assert subprocess.run([machine.executable], capture_output=True, check=False, env=version).returncode == 0


def test_a_broken_environment_is_built_again(machine: Machine) -> None:
    for package in machine.python_executable.parents[1].glob("lib/python3*/site-packages/pydantic"):
        shutil.rmtree(package)
    assert machine.install().returncode == 0
    version = {"CNI_COMMAND": "VERSION"}
    assert subprocess.run([machine.executable], capture_output=True, check=False, env=version).returncode == 0


@pytest.mark.parametrize("option", [(), ("--uninstall",)])
def test_an_executable_that_is_not_this_projects_is_left_alone(machine: Machine, option: tuple[str, ...]) -> None:
    foreign = machine.top / "foreign" / "hostport"
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("#!/bin/sh\necho somebody else's\n")
    refused = machine.install("--bin-dir", str(foreign.parent), *option)
    assert refused.returncode == 1
    assert f"{foreign} is not of this program's making" in refused.stderr
    assert "somebody else's" in foreign.read_text()


@pytest.mark.parametrize("content", [b"", b"\x7fELF\0\xff\n\0", b"#!/x/bin/python -IS\nimport sys\n"])
def test_a_file_that_is_none_of_ours_is_left_alone(machine: Machine, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hostport").write_bytes(content)
    for option in ((), ("--uninstall",)):
        assert machine.install("--bin-dir", str(tmp_path), *option).returncode == 1
    assert (tmp_path / "hostport").read_bytes() == content


def test_an_installation_on_a_node_is_known_replaced_and_not_removed(machine: Machine, tmp_path: Path) -> None:
    installation, link = tmp_path / "lib" / "0.1.0-x", tmp_path / "bin" / "hostport"
    (installation / "bin").mkdir(parents=True)
    (installation / ".hostport-installation").touch()
    link.parent.mkdir()
    link.symlink_to(installation / "bin" / "hostport")
    options = ("--bin-dir", str(link.parent))
    left = machine.install("--uninstall", *options)
    assert left.returncode == 0
    assert f"{link} stays: 'hostport node uninstall' removes it." in left.stderr
    assert link.is_symlink()
    replaced = machine.install(*options)
    assert replaced.returncode == 0
    assert f"{link} was of the installation in {installation}, which stays as it is." in replaced.stderr
    assert link.is_file()
    assert not link.is_symlink()
    assert installation.is_dir()
    machine.install("--uninstall", *options)
    link.symlink_to(tmp_path / "elsewhere" / "bin" / "hostport")
    for option in ((), ("--uninstall",)):
        assert machine.install(*options, *option).returncode == 1
    assert link.is_symlink()


def test_a_build_that_fails_leaves_the_installed_plugin_as_it_was(machine: Machine) -> None:
    executable, builds = machine.executable.read_bytes(), machine.builds()
    locked = machine.source / "conf" / "requirements.txt"
    pinned = locked.read_text()
    locked.write_text(pinned.replace("--hash=sha256:", "--hash=sha256:00"))
    failed = machine.install()
    locked.write_text(pinned)
    assert failed.returncode == 1
    assert "what was installed before is as it was" in failed.stderr
    assert (machine.executable.read_bytes(), machine.builds()) == (executable, builds)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--frobnicate"], "unknown option '--frobnicate'"),
        (["--lib-dir"], "--lib-dir needs a directory"),
        (["--lib-dir", "a b"], "cannot hold white space"),
        (["--bin-dir", 'a"b'], "cannot hold white space, quotes"),
        (["--demo", "--test"], "--demo and --test do not go together"),
    ],
)
def test_wrong_options_are_named(machine: Machine, options: list[str], complaint: str) -> None:
    refused = machine.install(*options)
    assert refused.returncode == 1
    assert complaint in refused.stderr


def test_help_needs_no_root(machine: Machine) -> None:
    require(shutil.which("setpriv"), "needs setpriv")
    command = ["setpriv", "--reuid=65534", "--clear-groups", "bash", "-s", "--", "--help"]
    text = (machine.source / "install.sh").read_text()
    shown = subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd="/")
    assert shown.returncode == 0, shown.stderr
    for option in ("--bin-dir DIR", "--lib-dir DIR", "--demo", "--test", "--uninstall", "--help"):
        assert option in shown.stdout


def test_elsewhere_than_on_debian_and_fedora_it_says_what_to_install(machine: Machine, tmp_path: Path) -> None:
    for program in ("bash", "dirname", "realpath", "id", "sed", "sort", "tr", "grep", "cat"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    refused = machine.install("--demo", PATH=str(tmp_path))
    assert refused.returncode == 1
    assert "neither apt-get nor dnf" in refused.stderr
    assert "curl" in refused.stderr


def test_uninstalling_leaves_nothing_of_the_plugin(machine: Machine) -> None:
    foreign = machine.lib / "foreign"
    foreign.mkdir()
    removed = machine.install("--uninstall")
    assert removed.returncode == 0
    assert list(machine.bin.iterdir()) == []
    assert machine.builds() == {"foreign"}
    foreign.rmdir()
    machine.install("--uninstall")
    assert not machine.lib.exists()


OLD_PYTHON = """#!/bin/sh
case "$*" in *platform*) echo 3.9.2 ;; *) exit 1 ;; esac
"""
PYTHON = sorted({str(path.resolve()) for path in Path("/usr/bin").glob("python3*") if path.name.count("-") == 0})


def test_an_old_python_is_refused_before_anything_is_installed(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (
        ("python3", OLD_PYTHON),
        ("apt-get", f'#!/bin/sh\necho "$@" >>{tmp_path}/apt\n'),
        ("dnf", "#!/bin/sh\n"),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    mounts = "".join(f"mount --bind {programs}/python3 {real}; " for real in PYTHON)
    install = f"{machine.source}/install.sh --bin-dir {machine.bin} --lib-dir {machine.lib}"
    command = f"{mounts} PATH={programs}:$PATH exec {install}"
    ran = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "needs Python 3.11 or later, and this system's python3 is 3.9.2. Nothing was installed." in ran.stderr
    assert not (tmp_path / "apt").exists()
    assert not machine.bin.exists()
