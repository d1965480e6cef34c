from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
import scratch
from dynamic_ports import FILES, OWN, asking, given, name, port, run, told
from lab import file_state

from cni_hostport import skel
from cni_hostport.attachment import Attachment
from cni_hostport.dynamic_ports import assignment, pod_files
from cni_hostport.errors import CNIError
from cni_hostport.lookup import Lookup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cni_hostport.netlink import Message

UID = f"{OWN}3f0c-4b0e-8f9a"


@pytest.fixture(autouse=True)
def _scratch(_kernel: None) -> Iterator[None]:
    with scratch.namespace():
        yield


def keep_all() -> list[str]:
    lines: list[str] = []
    pod_files.keep_all(Lookup(), lines.append)
    return lines


def of_pod(command: str, uid: str, container: str = f"{OWN}c", text: str = "80") -> list[str]:
    variables = {"CNI_ARGS": f"K8S_POD_UID={uid};K8S_POD_NAME=web"}
    addresses = [f"10.1.{ord(container[0]) if uid == '' else ord(container[-1])}.2/24"]
    skel.AFTERWARDS.clear()
    lines = scratch.run(command, container=container, addresses=addresses, variables=variables, **asking(text))
    for task in skel.AFTERWARDS:
        task()
    return lines


def test_the_file_is_everybodys_to_read_and_nobodys_to_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pod_files, "DIRECTORY", str(tmp_path / "hostport" / "pods"))
    mask = os.umask(0o077)
    try:
        run("ADD", 1, "80, 192.0.2.1:443, 9000-9001/udp")
    finally:
        os.umask(mask)
    directory = tmp_path / "hostport" / "pods" / name(1)
    assert [entry.name for entry in directory.iterdir()] == ["dynamic-ports.json"]
    modes = {path.stat().st_mode & 0o7777 for path in (directory, directory.parent, directory.parent.parent)}
    assert (modes, (directory / "dynamic-ports.json").stat().st_mode & 0o7777) == ({0o755}, 0o644)
    ports = given()[name(1)]
    text = (directory / "dynamic-ports.json").read_text()
    assert text.endswith("}}\n")
    for request, number in ports.items():
        address = ', "hostIP": "192.0.2.1"' if "192" in request else ""
        assert f'"{request}": {{"hostPort": {number}{address}}}' in text


def test_the_file_is_there_before_the_result_and_goes_with_the_ports() -> None:
    of_pod("ADD", UID)
    assert told(UID) == {"80/tcp": {"hostPort": given()[UID]["80/tcp"]}}
    of_pod("ADD", UID, f"{OWN}d", "81/udp")  # another sandbox of the same pod
    assert {*told(UID)} == {"80/tcp", "81/udp"}
    of_pod("DEL", UID)
    assert [*told(UID)] == ["81/udp"]
    of_pod("DEL", UID, f"{OWN}d")
    assert not (FILES / UID).exists()


def test_of_two_sandboxes_of_a_pod_each_has_ports_of_its_own() -> None:
    containers = f"{OWN}c", f"{OWN}d"
    listed = []
    for _ in range(2):
        for container in containers:
            of_pod("ADD", UID, container)
            of_pod("CHECK", UID, container)
        listed.append(scratch.ruleset().partition("map dynamic_ports")[2].partition("\t}")[0])
    assert listed[0] == listed[1]
    assert listed[0].count(f"80/tcp {UID}") == 2
    of_pod("DEL", UID, containers[1])
    of_pod("CHECK", UID, containers[0])
    assert told(UID) == {"80/tcp": {"hostPort": given()[UID]["80/tcp"]}}


