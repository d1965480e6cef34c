from __future__ import annotations

import json
import sys

import pytest

from cni_hostport.errors import BusyError, ExistsError, NFTError, NotFoundError, UnavailableError
from cni_hostport.kernel import refusals
from cni_hostport.kernel.library import Context
from cni_hostport.kernel.nft import Nft

CREATE, ADD, DELETE = "create chain inet hostport X", "add chain inet missing Y", "delete chain inet hostport Z"
EXISTS, MISSING, BUSY = "File exists", "No such file or directory", "Device or resource busy"


class Library:
    def __init__(self) -> None:
        self.answers: list[tuple[int, str | bytes, str]] = []
        self.calls: list[str] = []
        self.json = False

    def __call__(self) -> Library:
        return self

    def set_json_output(self, value: object) -> None:
        self.json = bool(value)

    def set_handle_output(self, value: object) -> None:
        pass

    def set_stateless_output(self, value: object) -> None:
        pass

    def cmd(self, command: bytes) -> tuple[int, bytes, bytes]:
        self.calls.append(command.decode())
        status, output, error = self.answers.pop(0) if self.answers else (0, "", "")
        return status, output if isinstance(output, bytes) else output.encode(), error.encode()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr("nftables.Nftables", made)
    monkeypatch.setattr(Nft, "context_type", Context)
    return made


def message(commands: list[str], *errors: tuple[str, str]) -> str:
    line = "; ".join(commands)
    return "".join(
        f"Error: Could not process rule: {reason}\n{line}\n{' ' * line.index(marked)}{'^' * len(marked)}\n"
        for reason, marked in errors
    )


def failure(library: Library, error: str, commands: list[str]) -> NFTError:
    library.answers = [(-1, "", error)]
    with pytest.raises(NFTError) as caught:
        Nft().run(commands)
    return caught.value


def test_commands_are_one_transaction(library: Library) -> None:
    Nft().run([CREATE, DELETE])
    assert library.calls == [f"{CREATE}; {DELETE}"]


ELEMENTS = [f'ipv4 . tcp . {port} comment "c{port}, {{ eth0" : goto dnat-N-A' for port in range(300)]
LONG = f"create element inet hostport hostports {{ {', '.join(ELEMENTS)} }}"
CONDITIONS = "add rule inet hostport X " + "ct state established, related " * 200


def test_elements_beyond_the_first_are_in_lines_below_and_nothing_else_is_broken(library: Library) -> None:
    Nft().run([CREATE, LONG, DELETE])
    (text,) = library.calls
    lines = text.split("\n")
    assert max(map(len, lines)) < len(LONG) / 10
    assert all(line.endswith(",") for line in lines[:-2])
    assert " ".join(line.strip() for line in lines) == f"{CREATE}; {LONG}; {DELETE}"
    library.calls.clear()
    Nft().run([CREATE, CONDITIONS, DELETE])
    assert library.calls == [f"{CREATE}; {CONDITIONS}; {DELETE}"]


@pytest.mark.parametrize("marked", [CREATE, LONG, DELETE, ELEMENTS[0], ELEMENTS[-1]])
def test_a_refusal_is_told_by_its_command_whatever_line_that_is_in(library: Library, marked: str) -> None:
    commands = [CREATE, LONG, ADD, DELETE]
    Nft().run(commands)
    lines = library.calls[0].split("\n")
    column = next(line.index(marked[:20]) for line in lines if marked[:20] in line)
    error = failure(library, f"Error: {EXISTS}\n{lines[0]}\n{' ' * column}^^^\n" * 2, commands)
    assert error.refusals == [(EXISTS, LONG if marked in ELEMENTS else marked)]
    assert len(str(error)) < 300


@pytest.mark.parametrize(("reason", "kind"), [(EXISTS, ExistsError), (MISSING, NotFoundError), (BUSY, BusyError)])
@pytest.mark.parametrize(("marked", "command"), [("X", CREATE), ("Y", ADD), ("Z", DELETE)])
def test_a_refusal_is_told_by_its_kind_and_its_command(
    library: Library, reason: str, kind: type[NFTError], marked: str, command: str
) -> None:
    commands = [CREATE, ADD, DELETE]
    error = failure(library, message(commands, (reason, marked)), commands)
    assert type(error) is kind
    assert error.refusals == [(reason, command)]
    assert str(error) == f"{reason}: {command}"


@pytest.mark.parametrize(
    ("reasons", "kind"),
    [
        ((BUSY, MISSING, EXISTS), ExistsError),
        ((BUSY, MISSING, "Out of memory"), NotFoundError),
        (("Out of memory", BUSY, BUSY), BusyError),
    ],
)
def test_of_several_refusals_all_are_kept_and_the_one_to_look_at_first_decides(
    library: Library, reasons: tuple[str, str, str], kind: type[NFTError]
) -> None:
    commands = [CREATE, ADD, DELETE]
    errors = list(zip(reasons, "XYZ", strict=True))
    error = failure(library, message(commands, *errors), commands)
    assert type(error) is kind
    assert error.refusals == list(zip(reasons, commands, strict=True))


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        ("netlink: Error: cache initialization failed: Operation not permitted\n",
         ("netlink: Error: cache initialization failed: Operation not permitted", "")),
        ("Error: syntax error, unexpected newline, expecting string\njunk\n    ^\n",
         ("syntax error, unexpected newline, expecting string", "")),
        ("Error: No symbol type information\nadd rule inet hostport x y\n", ("No symbol type information", "")),
        ("", ("libnftables failed without a reason", "")),
    ],
)  # fmt: skip
def test_another_error_is_passed_on_in_nftables_words(library: Library, error: str, refusal: tuple[str, str]) -> None:
    raised = failure(library, error, ["junk"])
    assert type(raised) is NFTError
    assert raised.refusals == [refusal]


