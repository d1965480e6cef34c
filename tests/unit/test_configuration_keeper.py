from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cni_hostport.operate.node import configuration_keeper, configuration_state
from cni_hostport.operate.node.configuration import Configuration
from cni_hostport.operate.node.configuration_directory import remove
from cni_hostport.operate.node.configuration_keeper import Keeper
from cni_hostport.operate.node.configuration_state import Condition

if TYPE_CHECKING:
    from collections.abc import Iterator

IN_STEP, WAITING, NOT_IN_STEP = Condition
HOSTPORT = {"type": "hostport", "capabilities": {"portMappings": True, "io.kubernetes.cri.pod-annotations": True}}
OURS = "01-hostport.conflist"


def conflist(name: str = "pods", *plugins: dict[str, Any], **keys: Any) -> str:
    return json.dumps({"name": name, "plugins": plugins or [{"type": "bridge"}, {"type": "portmap"}], **keys})


@dataclass
class Node:
    """A directory of configurations, its keeper, a clock that a test sets, and the lines that were written."""

    path: Path
    options: Path
    time: float = 0.0
    lines: list[str] = field(default_factory=list)
    keeper: Keeper = field(init=False)

    def __post_init__(self) -> None:
        self.keeper = Keeper(self.path, self.options, self.lines.append, clock=lambda: self.time)

    def write(self, file: str, text: str) -> None:
        (self.path / file).write_text(text)

    def update(self, seconds: float = 0) -> tuple[Condition, bool]:
        self.time += seconds
        state = self.keeper.update()
        return state.condition, state.has_hostport

    def ours(self, file: str = OURS) -> Configuration:
        made = Configuration.parse(file, (self.path / file).read_bytes())
        assert made.source is not None
        return made

    def files(self) -> list[str]:
        return sorted(os.listdir(self.path), key=os.fsencode)

    @property
    def sentence(self) -> str:
        return self.keeper.state.sentence


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    (tmp_path / "net.d").mkdir()
    (tmp_path / "options.json").write_text("{}")
    made = Node(tmp_path / "net.d", tmp_path / "options.json")
    with made.keeper:
        yield made


def test_ours_stands_before_the_primary_and_is_written_once(node: Node) -> None:
    node.write("10-pods.conflist", conflist())
    assert node.update() == (IN_STEP, True)
    assert node.keeper.state.is_ready
    status = (node.path / OURS).stat()
    assert status.st_mode & 0o7777 == 0o644
    assert node.update() == (IN_STEP, True)
    assert (node.path / OURS).stat().st_ino == status.st_ino
    assert node.files() == [OURS, "10-pods.conflist"]
    assert node.lines == [
        f"{node.path}/{OURS} is written, derived from 10-pods.conflist",
        f"{OURS} is derived from 10-pods.conflist",
    ]


def test_the_mode_is_not_the_umasks(node: Node) -> None:
    node.write("10-pods.conflist", conflist())
    before = os.umask(0o77)
    try:
        node.update()
    finally:
        os.umask(before)
    assert (node.path / OURS).stat().st_mode & 0o7777 == 0o644


def test_a_directory_without_configurations_is_waited_for(node: Node) -> None:
    assert node.update() == (WAITING, False)
    node.path.rmdir()
    assert node.update() == (WAITING, False)
    node.path.mkdir()
    assert node.update() == (WAITING, False)
    assert node.lines == [
        f"{node.path} has no network configuration yet",
        f"{node.path} does not exist, or is no directory",
        f"{node.path} has no network configuration yet",
    ]


def test_what_the_primary_becomes_ours_becomes(node: Node) -> None:
    node.write("10-pods.conflist", conflist())
    node.update()
    node.write("10-pods.conflist", conflist(mtu=1400))
    assert node.update() == (IN_STEP, True)
    assert node.ours().document["mtu"] == 1400


def test_a_primary_of_another_name_counts_at_once(node: Node) -> None:
    node.write("10-pods.conflist", conflist())
    node.update()
    (node.path / "10-pods.conflist").rename(node.path / "20-pods.conflist")
    assert node.update() == (IN_STEP, True)
    assert node.ours().source == "20-pods.conflist"


