"""The licences of what is in a bundle."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

DOCUMENTS = Path("/usr/share/doc")
CHANGES = """\
The files of Debian's packages, of the versions below, are as they are there, but for these: parts are left out, symbols
are stripped, Python's modules are compiled, and the dynamic loader does not look for /etc/ld.so.preload.

"""


def add_licences(files: list[Path], packages: Path, bundle: Path) -> None:
    """Put the licences of Debian's packages that files come from, and those of Python packages, into a bundle."""
    licences = bundle / "licences"
    licences.mkdir()
    names = _debian_packages(files)
    for name in names:
        shutil.copyfile(DOCUMENTS / name / "copyright", licences / f"{name}.txt")
    for path in sorted(packages.glob("*.dist-info")):
        if not path.name.startswith("flit_core"):
            ignored = shutil.ignore_patterns("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
            shutil.copytree(path, licences / path.name, ignore=ignored)
    command = ["dpkg-query", "--show", "--showformat", "${Package} ${Version}\n", *names]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    versions = "".join(sorted(set(listed.splitlines(keepends=True))))
    (licences / "debian-packages.txt").write_text(f"{CHANGES}{versions}")


def _debian_packages(files: list[Path]) -> list[str]:
    """Return the names of the packages that files belong to, by either name of a file where /lib leads to /usr/lib."""
    names = [str(path) for path in files] + [str(path).removeprefix("/usr") for path in files]
    asked = subprocess.run(["dpkg-query", "--search", *names], capture_output=True, text=True, check=False).stdout
    owners = {path: name for name, path in (line.split(": ", 1) for line in asked.splitlines())}
    unknown = [path for path in files if not {str(path), str(path).removeprefix("/usr")} & owners.keys()]
    if unknown:
        sys.exit(f"no package of the system has {unknown[0]}, whose licence is therefore not known")
    return sorted({owner.partition(":")[0] for owner in owners.values()})
