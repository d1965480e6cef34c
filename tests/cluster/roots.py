"""Root file systems of nodes, and what programs of this machine need in another root."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from runtimes import image

# The arguments: an empty directory, the root below, the name of the host, the directory of programs. What is written
# stays in memory. A container's mounts, and those of a pod with mount propagation, need a root that is one of the
# namespace's own and shared.
MOUNTS = """
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mkdir -p proc sys dev run tmp opt etc/cni usr/local/bin var/lib var/log .old
for place in run tmp opt etc/cni var/lib var/log; do mount -t tmpfs tmpfs $place; done
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup
mount --rbind /dev dev
mount --bind "$4" usr/local/bin
hostname "$3"
pivot_root . .old
cd /
umount -l /.old
mount --make-rshared /
"""
DEBIAN = Path("/")
USED = ("runc", "mount", "umount", "conntrack")  # by containerd, kubelet and kube-proxy
IPTABLES = [f"{family}{action}" for family in ("iptables", "ip6tables") for action in ("", "-save", "-restore")]


def files(*programs: Path) -> set[Path]:
    """Return programs and libraries, and each shared library that they load."""
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False)  # it refuses static ones
    return {*programs, *map(Path, re.findall(r"(/\S+) \(0x", listed.stdout))}


def program(name: str) -> Path:
    """Return the file of a program on this machine's path."""
    found = shutil.which(name)
    assert found, f"needs the program {name}"
    return Path(found)


def make_small(root: Path) -> None:
    """Make a root that holds what a node's programs run, and nothing else: no Python, no nft, no libnftables."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc").mkdir()
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (root / "etc/os-release").write_text('ID=small\nPRETTY_NAME="A root without Python"\n')
    _copy(image.BUSYBOX, root)
    subprocess.run(["chroot", root, "/bin/busybox", "--install", "-s", "/bin"], check=True)
    iptables = program("xtables-nft-multi")
    for path in files(*map(program, USED), iptables, *Path("/usr/lib").glob("*/xtables/*.so")):
        _copy(path, root)
    for name in IPTABLES:
        (root / "sbin" / name).symlink_to(iptables)


def _copy(path: Path, root: Path) -> None:
    target = root / path.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    shutil.copy(path, target)
