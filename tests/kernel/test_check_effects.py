"""CHECK compares snapshots first, and nft's listings where these differ: both have to see the same changes."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest
import scratch
from lab import mapping
from scratch import KEY, nft, run

from cni_hostport.kernel.nft import Nft
from cni_hostport.kernel.snapshot import snapshot
from cni_hostport.lookup import Lookup
from cni_hostport.ruleset.differences import differences

if TYPE_CHECKING:
    from collections.abc import Iterator

    State = tuple[object, dict[str, list[dict[str, object]]]]

MAPPINGS = [mapping(8080), mapping(5353, 53, "udp", hostIP="192.0.2.1")]
CONDITION = ["ip", "saddr", "!=", "203.0.113.0/24", "counter"]
BLOCK = re.compile(r"^\t(map|set|chain) (\S+) \{\n(.*?)^\t\}\n", re.MULTILINE | re.DOTALL)
OTHER_HOOKS = {
    "priority dstnat + 1": "priority dstnat",
    "priority -99": "priority -98",
    "priority srcnat": "priority srcnat + 1",
    "priority raw": "priority raw + 1",
    "policy accept": "policy drop",
    "nat hook output": "nat hook prerouting",
    "filter hook prerouting": "filter hook input",
}
OTHER_KEYS = {"ip6 daddr . meta nfproto": "ip daddr . meta nfproto", "ip6 daddr . ip daddr": "ip daddr . ip6 daddr"}


def seen(text: str) -> State:
    """Load a ruleset, and return what CHECK sees of it."""
    with scratch.namespace():
        nft(text)
        return snapshot(Lookup(), KEY), Nft().state(KEY)


def who_differs(before: State, text: str) -> tuple[bool, bool]:
    """Tell whether snapshots differ, and whether listings do."""
    after = seen(text)
    return after[0] != before[0], bool(differences(KEY, before[1], after[1]))


@pytest.fixture(scope="module")
def installed(_kernel: None) -> str:
    with scratch.namespace():
        run("ADD", *MAPPINGS, conditionsV4=CONDITION)
        return subprocess.run(["nft", "list", "ruleset"], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def before(installed: str) -> State:
    return seen(installed)


def with_timeout(text: str, kind: str) -> Iterator[tuple[str, str]]:
    """Yield, for each map or set without a timeout, its name and the text in which it has one."""
    for found in BLOCK.finditer(text):
        if found[1] == kind and "timeout" not in found[3]:
            timeout = f"{found[3]}\t\tflags timeout\n\t\ttimeout 1h\n"
            yield f"{kind} {found[2]}", text[: found.start(3)] + timeout + text[found.end(3) :]


def with_other_rules(text: str) -> Iterator[tuple[str, str]]:
    """Yield, for each rule, what is done to it and the text in which it is gone, is there twice, or counts."""
    for found in BLOCK.finditer(text):
        end = found.start(3)
        for line in found[3].splitlines(keepends=True) if found[1] == "chain" else ():
            start, end = end, end + len(line)
            if " hook " not in line:
                for subject, lines in (("", ""), ("twice", line + line), ("counting", f"\t\tcounter{line[1:]}")):
                    yield f"{found[2]}: {subject} {line.strip()}", text[:start] + lines + text[end:]


def altered(text: str) -> Iterator[tuple[str, str]]:
    """Yield what has another effect: each ruleset, after what is different there."""
    for old, new in (OTHER_HOOKS | OTHER_KEYS).items():
        for place in re.finditer(re.escape(old) + r"\b", text):
            yield f"{old}, at {place.start()}", text[: place.start()] + new + text[place.end() :]
    yield from with_other_rules(text)
    yield from with_timeout(text, "map")
    for elements in re.finditer(r"^\t\telements = \{.*?\}\n", text, re.MULTILINE | re.DOTALL):
        yield elements[0], text.replace(elements[0], "")
        for element in re.findall(r"[^{},]+? : goto \S+" + KEY + r",\n", elements[0]):
            yield element, text.replace(element, "")
    yield "dormant", text.replace("{\n", "{\n\tflags dormant\n", 1)


def test_both_see_all_that_alters_the_effect(installed: str, before: State) -> None:
    texts = dict(altered(installed))
    assert len(texts) > 80  # so that no pattern above has stopped to match
    unseen = {subject: by for subject, text in texts.items() if (by := who_differs(before, text)) != (True, True)}
    assert unseen == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("packets 0 bytes 0", "packets 7 bytes 700"),
        (' comment "c1 eth0 /run/netns/c1"', ""),
        ('comment "pods"', 'comment "others"'),
        ('comment "CNI hostport plugin"', 'comment "something else"'),
        ("table inet hostport {", "table inet another { chain x { accept; }; }; table inet hostport {"),
    ],
    ids=["counted", "no owner", "another network", "another comment of the table", "other handles"],
)
def test_neither_sees_what_does_not_alter_the_effect(installed: str, before: State, old: str, new: str) -> None:
    assert old in installed
    assert who_differs(before, installed.replace(old, new)) == (False, False)


def test_of_sets_only_snapshots_tell_a_timeout_so_that_check_goes_by_listings(installed: str, before: State) -> None:
    texts = list(with_timeout(installed, "set"))
    assert texts
    assert {who_differs(before, text) for _, text in texts} == {(True, False)}


def test_maps_that_count_no_connections_lead_them_all_the_same(installed: str, before: State) -> None:
    text = re.sub(r"^\t\tcounter\n", "", installed, flags=re.MULTILINE)
    text = re.sub(r" counter packets 0 bytes 0 (comment|:)", r" \1", text)
    assert who_differs(before, text) == (False, True)  # so that CHECK, which begins with snapshots, takes them
