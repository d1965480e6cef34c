"""The native executable of a bundle, and the script by which it starts Python."""

from __future__ import annotations

import os
import subprocess
import zipfile
from typing import TYPE_CHECKING

from libraries import EXTENSIONS, loader
from python import PACKAGES

from cni_hostport import native

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = "lib/hostport.py"
START = f"""import sys

sys.path.insert(0, f"{{sys.prefix}}/{PACKAGES}")
from cni_hostport.handover import main

main()
"""
# C has no files of locales, which are this machine's, and UTF-8 is Python's encoding there. Without HOME, sysconfig,
# which pydantic imports, looks up whose process this is, by libraries that the machine names
ENVIRONMENT = {
    "HOME": "/",
    "LC_ALL": "C",
    "LD_AUDIT": None,
    "LD_PRELOAD": None,
    "OPENSSL_CONF": "",
    "PYTHONTZPATH": "",
    "XTABLES_LIBDIR": f"./{EXTENSIONS}",
}
# an interpreter that was just started for a script in whose place this executable came
AGAIN = "import os, sys\n\nos.execv(sys.argv[0], sys.argv)\n"


def write_executable(source: Path, bundle: Path) -> None:
    """Compile a bundle's executable, and write the script."""
    (bundle / SCRIPT).write_text(START)
    python = "./bin/python3"
    command = [
        f"./{loader(bundle).relative_to(bundle)}", "--inhibit-cache", "--library-path", "./lib", "--argv0", python,
        python, "-IS", f"./{SCRIPT}",
    ]  # fmt: skip
    options = native.bundle_options(command, ENVIRONMENT, f"./{PACKAGES}/cni_hostport/handover.py")
    target = bundle / "bin" / "hostport"
    target.unlink(missing_ok=True)  # it is appended to below
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run(
        [*compiler, "-O2", "-static", "-s", "-Wl,--build-id=none", *options, "-o", target, source], check=True
    )
    with zipfile.ZipFile(target, "a") as program:
        program.writestr(zipfile.ZipInfo("__main__.py"), AGAIN)