@pytest.mark.parametrize("broken", ["", conflist()[:30], "{}"])
def test_a_primary_that_cannot_be_used_changes_nothing_and_is_told_once(node: Node, broken: str) -> None:
    node.write("10-pods.conflist", conflist())
    node.update()
    before = (node.path / OURS).read_bytes()
    del node.lines[:]
    node.write("10-pods.conflist", broken)
    assert node.update() == (IN_STEP, True)
    assert node.keeper.state.is_passing
    assert node.update(1) == (NOT_IN_STEP, True)
    assert node.update(100) == (NOT_IN_STEP, True)
    assert (node.path / OURS).read_bytes() == before
    assert node.lines == [node.sentence]
    assert node.sentence.startswith("10-pods.conflist ")
    assert node.sentence.endswith(f"; {OURS} stays as it is")
    node.write("10-pods.conflist", conflist(mtu=1400))
    assert node.update() == (IN_STEP, True)


def test_a_broken_first_file_is_not_passed_over(node: Node) -> None:
    node.write("10-pods.conflist", "")
    node.write("87-podman.conflist", conflist("podman"))
    assert node.update() == (NOT_IN_STEP, False)
    assert node.sentence == "10-pods.conflist is empty"
    assert node.files() == ["10-pods.conflist", "87-podman.conflist"]


def test_ours_stays_for_a_while_when_the_primary_goes_and_then_goes_too(node: Node) -> None:
    node.write("10-pods.conflist", conflist())
    node.update()
    (node.path / "10-pods.conflist").unlink()
    assert node.update() == (IN_STEP, True)
    assert node.update(5) == (NOT_IN_STEP, True)
    assert node.sentence == f"10-pods.conflist is gone; {OURS} stays for 10 seconds, for it may be written again"
    assert node.keeper.due() == 5
    assert node.update(5) == (WAITING, False)
    assert node.files() == []
    assert node.lines[-2:] == [
        f"{node.path}/{OURS} is removed: its primary is gone, and the plugins go as well",
        f"{node.path} has no network configuration yet",
    ]


def test_a_primary_that_comes_back_in_time_finds_ours_there(node: Node) -> None:
    node.write("10-pods.conflist", conflist())
    node.update()
    (node.path / "10-pods.conflist").unlink()
    node.update()
    node.update(9)
    node.write("10-pods.conflist", conflist())
    assert node.update(9) == (IN_STEP, True)
    assert node.files() == [OURS, "10-pods.conflist"]


def test_another_network_takes_over_only_when_the_primary_stays_away(node: Node) -> None:
    node.write("10-pods.conflist", conflist())
    node.write("87-podman.conflist", conflist("podman"))
    node.update()
    (node.path / "10-pods.conflist").unlink()
    node.update()
    assert node.ours().name == "pods"
    assert node.update(10) == (IN_STEP, True)
    assert node.ours().name == "podman"


def test_the_first_of_two_primaries_is_taken_and_both_are_named_once(node: Node) -> None:
    for file in ("20-b.conf", "10-a.json"):
        node.write(file, json.dumps({"name": file[3], "type": "bridge"}))
    assert node.update() == (IN_STEP, True)
    node.update()
    assert node.ours().source == "10-a.json"
    line = f"10-a.json and 20-b.conf are in {node.path}: runtimes take the first"
    assert node.lines.count(line) == 1


def test_a_primary_with_hostport_needs_none_of_ours(node: Node) -> None:
    node.write("10-pods.conflist", conflist())
    node.update()
    node.write("10-pods.conflist", conflist("pods", {"type": "bridge"}, HOSTPORT))
    assert node.update() == (IN_STEP, True)
    assert node.files() == ["10-pods.conflist"]
    assert node.sentence == "10-pods.conflist has hostport itself: the options are those in that file"


@pytest.mark.parametrize(
    ("primary", "name"),
    [
        ("01-a.conf", "00-hostport.conflist"),
        ("01-hostport.conf", "00-hostport.conflist"),
        ("00-a.conf", "00-0-hostport.conflist"),
        ("00-.conf", "0-hostport.conflist"),
        (".pods.conf", "+hostport.conflist"),
    ],
)
def test_a_name_is_found_that_sorts_before_the_primary(node: Node, primary: str, name: str) -> None:
    node.write(primary, json.dumps({"name": "pods", "type": "bridge"}))
    assert node.update() == (IN_STEP, True)
    assert node.files() == [name, primary]


