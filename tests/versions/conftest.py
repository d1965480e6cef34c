from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from installation import Machine
from lab import Namespace, require
from versions.roots import SUITES, Root, made
from versions.systems import System

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = "here"


@pytest.fixture(scope="session")
def root(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Root]]:
    """Return what gives the root of a release, with the plugin installed in it."""
    for program in ("debootstrap", "unshare"):
        require(shutil.which(program), f"needs the program {program}")
    roots: dict[str, Root] = {}

    def installed(suite: str) -> Root:
        if suite not in roots:
            top = tmp_path_factory.mktemp(suite)
            source = Machine(top).source
            roots[suite] = Root(made(suite, source, top), source, top / "root")
            roots[suite].install()
        return roots[suite]

    # the directory of network namespaces is there and shared, for roots to see those that are made later
    with Namespace("first"):
        yield installed
    for item in roots.values():
        with item:
            pass


@pytest.fixture(scope="session")
def system_called(root: Callable[[str], Root]) -> Callable[[str], System]:
    def called(name: str) -> System:
        if name == HERE:
            return System.here()
        prefix = root(name).prefix
        return System(prefix, [*prefix, "/opt/cni/bin/hostport"])

    return called


@pytest.fixture(params=[HERE, *SUITES])
def system(request: pytest.FixtureRequest, system_called: Callable[[str], System]) -> System:
    return system_called(request.param)


PAIRS = [pair for suite in SUITES for pair in ((HERE, suite), (suite, HERE))]


@pytest.fixture(params=PAIRS, ids=["-".join(pair) for pair in PAIRS])
def pair(request: pytest.FixtureRequest, system_called: Callable[[str], System]) -> tuple[System, System]:
    """Who writes the ruleset first, and who goes on."""
    item, other = request.param
    return system_called(item), system_called(other)


@pytest.fixture(params=SUITES)
def suite(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name
