from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import scratch
from lab import mapping

from cni_hostport.netlink import Netlink
from cni_hostport.nf_tables import GETCHAIN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cni_hostport.netlink import Message

OTHERS = """
add table ip nat
add chain ip nat PREROUTING { type nat hook prerouting priority -100; }
add chain ip nat KUBE-SERVICES
add rule ip nat PREROUTING counter jump KUBE-SERVICES
"""


@pytest.fixture
def asked(_kernel: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Message]]:
    """What the kernel is asked about tables that portmap uses, in a namespace where portmap was not."""
    questions: list[Message] = []
    ask = Netlink.ask

    def noted(netlink: Netlink, messages: Sequence[Message], **keys: bool) -> list[tuple[int, list[bytes]]]:
        questions.extend(message for message in messages if b"nat\0" in message[2] or b"cni_hostport\0" in message[2])
        return ask(netlink, messages, **keys)

    monkeypatch.setattr(Netlink, "ask", noted)
    with scratch.namespace():
        scratch.nft(OTHERS)
        yield questions


@pytest.mark.parametrize("command", ["ADD", "DEL", "DEL of nothing"])
def test_where_portmap_was_not_each_call_asks_for_four_chains_and_no_more(asked: list[Message], command: str) -> None:
    if command == "DEL":
        scratch.run("ADD", mapping(8080), snat=False)
        asked.clear()
    assert scratch.run(command[:3], mapping(8080), snat=False) == []
    assert [kind for kind, _, _ in asked] == [GETCHAIN] * 4


def test_a_pod_without_mappings_asks_for_nothing(asked: list[Message]) -> None:
    assert scratch.run("ADD") == []
    assert asked == []


@pytest.mark.parametrize("empty", ["ip nat CNI-HOSTPORT-DNAT", "ip6 cni_hostport hostports"])
def test_chains_that_portmap_left_empty_claim_nothing(asked: list[Message], empty: str) -> None:
    family, table, _ = empty.split()
    scratch.nft(f"add table {family} {table}; add chain {empty}")
    before = scratch.ruleset()
    assert scratch.run("ADD", mapping(8080), snat=False) == []
    assert scratch.run("DEL") == []
    assert before in scratch.ruleset()
    assert asked