def test_there_may_be_no_such_name(node: Node) -> None:
    node.write("!.conf", json.dumps({"name": "pods", "type": "bridge"}))
    assert node.update() == (NOT_IN_STEP, False)
    assert node.sentence.startswith(f"no free name sorts before !.conf: {OURS}, 00-hostport.conflist, ")


def test_only_one_file_is_ours_and_the_new_one_comes_first(node: Node) -> None:
    node.write("01-a.conf", json.dumps({"name": "pods", "type": "bridge"}))
    node.update()
    (node.path / "01-a.conf").rename(node.path / "10-a.conf")
    assert node.update() == (IN_STEP, True)
    assert node.files() == [OURS, "10-a.conf"]
    assert node.lines[-2:] == [
        f"{node.path}/{OURS} is written, derived from 10-a.conf",
        f"{node.path}/00-hostport.conflist is removed: {OURS} stands for it",
    ]


def test_a_file_of_others_under_our_name_is_theirs(node: Node) -> None:
    theirs = conflist("theirs")
    node.write(OURS, theirs)
    assert node.update() == (IN_STEP, True)
    assert node.files() == ["00-hostport.conflist", OURS]
    assert node.ours("00-hostport.conflist").source == OURS
    remove(node.path, node.lines.append)
    assert node.files() == [OURS]
    assert (node.path / OURS).read_text() == theirs


def test_what_runtimes_do_not_load_is_no_primary(node: Node) -> None:
    (node.path / "05-directory.conflist").mkdir()
    for file in ("05-pods.conflist.tmp", "05-pods.conflist~", "05-pods.CONF", "README"):
        node.write(file, conflist("none"))
    node.write("10-pods.conflist", conflist())
    assert node.update() == (IN_STEP, True)
    assert node.ours().source == "10-pods.conflist"


def test_a_link_counts_as_the_file_that_it_leads_to(node: Node) -> None:
    node.write("pods.txt", conflist())
    (node.path / "10-pods.conflist").symlink_to("pods.txt")
    assert node.update() == (IN_STEP, True)
    (node.path / "pods.txt").unlink()
    node.update()
    assert node.update(1) == (NOT_IN_STEP, True)
    assert node.sentence == f"10-pods.conflist is a link to pods.txt, which does not exist; {OURS} stays as it is"


def test_a_pipe_is_not_waited_for(node: Node) -> None:
    os.mkfifo(node.path / "10-pods.conflist")
    assert node.update() == (NOT_IN_STEP, False)
    assert node.sentence == "10-pods.conflist cannot be read: it is not a regular file"


def test_options_are_part_of_ours_and_wrong_ones_change_nothing(node: Node) -> None:
    node.write("10-pods.conflist", conflist())
    node.options.write_text('{"hostAddresses": ["192.0.2.0/24"]}')
    assert node.update() == (IN_STEP, True)
    before = node.ours().text
    assert json.loads(before)["plugins"][1] == {**HOSTPORT, "hostAddresses": ["192.0.2.0/24"]}
    node.options.write_text('{"hostAddresses": ["192.0.2.0/33"]}')
    assert node.update() == (NOT_IN_STEP, True)
    assert node.sentence.startswith(f"{node.options} is wrong: hostAddresses[0] '192.0.2.0/33' is not a CIDR")
    node.options.unlink()
    assert node.update() == (NOT_IN_STEP, True)
    assert node.sentence == (
        f"{node.options}, with the options, cannot be read: No such file or directory; nothing is changed"
    )
    assert node.ours().text == before


def test_without_right_options_nothing_is_written(node: Node) -> None:
    node.write("10-pods.conflist", conflist())
    node.options.write_text("hostAddresses: []")
    assert node.update() == (NOT_IN_STEP, False)
    assert node.files() == ["10-pods.conflist"]


def test_ours_is_written_again_when_it_is_changed_or_removed(node: Node) -> None:
    node.write("10-pods.conflist", conflist())
    node.update()
    good = node.ours().text
    node.write(OURS, good.replace("bridge", "ptp"))
    assert node.update() == (IN_STEP, True)
    assert node.ours().text == good
    (node.path / OURS).unlink()
    assert node.update() == (IN_STEP, True)
    assert node.ours().text == good


