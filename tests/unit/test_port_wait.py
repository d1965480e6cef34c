from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from cni_hostport import port_wait
from cni_hostport.attachment import Attachment
from cni_hostport.errors import CNIError, Code, PortHeldError
from cni_hostport.ruleset.comment import Owner
from cni_hostport.ruleset.elements import Element
from cni_hostport.ruleset.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

PLAN = Plan((), {})
ELEMENT = Element("hostports", "ipv4 . tcp . 8080", "dnat-N-A", Owner("c1", "eth0"))


class Lookup:
    """Where the port leads, look by look; what is last stays."""

    def __init__(self) -> None:
        self.chains = ["dnat-N-A"]
        self.looks = 0

    def chain_of(self, name: str, key: str) -> str:
        assert (name, key) == (ELEMENT.map, ELEMENT.key)
        self.looks += 1
        return self.chains.pop(0) if len(self.chains) > 1 else self.chains[0]


@pytest.fixture(autouse=True)
def lookup(monkeypatch: pytest.MonkeyPatch) -> Lookup:
    made = Lookup()
    monkeypatch.setattr("cni_hostport.lookup.Lookup", lambda: made)
    monkeypatch.setattr("cni_hostport.netlink.LEFT_OPEN", [])
    monkeypatch.setattr(port_wait, "LOOK_INTERVAL", 0.01)
    monkeypatch.setattr(port_wait, "ATTEMPT_INTERVAL", 0.01)
    return made


def taken(is_gone: Callable[[], bool] = lambda: False) -> PortHeldError:
    return PortHeldError("host port 8080/tcp is taken by container c1 (eth0)", ELEMENT, is_gone)


def unknown(holder: str) -> CNIError:
    return CNIError(Code.PORT_TAKEN, f"host port 8080/tcp is taken by {holder}")


def claim(refusal: CNIError, *results: Plan | CNIError, seconds: int = 20) -> tuple[Plan, list[str]]:
    """Make attempts with these results, and return the plan and the lines."""
    lines, rest = list[str](), list(results)

    def attempt() -> Plan:
        result = rest.pop(0)
        if isinstance(result, CNIError):
            raise result
        return result

    attachment = Attachment("pods", "", "", "/run/netns/absent")
    plan = port_wait.claim(attempt, refusal, attachment, seconds, lines.append)
    assert not rest
    return plan, lines


def test_no_attempt_is_made_before_the_port_leads_elsewhere(lookup: Lookup) -> None:
    lookup.chains = ["dnat-N-A", "dnat-N-A", ""]
    plan, [line] = claim(taken(), PLAN)
    assert (plan, lookup.looks) == (PLAN, 3)
    assert line.endswith(" s for an end of this: host port 8080/tcp is taken by container c1 (eth0)")


@pytest.mark.usefixtures("lookup")
def test_no_more_attempts_are_made_once_the_container_that_waits_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    attachment, attempts = Attachment("pods", "c1", "eth0", "/run/netns/c1"), list[None]()

    def note(noted: Attachment) -> None:
        noted.identity = "4:1" if not attempts else ""  # it is gone when the attempt looks

    def attempt() -> Plan:
        attempts.append(None)
        note(attachment)
        raise taken(lambda: True)

    monkeypatch.setattr("cni_hostport.kernel.presence.note", note)
    monkeypatch.setattr("cni_hostport.kernel.presence.View.is_gone", lambda _, owner: bool(attempts and owner.identity))
    with pytest.raises(CNIError):
        port_wait.claim(attempt, taken(lambda: True), attachment, 20, print)
    assert len(attempts) == 1


def test_an_attempt_is_made_when_the_holder_is_gone(lookup: Lookup) -> None:
    states = [False, True]
    assert claim(taken(lambda: states.pop(0)), PLAN)[0] == PLAN
    assert (states, lookup.looks) == ([], 1)


def test_a_last_attempt_is_made_when_the_time_is_over() -> None:
    last = taken()
    with pytest.raises(PortHeldError) as refused:
        claim(taken(), last, seconds=1)
    assert refused.value is last


def test_who_holds_a_port_unknown_to_the_ruleset_is_asked_by_attempts(lookup: Lookup) -> None:
    plan, [line] = claim(unknown("A"), unknown("B"), unknown("B"), PLAN)
    assert (plan, lookup.looks) == (PLAN, 0)
    assert line.endswith("is taken by A")


def test_a_failure_of_another_kind_ends_the_wait(lookup: Lookup) -> None:
    lookup.chains = [""]
    with pytest.raises(CNIError) as failed:
        claim(taken(), CNIError(Code.TRY_AGAIN, "too many races"))
    assert failed.value.code == Code.TRY_AGAIN


def test_nothing_is_attempted_where_0_seconds_are_to_be_waited() -> None:
    refusal = taken()
    with pytest.raises(PortHeldError) as refused:
        claim(refusal, seconds=0)
    assert refused.value is refusal


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_place_among_those_at_work_is_given_up_by_who_waits(seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    watching, place = os.pipe()
    monkeypatch.setattr(port_wait, "PLACES", [place])
    with pytest.raises(CNIError):
        claim(taken(), *[taken()] * seconds, seconds=seconds)
    if seconds:
        assert os.read(watching, 1) == b""
    else:
        os.close(place)
    os.close(watching)
