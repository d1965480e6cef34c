"""Python in a bundle: the interpreter, its library, and the packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LIBRARY = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
PACKAGES = f"{LIBRARY}/site-packages"
# of Python's library: what nothing imports here. Encodings are named by their beginnings: what remains is of Unicode
UNUSED = (
    "EXTERNALLY-MANAGED", "LICENSE.txt", "__phello__*", "_pydecimal.py", "_pyio.py", "aifc.py", "antigravity.py",
    "asynchat.py", "asyncore.py", "bdb.py", "cProfile.py", "cgi.py", "cgitb.py", "config-*", "curses", "dbm",
    "dist-packages", "distutils", "doctest.py", "ensurepip", "ftplib.py", "idlelib", "imaplib.py", "lib2to3",
    "mailbox.py", "msilib", "nntplib.py", "optparse.py", "pdb.py", "pickletools.py", "plistlib.py", "profile.py",
    "pstats.py", "pydoc.py", "pydoc_data", "site-packages", "sitecustomize.py", "smtpd.py", "smtplib.py", "sunau.py",
    "telnetlib.py", "test", "tkinter", "trace.py", "turtle.py", "turtledemo", "venv", "wave.py", "webbrowser.py",
    "xml", "xmlrpc",
)  # fmt: skip
UNUSED_ENCODINGS = (
    "big5*", "cp[0-9]*", "euc_*", "gb*", "hp_*", "hz.py", "iso*", "johab.py", "koi8*", "kz*", "mac_*", "ptcp*",
    "shift_*", "tis_*",
)  # fmt: skip
# extension modules, by what stands before the first dot of their names. Without _hashlib, hashes are Python's own, and
# OpenSSL is loaded by the module ssl alone
UNUSED_EXTENSIONS = (
    "_bz2", "_codecs_*", "_crypt", "_ctypes_test", "_curses*", "_dbm", "_gdbm", "_hashlib", "_lsprof", "_lzma",
    "_test*", "_tkinter", "_uuid", "_xx*", "audioop", "nis", "ossaudiodev", "readline", "spwd", "xx*",
)  # fmt: skip
# of the packages: what is for builds, for other systems, or imported by parts of them that are not used here
UNUSED_PACKAGES = (
    "*.dist-info", "*.pth", "_psaix.py", "_psbsd.py", "_psosx.py", "_pssunos.py", "_pswindows.py", "bin", "bsd", "dhcp",
    "flit_core", "markdown_it", "mdurl", "mypy.py", "pygments", "v1",
)  # fmt: skip
COMPILED = "__pycache__"


def add_python(packages: Path, bundle: Path) -> list[Path]:
    """Put the interpreter, its library and the packages into a bundle; return what of that is the system's."""
    interpreter = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    (bundle / "bin").mkdir(parents=True)
    shutil.copyfile(interpreter, bundle / "bin" / "python3")
    shutil.copytree(library, bundle / LIBRARY, ignore=_unused(library))
    copied = [library / path.relative_to(bundle / LIBRARY) for path in sorted((bundle / LIBRARY).rglob("*.*"))]
    shutil.copytree(packages, bundle / PACKAGES, ignore=shutil.ignore_patterns(COMPILED, *UNUSED_PACKAGES))
    return [interpreter, *filter(Path.is_file, copied)]


def compile_modules(directory: Path) -> None:
    """Compile all modules, so that nothing depends on when, where and in which process that was."""
    options = ["-qq", "--invalidation-mode", "unchecked-hash", "-s", str(directory)]
    command = [sys.executable, "-m", "compileall", *options, str(directory)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "0"})


def _unused(library: Path) -> Callable[[str, list[str]], set[str]]:
    patterns = {
        str(library): UNUSED,
        str(library / "encodings"): UNUSED_ENCODINGS,
        str(library / "lib-dynload"): tuple(f"{name}.*" for name in UNUSED_EXTENSIONS),
    }

    def unused(directory: str, names: list[str]) -> set[str]:
        given = (COMPILED, *patterns.get(directory, ("test", "tests")))
        return {name for name in names if any(fnmatch(name, pattern) for pattern in given)}

    return unused