@pytest.mark.parametrize(
    ("refusal", "is_of_another_version"),
    [
        ((EXISTS, "add chain inet hostport output { type nat hook output priority -99; }"), True),
        (("Operation not supported", "add chain inet hostport output { type nat hook output priority -99; }"), True),
        ((EXISTS, "add map inet hostport hostports { type ipv4_addr : verdict; }"), True),
        (
            (
                "Chain \"output\" already exists in table inet 'hostport' with different declaration",
                "add chain inet hostport output { type nat hook output priority -99; }",
            ),
            True,
        ),
        (
            (
                "hostports already exists with different datatype (a vs b)",
                "add map inet hostport hostports { typeof x; }",
            ),
            True,
        ),
        (("hostports already exists with different datatype (a vs b)", "create chain inet hostport dnat-N-A"), False),
        (("Operation not supported", "add map inet hostport hostports { type ipv4_addr : verdict; }"), False),
        (("Operation not permitted", "add chain inet hostport output { type nat hook output priority -99; }"), False),
        ((EXISTS, "create chain inet hostport dnat-1"), False),
    ],
)
def test_what_another_version_declared_is_told_from_other_refusals(
    refusal: tuple[str, str], is_of_another_version: bool
) -> None:
    assert refusals.refused_declarations(NFTError([refusal])) == ([refusal] if is_of_another_version else [])


def test_a_listing_is_read_as_json(library: Library) -> None:
    library.answers = [(0, json.dumps({"nftables": [{"map": {"name": "hostports"}}]}), "")]
    assert Nft().listing("map inet hostport hostports") == [{"map": {"name": "hostports"}}]
    assert library.json
    assert library.calls == ["list map inet hostport hostports"]


@pytest.mark.parametrize("flags", [b'"\xff\x8f"', b"\xfe\x01 3", b'["dormant", \x00]', b'"a\x01b"', b"12e", b""])
def test_garbage_in_place_of_a_tables_flags_breaks_no_listing(library: Library, flags: bytes) -> None:
    table = b'{"table": {"family": "inet", "name": "%s", "handle": 1%s}}'
    flagged = table % (b"firewalld", b', "flags": %s' % flags)
    library.answers = [(0, b'{"nftables": [' + flagged + b", " + table % (b"hostport", b"") + b"]}\n", "")]
    assert [item["table"]["name"] for item in Nft().listing("tables")] == ["firewalld", "hostport"]


def test_a_listing_that_is_no_json_is_an_error(library: Library) -> None:
    library.answers = [(0, "{", "")]
    with pytest.raises(NFTError, match="libnftables' listing cannot be read"):
        Nft().listing("chains inet")


def test_a_listing_of_what_does_not_exist_is_empty(library: Library) -> None:
    error = f"Error: {MISSING}\nlist map inet hostport hostports\n         ^^^^\n"
    library.answers = [(-1, "", error), (0, "", "")]
    nft = Nft()
    assert nft.listing("map inet hostport hostports") == []
    assert nft.listing("chains inet") == []


def test_a_listing_that_fails_otherwise_is_an_error(library: Library) -> None:
    library.answers = [(-1, "", "netlink: Error: Operation not permitted\n")]
    with pytest.raises(NFTError, match="Operation not permitted"):
        Nft().listing("chains inet")


def test_chains_are_listed_first_and_each_map_by_a_call_of_its_own(library: Library) -> None:
    assert Nft().installed().holders == set()
    assert library.calls == [
        "list chains inet",
        "list map inet hostport hostports",
        "list map inet hostport hostports_ip4",
        "list map inet hostport hostports_ip6",
        "list map inet hostport dynamic_ports",
        "list map inet hostport pods_ip4",
        "list map inet hostport pods_ip6",
        "list map inet hostport waiting_hostports",
        "list map inet hostport waiting_hostports_ip4",
        "list map inet hostport waiting_hostports_ip6",
        "list map inet hostport localnet_needs",
    ]


def test_a_pods_name_is_the_label_of_its_rules(library: Library) -> None:
    library.answers = [(0, json.dumps({"nftables": [{"chain": {}}, {"rule": {"comment": "default/web"}}]}), "")]
    assert Nft().pod_name("N-A") == "default/web"
    assert library.calls == ["list chain inet hostport dnat-N-A"]


@pytest.mark.parametrize("error", [OSError("libnftables.so.1: cannot open"), AttributeError("undefined symbol: nft")])
def test_a_library_that_cannot_be_loaded_is_unavailable(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr(Nft, "context_type", Context)
    monkeypatch.setattr("nftables.Nftables", broken)
    with pytest.raises(UnavailableError, match=f"libnftables cannot be used: {error}"):
        Nft()


def test_a_missing_python_binding_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Nft, "context_type", Context)
    monkeypatch.setitem(sys.modules, "nftables", None)
    with pytest.raises(UnavailableError, match="libnftables cannot be used"):
        Nft()