def test_of_two_sandboxes_of_a_pod_on_two_networks_each_keeps_its_port() -> None:
    def on_second_network(command: str) -> None:
        variables = {"CNI_ARGS": f"K8S_POD_UID={UID};K8S_POD_NAME=web", "CNI_IFNAME": "eth1"}
        asked = asking("80", name="second")
        scratch.run(command, container=f"{OWN}c", addresses=["10.2.0.2/24"], variables=variables, **asked)

    of_pod("ADD", UID)
    on_second_network("ADD")
    of_pod("ADD", UID, f"{OWN}d")  # its port is the newer one
    before = scratch.ruleset().partition("map dynamic_ports")[2].partition("\t}")[0]
    on_second_network("CHECK")
    on_second_network("ADD")
    assert scratch.ruleset().partition("map dynamic_ports")[2].partition("\t}")[0] == before
    on_second_network("CHECK")


def test_of_two_sandboxes_of_a_pod_the_file_tells_the_newer_ones_port() -> None:
    containers = f"{OWN}c", f"{OWN}d"
    for number in range(8):  # a listing has them in any order
        uid = f"{UID}-{number}"
        for container in containers:
            of_pod("ADD", uid, container)
        newer = assignment.Listing(Lookup()).held_by(Attachment("pods", containers[1], "eth0").key)
        assert told(uid) == {"80/tcp": {"hostPort": newer["80/tcp"]}}
        assert keep_all() == []
        assert told(uid) == {"80/tcp": {"hostPort": newer["80/tcp"]}}
        for container in containers:
            of_pod("DEL", uid, container)


def test_files_are_made_again_from_the_ruleset() -> None:
    for number in range(3):
        run("ADD", number, "80")
    files = [FILES / name(number) / "dynamic-ports.json" for number in range(3)]
    before = [file.read_bytes() for file in files]
    shutil.rmtree(files[0].parent)
    files[1].write_text("{}")
    unchanged = file_state(files[2])
    for number, comment in enumerate(("", 'comment "80/tcp kept"', 'comment "kept ../for tests"')):
        # a port that nobody is given
        scratch.nft(f"add element inet hostport dynamic_ports {{ ipv4 . tcp . {41000 + number} {comment} : accept }}")
    assert keep_all() == []
    assert not any((FILES / kept).exists() for kept in ("dynamic-ports.json", "kept", "../for tests"))
    assert [file.read_bytes() for file in files] == before
    assert file_state(files[2]) == unchanged


PLANTED: dict[str, Callable[[Path], object]] = {
    "a symbolic link": lambda file: file.symlink_to("/etc/passwd"),
    "a link to nothing": lambda file: file.symlink_to("/nowhere/at/all"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a fifo": os.mkfifo,
    "a huge file": lambda file: os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), 1 << 42),
    "a device": lambda file: os.mknod(file, 0o20666, os.makedev(1, 5)),
    "nothing that may be read": lambda file: file.touch(0),
    "a directory": lambda file: (file / "full").mkdir(parents=True),
}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("place", ["dynamic-ports.json", ".dynamic-ports.json.PID"])
def test_what_a_pod_plants_in_its_directory_harms_nobody_else(planted: str, place: str) -> None:
    passwords = FILES.parent.parent.parent / "etc" / "passwd"
    before = passwords.read_bytes()
    run("ADD", 1, "80")
    run("ADD", 2, "80")
    (FILES / name(1) / "dynamic-ports.json").unlink()
    PLANTED[planted](FILES / name(1) / place.replace("PID", str(os.getpid())))
    (FILES / name(2) / "dynamic-ports.json").unlink()
    lines = keep_all()
    assert told(name(2)) == {"80/tcp": {"hostPort": port(2)}}
    if planted == "a directory":
        assert [line.partition(" does not tell")[0] for line in lines] == [f"the file in {FILES}/{name(1)}"]
    else:
        assert (lines, told(name(1))) == ([], {"80/tcp": {"hostPort": port(1)}})
    lines = run("ADD", 1, "80")
    assert any("does not tell its dynamic host ports" in line for line in lines) == (planted == "a directory")
    run("DEL", 1)
    assert not (FILES / name(1) / "dynamic-ports.json").is_file()
    assert [*given()] == [name(2)]
    assert passwords.read_bytes() == before


