from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from lab import mapping, result

from cni_hostport import names, plugin
from cni_hostport.attachment import Attachment
from cni_hostport.errors import CNIError, NFTError, NotFoundError, UnavailableError
from cni_hostport.garbage_collection import VALID_ATTACHMENTS
from cni_hostport.lookup import Held
from cni_hostport.ruleset import base
from cni_hostport.ruleset.commands import probe_commands
from cni_hostport.ruleset.installed import Installed
from cni_hostport.skel import Call

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CONFIG = {"cniVersion": "1.1.0", "name": "pods", "prevResult": result("10.1.0.2/24")}
ENVIRONMENT = {
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/c1",
    "CNI_IFNAME": "eth0",
    "CNI_ARGS": "K8S_POD_NAME=web;K8S_POD_NAMESPACE=default",
}
KEY = Attachment("pods", "c1", "eth0").key
USERS_OF_NFT = ("cni_hostport.kernel.nft", "cni_hostport.addition")


class Kernel:
    holders: tuple[Attachment, ...] = ()
    refusal: NFTError | None = None
    crash = ""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.remembered: set[str] = set()
        self.remembers = True

    def __call__(self, **_: bool) -> Kernel:
        return self

    def run(self, commands: Sequence[str]) -> None:
        if self.refusal:
            raise self.refusal
        self.commands += commands

    @property
    def deleted(self) -> list[str]:
        names = {str(handle): name for name, handle in self.installed().chains.items()}
        last = [command.split()[-1] for command in self.commands if command.startswith("delete chain")]
        return [names.get(word, word) for word in last]

    def find(self, key: str) -> Held | None:
        return Held([], [], b"", 0) if key in {holder.key for holder in self.holders} else None

    def remove(self, _key: str, _held: Held) -> bool:
        return False  # so that it is left to a listing

    def existing(self, _: object) -> list[object]:
        return []

    def leave_open(self) -> None:
        pass

    def members(self, _name: str) -> None:
        return None

    def is_deleted(self, key: str) -> bool:
        return key in self.remembered

    def note_deletion(self, key: str) -> bool:
        if self.remembers:
            self.remembered.add(key)
        return self.remembers

    def installed(self) -> Installed:
        return Installed((), {f"dnat-{holder.key}": number for number, holder in enumerate(self.holders)})


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    for module in USERS_OF_NFT:
        monkeypatch.setattr(f"{module}.Nft", made)
    for module in ("cni_hostport.lookup", "cni_hostport.addition"):
        monkeypatch.setattr(f"{module}.Lookup", made)
    monkeypatch.setattr("cni_hostport.portmap._uses_legacy_iptables", lambda _: False)
    monkeypatch.setattr("cni_hostport.kernel.listeners.tell", lambda *_: None)
    return made


def run(command: str, **keys: Any) -> tuple[Mapping[str, Any] | None, list[str]]:
    lines: list[str] = []
    return plugin.OPERATIONS[command](Call(ENVIRONMENT | {"CNI_COMMAND": command}, CONFIG | keys), lines.append), lines


def failure(command: str, **keys: Any) -> CNIError:
    with pytest.raises(CNIError) as caught:
        run(command, **keys)
    return caught.value


@pytest.mark.parametrize("valid", [None, []])
def test_gc_without_valid_attachments_removes_all_of_its_network(kernel: Kernel, valid: object) -> None:
    own_listing, other = Attachment("pods", "c1", "eth0"), Attachment("other", "c1", "eth0")
    kernel.holders = (own_listing, other)
    run("GC", **{VALID_ATTACHMENTS: valid})
    assert kernel.deleted == [f"dnat-{own_listing.key}"]


def test_gc_keeps_what_is_valid_by_container_and_interface(kernel: Kernel) -> None:
    first, second, stale = (Attachment("pods", *name) for name in (("c1", "eth0"), ("c1", "net1"), ("c2", "eth0")))
    kernel.holders = (first, second, stale)
    run("GC", **{VALID_ATTACHMENTS: [{"containerID": "c1", "ifname": name} for name in ("eth0", "net1")]})
    assert kernel.deleted == [f"dnat-{stale.key}"]


def test_gc_without_the_list_touches_nothing(kernel: Kernel) -> None:
    kernel.holders = (Attachment("pods", "c1", "eth0"),)
    run("GC")
    assert kernel.deleted == []


@pytest.mark.parametrize(
    "listed",
    [5, "x", "", False, {}, [5], [None], [{}], [{"containerID": "c1"}], [{"containerID": 5, "ifname": "eth0"}],
     [{"containerID": "\ud800", "ifname": "eth0"}]],
)  # fmt: skip
def test_gc_refuses_what_is_not_a_list_of_attachments_and_deletes_nothing(kernel: Kernel, listed: object) -> None:
    kernel.holders = (Attachment("pods", "c1", "eth0"),)
    error = failure("GC", **{VALID_ATTACHMENTS: listed})
    assert error.code == 7
    assert error.msg.startswith(f"cni.dev/valid-attachments {listed!r} ")
    assert kernel.deleted == []