def test_a_program_that_renames_ours_is_not_fought_without_an_end(node: Node) -> None:
    node.write("05-cilium.conflist", conflist())
    writes = 0
    for _ in range(600):
        node.update(0.1)
        if (node.path / OURS).exists():
            writes += 1
            (node.path / OURS).rename(node.path / f"{OURS}.cilium_bak")
    assert 12 <= writes <= 17
    assert node.keeper.state.condition is NOT_IN_STEP
    assert node.sentence == (
        f"{OURS} was written 10 times in a short time: another program removes it: "
        "Cilium, whose option cni.exclusive must be false beside other programs' configurations"
    )
    assert node.lines.count(node.sentence) == 1
    assert node.update(10) == (NOT_IN_STEP, True)
    assert node.update(50) == (IN_STEP, True)
    assert remove(node.path, node.lines.append) == [node.path / OURS]
    assert node.files() == ["05-cilium.conflist"]


def test_a_primary_that_changes_without_an_end_is_followed_slowly(node: Node) -> None:
    for number in range(50):
        node.write("10-pods.conflist", conflist(number=number))
        node.update(0.1)
    assert (node.keeper.state.condition, node.keeper.state.has_hostport) == (NOT_IN_STEP, True)
    assert node.sentence == f"{OURS} was written 10 times in a short time: 10-pods.conflist changes again and again"
    assert node.update(node.keeper.due()) == (IN_STEP, True)
    assert node.ours().document["number"] == 49


MULTUS = {"name": "multus-cni-network", "type": "multus-shim"}


def test_behind_multus_ours_is_what_multus_finds(node: Node) -> None:
    node.write("10-pods.conflist", conflist())
    node.write("00-multus.conf", json.dumps({**MULTUS, "clusterNetwork": "/host/etc/cni/net.d/10-pods.conflist"}))
    assert node.update() == (NOT_IN_STEP, False)
    assert node.sentence == (
        "00-multus.conf of multus hands pods to a configuration without hostport: restart multus, "
        f"which then takes {OURS}, or give it that file as its multusMasterCNI"
    )
    assert node.files() == ["00-multus.conf", OURS, "10-pods.conflist"]
    node.write("00-multus.conf", json.dumps({**MULTUS, "clusterNetwork": f"/host/etc/cni/net.d/{OURS}"}))
    assert node.update() == (IN_STEP, True)
    node.write("00-multus.conf", json.dumps({**MULTUS, "delegates": [json.loads(node.ours().text)]}))
    assert node.update() == (IN_STEP, True)
    node.write("00-multus.conf", "{")
    assert node.update()[0] is NOT_IN_STEP


def test_multus_alone_has_no_place_for_ours(node: Node) -> None:
    node.write("00-multus.conf", json.dumps(MULTUS))
    assert node.update() == (NOT_IN_STEP, False)
    assert node.sentence == "00-multus.conf is multus', and no configuration beside it could have hostport"


def test_removal_takes_ours_only_and_says_so(node: Node) -> None:
    assert remove(node.path / "none", node.lines.append) == []
    assert remove(node.path, node.lines.append) == []
    node.write("10-pods.conflist", conflist())
    node.update()
    (node.path / "10-pods.conflist").unlink()
    node.write(".hostport-1.tmp", "half")
    node.write("00-hostport.conflist.bak", "others'")
    del node.lines[:]
    assert remove(node.path, node.lines.append) == [node.path / OURS]
    assert node.files() == ["00-hostport.conflist.bak"]
    assert node.lines == [
        f"{node.path}/{OURS} is removed",
        f"{node.path} now has no network configuration: that of the primary plugin was gone already",
    ]


def settle(node: Node) -> None:
    """Take notice of what was written so far, ours included."""
    while node.keeper.wait(0.1):
        node.keeper.update()


def swap_options(node: Node) -> None:
    (node.options.parent / "..data_tmp").symlink_to("options.json")
    (node.options.parent / "..data_tmp").rename(node.options.parent / "..data")