def test_where_no_file_can_be_written_the_pod_has_its_ports_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(pod_files, "DIRECTORY", f"{tmp_path}/file/pods")
    lines = run("ADD", 1, "80")
    assert [line for line in lines if "does not tell its dynamic host ports: [Errno 20] Not a directory" in line]
    run("CHECK", 1, "80")
    run("DEL", 1)
    assert given() == {}


def test_a_pod_is_known_to_be_new_only_where_the_place_of_files_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for place, is_new in ((tmp_path / "absent", False), (tmp_path / "file" / "below", False), (tmp_path, True)):
        (tmp_path / "file").touch()
        monkeypatch.setattr(pod_files, "DIRECTORY", str(place))
        assert pod_files.is_new(name(1)) == is_new
    run("ADD", 1, "80")
    (tmp_path / name(1) / "dynamic-ports.json").unlink()
    assert not pod_files.is_new(name(1))
    monkeypatch.setattr(pod_files, "DIRECTORY", "/proc/sys/kernel")  # there, and nothing can be made in it
    assert not pod_files.is_new(name(1))


@pytest.mark.parametrize("spoiled", [1, 3, 100])
def test_a_listing_that_others_spoil_is_not_taken_for_an_empty_one(
    monkeypatch: pytest.MonkeyPatch, spoiled: int
) -> None:
    run("ADD", 1, "80")
    before, file = given(), told(name(1))
    dump, left = Lookup.dump, [spoiled]

    def dump_or_not(self: Lookup, message: Message) -> list[bytes] | None:
        left[0] -= 1
        return None if left[0] >= 0 else dump(self, message)

    monkeypatch.setattr(assignment, "PAUSES", (0,) * 5)
    monkeypatch.setattr(Lookup, "dump", dump_or_not)
    if spoiled < 5:
        run("ADD", 1, "80")
        run("CHECK", 1, "80")
    else:
        with pytest.raises(CNIError, match="cannot be listed"):
            run("ADD", 1, "80")
        lines: list[str] = []
        pod_files.keep(Lookup(), [name(1)], lines.append)
        assert len(lines) == 1
    assert (given(), told(name(1))) == (before, file)


@pytest.mark.parametrize(
    "uid", ["", "../..", "..", ".", "a/b", "a" * 73, "é", "$(id)", "a b", "---", "x\n", '"', "a;K8S_POD_UID=../b"]
)
def test_a_uid_that_is_no_name_of_a_directory_is_none(uid: str) -> None:
    FILES.mkdir(parents=True, exist_ok=True)
    outside = sorted(FILES.parent.iterdir())
    of_pod("ADD", uid)
    assert [*given()] == [f"{OWN}c"]
    assert told(f"{OWN}c")
    of_pod("CHECK", uid)
    of_pod("DEL", uid)
    assert (given(), told(f"{OWN}c"), sorted(FILES.parent.iterdir())) == ({}, {}, outside)


def test_a_container_id_whose_end_is_no_name_has_a_file_all_the_same() -> None:
    containers = [f"{letter}{OWN}{'-._' * 30}" for letter in "ab"]
    for container in containers:
        of_pod("ADD", "", container)
        of_pod("CHECK", "", container)
    assert len(given()) == 2
    assert all(map(told, given()))
    directories = [FILES / pod_id for pod_id in given()]
    for container in containers:
        of_pod("DEL", "", container)
    assert not any(directory.exists() for directory in directories)
    assert FILES.exists()


@pytest.mark.parametrize("uid", ["a" * (72 - len(OWN)), "0", "-" * 3 + "b"])
def test_a_long_id_fits_beside_the_longest_request(uid: str) -> None:
    uid = f"{OWN}{uid}"
    text = "[2001:db8:1111:2222:3333:4444:5555:6666]:65535/sctp"
    variables = {"CNI_ARGS": f"K8S_POD_UID={uid}"}
    addresses = ["fd00:77::2/64"]
    for command in ("ADD", "CHECK"):
        scratch.run(command, container=f"{OWN}c", addresses=addresses, variables=variables, **asking(text))
        assert [*given()[uid]] == [text]
    scratch.run("DEL", container=f"{OWN}c", addresses=addresses)
    assert not (FILES / uid).exists()