def test_gc_goes_on_after_a_failure_and_reports_it_at_the_end(kernel: Kernel) -> None:
    first, second = (Attachment("pods", name, "eth0") for name in ("c1", "c2"))
    kernel.holders, kernel.refusal = (first, second), NFTError([("Out of memory", "")])
    error = failure("GC", **{VALID_ATTACHMENTS: []})
    assert (error.code, error.msg) == (101, "2 attachments could not be removed")
    assert {line.split(":")[0] for line in error.details.splitlines()} == {first.key, second.key}


def test_del_of_what_is_not_installed_succeeds(kernel: Kernel) -> None:
    assert run("DEL") == (None, [])
    assert (kernel.commands, kernel.remembered) == ([], set())


def test_del_remembers_what_could_be_restored(kernel: Kernel) -> None:
    assert run("DEL", runtimeConfig={"portMappings": [mapping(8080)]}) == (None, [])
    assert (kernel.commands, kernel.remembered) == ([], {KEY})


def test_del_remembers_everything_while_attachments_are_restored(kernel: Kernel) -> None:
    kernel.remembered = {names.RESTORING}
    assert run("DEL") == (None, [])
    assert (kernel.commands, kernel.remembered) == ([], {names.RESTORING, KEY})


def test_del_makes_the_table_to_remember_in(kernel: Kernel) -> None:
    kernel.remembers = False
    assert run("DEL", runtimeConfig={"portMappings": [mapping(8080)]}) == (None, [])
    assert kernel.commands == [base.table_command(), *base.deletion_note_commands(KEY)]


def test_del_of_what_is_not_installed_succeeds_where_nothing_can_be_remembered(kernel: Kernel) -> None:
    kernel.remembers, kernel.refusal = False, NFTError([("Operation not supported", "")])
    assert run("DEL", runtimeConfig={"portMappings": [mapping(8080)]}) == (None, [])


@pytest.mark.parametrize("keys", [{"prevResult": 5}, {"runtimeConfig": 5, "backend": "iptables", "snat": "maybe"}])
def test_del_does_not_validate_the_configuration(kernel: Kernel, keys: dict[str, Any]) -> None:
    kernel.holders = (Attachment("pods", "c1", "eth0"),)
    run("DEL", **keys)
    assert kernel.deleted[-1] == f"dnat-{kernel.holders[0].key}"


def test_status_is_good_when_only_the_last_command_fails(kernel: Kernel) -> None:
    kernel.refusal = NotFoundError([("No such file or directory", probe_commands()[-1])])
    assert run("STATUS") == (None, [])


@pytest.mark.parametrize(
    "refusal",
    [
        NotFoundError([("No such file or directory", "add chain inet hostport output")]),
        NotFoundError([("No such file or directory", "")]),
        NFTError([("Operation not permitted", probe_commands()[-1])]),
        NotFoundError([("No such file or directory", command) for command in probe_commands()[-2:]]),
    ],
)
def test_status_says_why_the_kernel_cannot(kernel: Kernel, refusal: NFTError) -> None:
    kernel.refusal = refusal
    error = failure("STATUS")
    assert (error.code, error.details) == (50, str(refusal))


@pytest.mark.parametrize(("command", "code"), [("STATUS", 50), ("GC", 101), ("ADD", 101)])
def test_a_missing_library_is_an_error_with_its_reason(
    command: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise UnavailableError([("libnftables cannot be used", "")])

    for module in USERS_OF_NFT:
        monkeypatch.setattr(f"{module}.Nft", missing)
    runtime = {"portMappings": [mapping(8080)]}
    error = failure(command, runtimeConfig=runtime, **{VALID_ATTACHMENTS: []})
    assert error.code == code
    assert "libnftables cannot be used" in f"{error.msg} {error.details}"


@pytest.mark.usefixtures("kernel")
def test_a_mapping_of_a_family_the_pod_lacks_is_logged_and_passed_over() -> None:
    outcome, lines = run("ADD", runtimeConfig={"portMappings": [mapping(8080, hostIP="2001:db8::1")]})
    assert outcome == CONFIG["prevResult"]
    assert lines == [
        "host port 8080/tcp on 2001:db8::1 is not mapped: the container has no address to which it could be forwarded"
    ]


def test_check_of_a_pod_without_host_ports_asks_nobody() -> None:
    assert run("CHECK", runtimeConfig={"portMappings": [mapping(0)]}) == (None, [])


def test_add_installs_base_and_mappings_with_the_names_of_pod_and_container(kernel: Kernel) -> None:
    outcome, lines = run("ADD", snat=False, runtimeConfig={"portMappings": [mapping(8080)]})
    assert (outcome, lines) == (CONFIG["prevResult"], [])
    assert kernel.commands[: len(base.base_commands())] == base.base_commands()
    assert kernel.commands[len(base.base_commands()) :][:2] == [
        base.deleted_command("add", KEY),
        base.deleted_command("delete", KEY),
    ]
    assert kernel.commands[-3].endswith(' dport 8080 dnat ip to 10.1.0.2:80 comment "default/web"')
    assert kernel.commands[-1].endswith(f' comment "c1 eth0 /run/netns/c1" : goto dnat-{KEY} }}')
