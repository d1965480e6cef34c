"""The tree of a bundle, in the order in which it grows."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from archive import write_digest
from executable import write_executable
from libraries import add_libraries
from licences import add_licences
from python import COMPILED, PACKAGES, add_python, compile_modules

from cni_hostport.operate.node.bundle import MARKER

if TYPE_CHECKING:
    from pathlib import Path


def add_system(packages: Path, bundle: Path) -> None:
    """Put into a new bundle what is of this machine, and the packages that pip has installed in a directory."""
    files = [*add_python(packages, bundle), *add_libraries(bundle)]
    compile_modules(bundle)
    add_licences(files, packages, bundle)


def add_own(source: Path, bundle: Path) -> None:
    """Put into a bundle, which has the rest, what is made of a checkout of this project."""
    own = bundle / PACKAGES / "cni_hostport"
    shutil.copytree(source / own.name, own, ignore=shutil.ignore_patterns(COMPILED, "*.c"))
    compile_modules(own)
    write_executable(source / own.name / "handover.c", bundle)
    shutil.copyfile(source / "LICENSE", bundle / "licences" / "LICENSE")
    (bundle / MARKER).touch()
    write_digest(bundle)
