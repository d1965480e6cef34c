"""Bundles and images of this checkout, made by ``install.sh``, once for all tests: they are kept in the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from go_tools import ROOT

from cni_hostport import __version__

CACHE = ROOT / ".cache" / "bundles"
MADE_OF = ("cni_hostport/**/*.py", "cni_hostport/*.c", "conf/bundle/*.py", "conf/image/*", "conf/requirements.txt",
           "install.sh", "LICENSE")  # fmt: skip
BUILD_TOOLS = ("python3", "libnftables1", "libc6", "gcc", "iptables", "libssl3")
SYSTEM_PYTHON = "/usr/bin/python3"
# the arguments: a checkout, and a bundle without what is made of that
ADD_OWN = """
import sys
from pathlib import Path
source, bundle = map(Path, sys.argv[1:])
sys.path[:0] = [str(source / "conf" / "bundle"), str(source)]
from tree import add_own
add_own(source, bundle)
"""


def archive() -> Path:
    """Return the bundle's archive."""
    kept = CACHE / _key() / "archive"
    if not kept.exists():
        making = _making("archive")
        built = subprocess.run([ROOT / "install.sh", "--bundle", making], capture_output=True, text=True, check=False)
        assert not built.returncode, built.stderr
        _keep(making, kept)
    return next(kept.iterdir())


def directory(version: str = __version__) -> Path:
    """Return a bundle as it is unpacked, which a test leaves as it is, of this code with this ``__version__``."""
    unpacked = CACHE / _key() / f"hostport-{version}"
    if not unpacked.exists():
        making = _making(f"tree-{version}")
        if version == __version__:
            subprocess.run(["tar", "-xzf", archive(), "-C", making], check=True)
        else:
            _change_version(directory(), making / f"hostport-{version}", version)
        _keep(making / unpacked.name, unpacked)
        shutil.rmtree(making)
    return unpacked


def image_archive(version: str = __version__) -> Path:
    """Return an archive of the bundle's image ``localhost/hostport:VERSION``, for ``ctr images import``."""
    saved = CACHE / _key() / f"image-{version}.tar"
    if not saved.exists():
        making = _making("image")
        build = ROOT / "conf" / "image" / "build.sh"
        environment = image_store(making)
        name = f"localhost/hostport:{version}"
        save = ["podman", "save", "--format", "docker-archive", "--output", str(making / saved.name), name]
        for command in ([str(build), str(directory(version)), name], save):
            subprocess.run(command, capture_output=True, check=True, env=environment)
        _keep(making / saved.name, saved)
        shutil.rmtree(making)
    return saved


def image_store(directory: Path) -> dict[str, str]:
    """Return an environment in which images are kept in a directory, and by means that any file system has."""
    configuration = directory / "storage.conf"
    places = f'graphroot = "{directory}/storage"\nrunroot = "{directory}/run"\n'
    configuration.write_text(f'[storage]\ndriver = "vfs"\n{places}')
    return {**os.environ, "CONTAINERS_STORAGE_CONF": str(configuration)}


def _change_version(base: Path, target: Path, version: str) -> None:
    shutil.copytree(base, target, symlinks=True)
    own = next(target.glob("lib/python3.*/site-packages/cni_hostport"))
    shutil.rmtree(own)
    source = target.with_name("source")
    for name in ("cni_hostport", "conf/bundle"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", source)
    module = source / "cni_hostport" / "__init__.py"
    module.write_text(module.read_text().replace(f'"{__version__}"', f'"{version}"'))
    subprocess.run([SYSTEM_PYTHON, "-Bc", ADD_OWN, source, target], check=True)


def _key() -> str:
    """Return what tells bundles of other files from this one."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in MADE_OF for path in ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    versions = ["dpkg-query", "--show", *BUILD_TOOLS]
    digest.update(subprocess.run(versions, capture_output=True, check=False).stdout)
    return digest.hexdigest()[:12]


def _making(name: str) -> Path:
    (CACHE / _key()).mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=CACHE / _key()))
    made.chmod(0o755)
    return made


def _keep(made: Path, target: Path) -> None:
    """Let others have it, unless another process was faster."""
    try:
        made.rename(target)
    except OSError:  # a directory that is there
        shutil.rmtree(made)