def replace_directory(node: Node) -> None:
    node.path.rename(node.path.with_name("old"))
    node.path.mkdir()


CHANGES = {
    "a file is written": lambda node: node.write("10-pods.conflist", conflist(mtu=1)),
    "a file is removed": lambda node: (node.path / "10-pods.conflist").unlink(),
    "a file is renamed": lambda node: (node.path / "10-pods.conflist").rename(node.path / "20-pods.conflist"),
    "a link is made": lambda node: (node.path / "05-pods.conflist").symlink_to("10-pods.conflist"),
    "a file becomes readable": lambda node: (node.path / "10-pods.conflist").chmod(0o600),
    "the options are swapped": swap_options,
    "the directory is replaced": replace_directory,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_kernel_tells_of_changes(node: Node, change: str) -> None:
    node.write("10-pods.conflist", conflist())
    node.keeper.update()
    settle(node)
    timer = threading.Timer(0.1, CHANGES[change], [node])
    timer.start()
    assert node.keeper.wait(10)
    timer.join()


def test_options_are_followed_through_a_directory_that_was_left_open(tmp_path: Path) -> None:
    (tmp_path / "net.d").mkdir()
    (tmp_path / "net.d" / "10-pods.conflist").write_text(conflist())
    volume = tmp_path / "volume"
    for number in (1, 2):
        (volume / f"..{number}").mkdir(parents=True)
        (volume / f"..{number}" / "options.json").write_text(f'{{"waitForHolder": {number}}}')
    (volume / "..data").symlink_to("..1")
    (volume / "options.json").symlink_to("..data/options.json")
    lines: list[str] = []
    descriptor = os.open(volume, os.O_RDONLY | os.O_DIRECTORY)
    options = Path(f"/proc/self/fd/{descriptor}/options.json")
    with Keeper(tmp_path / "net.d", options, lines.append) as keeper:
        assert keeper.update().is_ready
        while keeper.wait(0.1):
            keeper.update()
        (volume / "..data_tmp").symlink_to("..2")
        (volume / "..data_tmp").rename(volume / "..data")
        assert keeper.wait(10)
        assert keeper.update().is_ready
    os.close(descriptor)
    assert json.loads((tmp_path / "net.d" / OURS).read_bytes())["plugins"][1]["waitForHolder"] == 2


def test_a_directory_that_is_made_again_is_watched_again(node: Node) -> None:
    replace_directory(node)
    node.keeper.update()
    settle(node)
    node.write("10-pods.conflist", conflist())
    assert node.keeper.wait(10)
    assert node.update() == (IN_STEP, True)


def test_a_directory_that_appears_with_all_above_it_is_noticed(tmp_path: Path) -> None:
    lines: list[str] = []
    with Keeper(tmp_path / "etc" / "cni" / "net.d", None, lines.append) as keeper:
        assert keeper.update().condition is WAITING
        for directory in (tmp_path / "etc", tmp_path / "etc" / "cni", tmp_path / "etc" / "cni" / "net.d"):
            directory.mkdir()
            assert keeper.wait(10)
            assert keeper.update().condition is WAITING
        (tmp_path / "etc" / "cni" / "net.d" / "10-pods.conflist").write_text(conflist())
        assert keeper.wait(10)
        assert keeper.update().is_ready


def test_our_own_temporary_files_are_no_change(node: Node) -> None:
    node.keeper.update()
    node.write(".hostport-1.tmp", "half")
    assert not node.keeper.wait(0.1)


def test_without_events_there_is_a_look_from_time_to_time(node: Node) -> None:
    node.keeper.update()
    assert node.keeper.due() == configuration_state.POLL
    node.time += configuration_state.POLL
    assert node.keeper.wait(10)


def test_where_the_kernel_has_no_watch_to_give_looks_are_frequent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("cni_hostport.operate.node.directory_watch.MASK", 0)
    with Keeper(tmp_path, None, lines.append) as keeper:
        keeper.update()
        keeper.update()
        assert keeper.state.again == configuration_keeper.UNWATCHED_POLL
    assert lines == [
        f"the kernel does not tell of changes ({tmp_path}: Invalid argument): a look every 5 seconds",
        f"{tmp_path} has no network configuration yet",
    ]
