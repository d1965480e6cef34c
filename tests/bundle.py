"""Bundles, images and packages of this checkout, made by ``install.sh`` and kept in the cache, once for all tests.

What is of this machine is kept as long as nothing of it changes: only our own part is made anew for other code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from go_tools import ROOT, TOOLS

from cni_hostport import __version__

CACHE = ROOT / ".cache" / "bundles"
SYSTEM_PYTHON = "/usr/bin/python3"
SYSTEM_PACKAGES = ("gcc", "iptables", "libc6", "libnftables1", "libssl3", "python3")
SYSTEM_FILES = ("conf/bundle/*.py", "conf/requirements.txt")
OWN_FILES = (
    "cni_hostport/**/*.py",
    "cni_hostport/*.c",
    "conf/image/*",
    "conf/packages/*",
    "conf/systemd/*",
    "install.sh",
    "LICENSE",
)
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
    """Return the archive that ``install.sh --bundle`` writes."""
    kept = _cache() / "archive"
    if not kept.exists():
        making = _making()
        built = subprocess.run([ROOT / "install.sh", "--bundle", making], capture_output=True, text=True, check=False)
        assert not built.returncode, built.stderr
        _keep(making, kept)
    return next(kept.iterdir())


def directory(version: str = __version__) -> Path:
    """Return a bundle as it is unpacked, of this code with this ``__version__``; a test leaves it as it is."""
    kept = _cache() / f"hostport-{version}"
    if not kept.exists():
        making = _making()
        bundle, source = making / kept.name, making / "source"
        shutil.copytree(_base(), bundle)
        shutil.rmtree(next(bundle.glob("lib/python3.*/site-packages/cni_hostport")))
        for name in ("cni_hostport", "conf/bundle"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "LICENSE", source)
        module = source / "cni_hostport" / "__init__.py"
        module.write_text(module.read_text().replace(f'"{__version__}"', f'"{version}"'))
        subprocess.run([SYSTEM_PYTHON, "-Bc", ADD_OWN, source, bundle], check=True)
        _keep(bundle, kept)
        shutil.rmtree(making)
    return kept


def image_archive(version: str = __version__) -> Path:
    """Return an archive of the bundle's image ``localhost/hostport:VERSION``, for ``ctr images import``."""
    kept = _cache() / f"image-{version}.tar"
    if not kept.exists():
        making = _making()
        name, saved, build = f"localhost/hostport:{version}", making / kept.name, ROOT / "conf" / "image" / "build.sh"
        environment = image_store(making)
        save = ["podman", "save", "--format", "docker-archive", "--output", str(saved), name]
        for command in ([str(build), str(directory(version)), name], save):
            subprocess.run(command, capture_output=True, check=True, env=environment)
        _keep(saved, kept)
        shutil.rmtree(making)
    return kept


def packages(version: str = __version__) -> dict[str, Path]:
    """Return the bundle's packages, by what their names end with: ``deb`` and ``rpm``."""
    kept = _cache() / f"packages-{version}"
    if not kept.exists():
        making = _making()
        build = [ROOT / "conf" / "packages" / "build.sh", directory(version), making]
        subprocess.run(build, capture_output=True, check=True, env={**os.environ, "NFPM": str(TOOLS / "nfpm")})
        _keep(making, kept)
    return {path.suffix[1:]: path for path in kept.iterdir()}


def image_store(directory: Path) -> dict[str, str]:
    """Return an environment in which images are kept in a directory, and by means that any file system has."""
    configuration = directory / "storage.conf"
    places = f'graphroot = "{directory}/storage"\nrunroot = "{directory}/run"\n'
    configuration.write_text(f'[storage]\ndriver = "vfs"\n{places}')
    return {**os.environ, "CONTAINERS_STORAGE_CONF": str(configuration)}


def _base() -> Path:
    """Return an unpacked bundle whose own part is to be made anew."""
    kept = CACHE / _digest(SYSTEM_FILES)
    if not kept.exists():
        making = _making()
        subprocess.run(["tar", "-xzf", archive(), "-C", making], check=True)
        _keep(next(making.iterdir()), kept)
        making.rmdir()
    return kept


def _cache() -> Path:
    """Return where what is made of these very files is kept."""
    cache = CACHE / _digest((*SYSTEM_FILES, *OWN_FILES))
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def _digest(patterns: tuple[str, ...]) -> str:
    versions = subprocess.run(["dpkg-query", "--show", *SYSTEM_PACKAGES], capture_output=True, check=False)
    digest = hashlib.sha256(versions.stdout)
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _making() -> Path:
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=CACHE))
    made.chmod(0o755)
    return made


def _keep(made: Path, target: Path) -> None:
    """Let others have it, unless another process was faster."""
    with suppress(OSError):
        made.rename(target)
    if made.exists():
        shutil.rmtree(made)
