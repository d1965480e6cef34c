from __future__ import annotations

import pytest
from compare.cases import Case, load
from compare.plugins import PLUGINS
from compare.table import attempt, missing
from lab import require

CASES = load()
*REFERENCES, HOSTPORT = PLUGINS


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    require(not (need := missing()), f"needs {need}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostport_does_what_the_case_asks_or_says_why_not(case: Case) -> None:
    assert bool(attempt(case, HOSTPORT)) == bool(case.declined)


@pytest.mark.parametrize("case", [case for case in CASES if not case.because], ids=lambda case: case.name)
def test_what_nobody_has_to_explain_is_done_by_portmap_too(case: Case) -> None:
    assert not all(attempt(case, plugin) for plugin in REFERENCES)


def test_there_is_a_case_for_most_of_what_can_be_asked_of_a_black_box() -> None:
    assert len(CASES) >= 60
    assert len({case.title for case in CASES}) == len(CASES)
