from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cni_hostport.errors import LibraryEndedError
from cni_hostport.kernel import crashes

if TYPE_CHECKING:
    from collections.abc import Callable


class Ruleset:
    """Sets of three kinds, on the second of which libnftables crashes."""

    contexts = 0

    def notes_at_sets(self) -> list[tuple[str, bytes]]:
        return [(f"set inet filter s{number}", bytes([number % 3])) for number in range(6)]

    def context(self) -> Ruleset:
        self.contexts += 1
        return self

    def listing(self, what: str) -> list[Any]:
        if what.endswith("s1"):
            raise crash()
        return []


def crash() -> LibraryEndedError:
    return LibraryEndedError("libnftables crashed", is_crash=True, knew_sets=False)


@pytest.fixture
def ruleset(monkeypatch: pytest.MonkeyPatch) -> Ruleset:
    made = Ruleset()
    replaced: dict[str, Callable[[], Ruleset]] = {"Lookup": lambda: made, "Nft": made.context}
    for name, make in replaced.items():
        monkeypatch.setattr(crashes, name, make)
    return made


def test_one_context_serves_to_find_all_sets_of_the_kind_on_which_libnftables_crashes(ruleset: Ruleset) -> None:
    assert crashes.sets() == ["set inet filter s1", "set inet filter s4"]
    assert ruleset.contexts == 1


@pytest.mark.parametrize("conditions", [5, "ip saddr", {"ip": 1}, None, []])
def test_conditions_that_are_none_are_not_blamed_for_a_crash(conditions: object) -> None:
    output = crashes.explained(crash(), {"conditionsV4": conditions})
    assert output == "libnftables crashed: bring the nftables of this node (libnftables) to a newer version"


def test_conditions_are_named_whatever_they_hold() -> None:
    assert "on conditionsV6 'ip6 5'" in crashes.explained(crash(), {"conditionsV6": ["ip6", 5]})
