from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import pytest
from cnitool import Chain
from go_tools import TOOLS, unavailable
from lab import LAUNCHER, NODE4, Namespace, mapping, require

from cni_hostport.operate.node import configuration_keeper
from cni_hostport.operate.node.configuration import Configuration, derive
from cni_hostport.operate.node.configuration_directory import SUFFIXES
from cni_hostport.operate.node.configuration_keeper import Keeper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lab import Node

OURS = "01-hostport.conflist"
CONFIGURE = [*LAUNCHER, "node", "configure", "--conf-dir"]
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
BRIDGE = {
    "type": "bridge",
    "bridge": "cni0",
    "isGateway": True,
    "ipMasq": True,
    "ipam": {"type": "host-local", "subnet": "10.88.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]},
}
RACE_SECONDS = 1.0  # at least


def conflist(number: int) -> str:
    # larger than a page, so that a reader may see the half of it
    plugins = [{"type": "flannel", "filling": "x" * 8000}, PORTMAP]
    return json.dumps({"cniVersion": "0.3.1", "name": "cbr0", "number": number, "plugins": plugins})


def truncated(path: Path, number: int) -> None:
    """Write as flannel and k3s do."""
    text = conflist(number)
    with path.open("w") as file:
        for part in (text[:3000], text[3000:]):
            file.write(part)
            file.flush()
            time.sleep(0.002)


def renamed(path: Path, number: int) -> None:
    """Write as Calico does."""
    path.with_suffix(".tmp").write_text(conflist(number))
    path.with_suffix(".tmp").rename(path)


def removed(path: Path, number: int) -> None:
    path.unlink(missing_ok=True)
    time.sleep(0.002)
    path.write_text(conflist(number))


def moved(path: Path, number: int) -> None:
    path.write_text(conflist(number))
    path.rename(path.with_stem("20-flannel"))
    path.with_stem("20-flannel").rename(path)


def first_types(directory: Path) -> list[str]:
    """Load what containerd would: the first file or none."""
    first = min((name for name in os.listdir(directory) if name.endswith(SUFFIXES)), key=os.fsencode)
    return [plugin["type"] for plugin in json.loads((directory / first).read_bytes())["plugins"]]


class Repetition(threading.Thread):
    """Something that is done again and again, from the beginning of a context to its end; ``times`` it was done."""

    def __init__(self, action: Callable[[int], None]) -> None:
        super().__init__()
        self.action = action
        self.times = 0
        self.is_over = False

    def run(self) -> None:
        while not self.is_over:
            self.times += 1
            self.action(self.times)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over = True
        self.join()


@pytest.mark.parametrize("write", [truncated, renamed, removed, moved])
def test_a_runtime_always_finds_hostport_while_the_primary_is_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, int], None]
) -> None:
    monkeypatch.setattr(configuration_keeper, "BURST", 10_000)
    primary = tmp_path / "10-flannel.conflist"
    primary.write_text(conflist(0))
    found: Counter[str] = Counter()

    def read(_: int) -> None:
        try:
            found[" ".join(first_types(tmp_path))] += 1
        except (OSError, ValueError) as error:
            found[repr(error)] += 1

    lines: list[str] = []
    with Keeper(tmp_path, None, lines.append) as keeper:
        assert keeper.update().is_ready
        with Repetition(partial(write, primary)) as writer, Repetition(read):
            end = time.monotonic() + RACE_SECONDS
            while (now := time.monotonic()) < end or (min(found.total(), writer.times) <= 5 and now < end + 60):
                if keeper.wait(0.1):
                    keeper.update()
        while keeper.wait(0.3) or not keeper.state.is_ready:
            keeper.update()
    assert found.keys() == {"flannel hostport"}, (found, lines)
    assert min(found.total(), writer.times) > 5
    assert json.loads((tmp_path / OURS).read_bytes())["number"] == writer.times
    assert sorted(os.listdir(tmp_path)) == [OURS, "10-flannel.conflist"]
    said = ("written, derived from", "is derived from", f"; {OURS} stays as it is", f"; {OURS} stays for 10 seconds")
    assert not [line for line in lines if not any(part in line for part in said)]


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=16k none "$0" && cd "$0"
echo '{"name": "pods", "plugins": [{"type": "bridge"}]}' > 10-pods.conflist
"$@" 2> /dev/null || exit 1
cp 01-hostport.conflist before
echo '{"name": "pods", "plugins": [{"type": "ptp"}]}' > 10-pods.conflist
dd if=/dev/zero of=filling bs=4k 2> /dev/null
"$@" && exit 2
cmp before 01-hostport.conflist || exit 3
ls -A
rm filling
mount -o remount,ro . && "$@" && exit 4
mount -o remount,rw . && cmp before 01-hostport.conflist || exit 5
"$@" 2> /dev/null || exit 6
grep -q ptp 01-hostport.conflist
"""
IN_OWN_CACHE = 'mount -t tmpfs none /var/lib/cni && exec "$@"'


@pytest.mark.usefixtures("_kernel")
def test_on_a_full_or_read_only_disk_the_last_good_file_stays(tmp_path: Path) -> None:
    require(shutil.which("unshare"), "needs the program unshare")
    directory = str(tmp_path)
    command = ["unshare", "--mount", "sh", "-c", ON_A_SMALL_DISK, directory, *CONFIGURE, directory]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran
    assert ran.stdout.split() == [OURS, "10-pods.conflist", "before", "filling"]
    stays = "what is there stays as it is"
    assert ran.stderr == f"{tmp_path}: No space left on device; {stays}\n{tmp_path}: Read-only file system; {stays}\n"


def test_several_at_once_write_whole_files(tmp_path: Path) -> None:
    (tmp_path / "10-flannel.conflist").write_text(conflist(1))
    started = [subprocess.Popen([*CONFIGURE, tmp_path], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [(process.communicate()[1] is None, process.returncode) for process in started] == [(False, 0)] * 4
    assert first_types(tmp_path) == ["flannel", "hostport"]
    assert sorted(os.listdir(tmp_path)) == [OURS, "10-flannel.conflist"]


def test_the_command_says_what_it_did_and_what_is_wrong(tmp_path: Path) -> None:
    def configure(*options: str) -> tuple[int, str]:
        ran = subprocess.run([*CONFIGURE, tmp_path, *options], check=False, capture_output=True, text=True)
        assert ran.stdout == ""
        return ran.returncode, ran.stderr

    assert configure() == (1, f"{tmp_path} has no network configuration yet\n")
    (tmp_path / "10-flannel.conflist").write_text(conflist(1))
    options = tmp_path / "options"
    options.write_text('{"snat": "\\u001b"}')
    assert configure("--options", str(options)) == (
        1,
        f"{options} is wrong: snat '\\x1b' is invalid: Input should be a valid boolean; nothing is changed\n",
    )
    options.write_text('{"snat": false}')
    assert configure("--options", str(options)) == (
        0,
        f"{tmp_path}/{OURS} is written, derived from 10-flannel.conflist\n{OURS} is derived from 10-flannel.conflist\n",
    )
    assert json.loads((tmp_path / OURS).read_bytes())["plugins"][1]["snat"] is False
    assert configure("--remove") == (0, f"{tmp_path / OURS} is removed\n")
    assert configure("--remove") == (0, f"{tmp_path} has no network configuration of this plugin\n")
    assert sorted(os.listdir(tmp_path)) == ["10-flannel.conflist", "options"]


@pytest.fixture(scope="session")
def newest_plugins() -> Path:
    require(not (need := unavailable("plugins", "bridge", "host-local")), f"needs {need}")
    return TOOLS


@pytest.fixture
def container() -> Iterator[Namespace]:
    with Namespace("web") as made:
        yield made


LIST: dict[str, Any] = {"cniVersion": "1.0.0", "name": "pods", "plugins": [BRIDGE, PORTMAP]}
SINGLE: dict[str, Any] = {"cniVersion": "0.4.0", "name": "pods", **BRIDGE}


@pytest.mark.parametrize(("file", "primary"), [("10-chain.conflist", LIST), ("10-chain.conf", SINGLE)])
def test_libcni_takes_ours_and_the_port_is_served(
    *,
    node: Node,
    cnitool: Path,
    newest_plugins: Path,
    tmp_path: Path,
    container: Namespace,
    file: str,
    primary: dict[str, Any],
) -> None:
    chain = Chain.make(node, cnitool, newest_plugins, tmp_path, primary)
    (tmp_path / "10-chain.conflist").rename(tmp_path / file)
    subprocess.run([*CONFIGURE, tmp_path], check=True, capture_output=True)
    added = chain.run("add", container, mapping(8080))
    assert added.returncode == 0, added
    assert json.loads(added.stdout)["cniVersion"] == primary["cniVersion"]
    container.serve("tcp", 80, "web")
    assert node.client.ask("tcp", NODE4, 8080).startswith("web ")
    assert "8080" in node.nft("list map inet hostport hostports")
    deleted = chain.run("del", container, mapping(8080))
    assert deleted.returncode == 0, deleted
    assert "8080" not in node.nft("list map inet hostport hostports")


PLUGIN = """#!/bin/sh
echo '{"cniVersion": "1.0.0"}'
"""
DOCUMENTS = [
    b'{"name": "pods", "plugins": [{"type": "stub"}]}',
    b' {"name": "pods", "plugins": [{"Type": "stub"}]}\r\n\t',
    b'{"name": "pods", "x": "\xff", "plugins": [{"type": "stub"}]}',
    b'{"name": "pods", "x": "\\ud800", "plugins": [{"type": "stub"}]}',
    b'{"name": "pods", "x": {"a": 1, "a": 2}, "plugins": [], "plugins": [{"type": "x", "type": "stub"}]}',
    b'{"name": "pods", "x": ' + b"9" * 300 + b', "plugins": [{"type": "stub"}]}',
    b'{"name": "pods", "x": ' + b"[" * 900 + b"]" * 900 + b', "plugins": [{"type": "stub"}]}',
    b'{"name": "pods", "disableCheck": "TRUE", "plugins": [{"type": "stub", "capabilities": {"a": null}}]}',
    b'{"name": "pods", "plugins": [{"type": "stub", "capabilities": null}]}',
    b"",
    b"{}",
    b"[]",
    b"null",
    b'{"name": "pods", "plugins": [{"type": "stub"}]',
    b'{"name": "pods", "plugins": [{"type": "stub"}]} x',
    b'{"name": "pods", "plugins": [{"type": "stub"},]}',
    b'\xef\xbb\xbf{"name": "pods", "plugins": [{"type": "stub"}]}',
    b'{"name": "pods", "x": NaN, "plugins": [{"type": "stub"}]}',
    b'{"name": "pods", "x": 1e999, "plugins": [{"type": "stub"}]}',
    b'{"name": "pods", "x": ' + b"9" * 400 + b', "plugins": [{"type": "stub"}]}',
    b'{"name": "pods", "x": 01, "plugins": [{"type": "stub"}]}',
    b'{"name": "pods", "x": "\n", "plugins": [{"type": "stub"}]}',
    b'{"name": "pods", "x": "\\x", "plugins": [{"type": "stub"}]}',
    b"{'name': 'pods', 'plugins': [{'type': 'stub'}]}",
    b'{"name": "pods", "plugins": {"type": "stub"}}',
    b'{"name": "pods", "plugins": [{}]}',
    b'{"name": "pods", "plugins": ["stub"]}',
    b'{"name": "pods", "plugins": [{"type": 1}]}',
    b'{"name": "pods", "plugins": [{"type": "stub", "capabilities": {"a": 1}}]}',
    b'{"name": "pods", "plugins": [{"type": "stub", "capabilities": []}]}',
    b'{"name": "pods", "plugins": [{"type": "stub", "capabilities": true}]}',
    b'{"name": "pods", "disableCheck": 1, "plugins": [{"type": "stub"}]}',
    b'{"name": "pods", "disableCheck": null, "plugins": [{"type": "stub"}]}',
    b'{"name": "pods", "cniVersion": null, "plugins": [{"type": "stub"}]}',
    b'{"name": 1, "plugins": [{"type": "stub"}]}',
    b'{"name": "pods"}',
    b'{"name": "pods", "plugins": null}',
]


SINGLES = [
    b'{"name": "pods", "type": "stub"}',
    b'{"NAME": "pods", "TYPE": "stub", "cniversion": "1.0.0"}',
    b'{"name": "pods", "type": "stub", "cniVersion": null}',
    b'{"name": "pods", "type": "stub", "cniVersion": 1}',
    b'{"name": "pods", "type": "stub", "capabilities": {"a": 1}}',
    b'{"name": "pods", "type": ""}',
    b'{"name": "pods", "plugins": [{"type": "stub"}]}',
]
FILES = [*(("10-pods.conflist", one) for one in DOCUMENTS), *(("10-pods.conf", one) for one in SINGLES)]


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize(("file", "document"), FILES, ids=range(len(FILES)))
def test_libcni_loads_the_same_files_and_what_is_derived_from_them(
    cnitool: Path, tmp_path: Path, file: str, document: bytes
) -> None:
    for plugin in ("stub", "hostport"):
        (tmp_path / plugin).write_text(PLUGIN)
        (tmp_path / plugin).chmod(0o755)

    def is_loaded(name: str, data: bytes) -> bool:
        (tmp_path / name).write_bytes(data)
        variables = [f"NETCONFPATH={tmp_path}", f"CNI_PATH={tmp_path}"]
        command = ["unshare", "--mount", "sh", "-c", IN_OWN_CACHE, "sh", "env", *variables, str(cnitool)]
        ran = subprocess.run([*command, "add", "pods", "/proc/1/ns/net"], check=False, capture_output=True)
        (tmp_path / name).unlink()
        return ran.returncode == 0

    try:
        configuration = Configuration.parse(file, document)
    except ValueError:
        assert not is_loaded(file, document)
    else:
        assert is_loaded(file, document)
        assert is_loaded(OURS, derive(configuration, {}).data)
