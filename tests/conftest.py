from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from lab import Node, require

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def _kernel() -> None:
    require(os.geteuid() == 0, "needs root, for network namespaces")
    for program in ("ip", "nft", "nsenter", "conntrack"):
        require(shutil.which(program), f"needs the program {program}")


@pytest.fixture
def node(_kernel: None) -> Iterator[Node]:
    with Node() as made:
        yield made
