"""The shared libraries of a bundle, and the dynamic loader that finds them there and nowhere else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

LIBNFTABLES = "libnftables.so.1"
EXTENSIONS = "lib/xtables"  # by which libnftables writes rules of iptables as nft would
PRELOAD = b"/etc/ld.so.preload"
FOUND = re.compile(r"(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)")


def add_libraries(bundle: Path) -> list[Path]:
    """Put libnftables into a bundle, and all that it and the files there are linked with; return what was copied."""
    libnftables = _found(LIBNFTABLES)
    extensions = sorted((libnftables.parent / "xtables").glob("*.so"))
    (bundle / EXTENSIONS).mkdir(parents=True)
    for path in extensions:
        shutil.copyfile(path, bundle / EXTENSIONS / path.name)
    linked = [path for path in sorted(bundle.rglob("*")) if path.suffix == ".so" or path.name == "python3"]
    libraries = {libnftables, *(library for path in [*linked, libnftables] for library in _libraries(path))}
    for path in sorted(libraries):
        shutil.copyfile(path, bundle / "lib" / path.name)
    _load_nothing_else(loader(bundle))
    for path in sorted(bundle.rglob("*")):
        if path.is_file() and path.read_bytes()[:4] == b"\x7fELF":
            subprocess.run(["strip", "--strip-unneeded", "--preserve-dates", path], check=True)
    return [path.resolve() for path in [*sorted(libraries), *extensions]]


def loader(bundle: Path) -> Path:
    """Return the dynamic loader of a bundle."""
    return next((bundle / "lib").glob("ld-linux*"))


def _load_nothing_else(path: Path) -> None:
    """Have a dynamic loader find no file that names libraries for all programs of a machine: another C library's."""
    content = path.read_bytes()
    if content.count(PRELOAD) != 1:
        sys.exit(f"{path}: {PRELOAD.decode()} is not named there once")
    path.write_bytes(content.replace(PRELOAD, bytes(len(PRELOAD))))


def _found(name: str) -> Path:
    cached = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    paths = re.findall(rf"{re.escape(name)} .*=> (/\S+)", cached)
    return Path(paths[0])


def _libraries(path: Path) -> list[Path]:
    listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    if "not found" in listed:
        sys.exit(f"a library that {path} is linked with is missing: {listed}")
    return [Path(found[1]) for found in FOUND.finditer(listed)]
