"""Is the container that holds a port gone? The notes on its network namespace are compared with what there is now.

A path alone does not tell. A runtime with mounts of its own, on the node's network, has other namespaces at the same
paths, or none. Noted are the namespace's identity, its path, and the directory in which the path is a name: device and
inode, which are the same in every mount namespace that sees this directory, and for every process that looks there. A
runtime that was started anew with private mounts of its own sees the same directory; one in a container another.

- The namespace is at its path: the container lives.
- The name is not in that very directory any more, or another namespace has it: the container is gone.
- Whatever else is there, another directory, a plain file, a link to somewhere else or to nothing, tells nothing. Then
  the container is gone if no process is in the namespace and nobody has it mounted, which only a process can tell that
  sees all others. Who cannot be told lives.

The same holds for what an older version noted, without the directory; and without the identity, the path counts where
the mounts of the first process are seen. Below ``/proc``, whose inodes change, the directory is ``/proc`` itself, and
only the namespace of a process ends with its name: a descriptor that is closed tells nothing. The kernel uses the
inodes of namespaces again at once, but not their cookies: where a cookie was not noted, another namespace can be taken
for one that is gone, and keep that one's ports taken.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from errno import EMFILE, ENFILE, ENOENT, ENOMEM, ENOTTY, ESRCH
from functools import cached_property
from os.path import normpath, split
from stat import S_ISLNK

from cni_hostport.errors import CNIError, Code
from cni_hostport.kernel import netns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.attachment import Attachment
    from cni_hostport.ruleset.comment import Owner

PROC = "/proc"
INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # linux/proc_ns.h: PROC_PID_INIT_INO
PROCESS_NAMESPACE = r"[0-9]+/ns/net"  # a name below PROC
EXHAUSTED = {EMFILE, ENFILE, ENOMEM}


def note(attachment: Attachment) -> None:
    """Note what tells the attachment's network namespace from others, if this process can see that namespace.

    Raises ``CNIError`` with ``HOST_SETTING`` if it lacks the descriptors or the memory for a look.
    """
    try:
        with _directory(attachment.netns) as (directory, name), netns.namespace(name, directory) as namespace:
            place = netns.file_identity(directory), netns.cookie(namespace)
            attachment.identity, attachment.place = netns.file_identity(namespace), ":".join(filter(None, place))
    except (OSError, ValueError) as error:  # in a place that the runtime alone sees, or nowhere
        if getattr(error, "errno", None) in EXHAUSTED:
            reason = f"cannot look at CNI_NETNS {attachment.netns!r}: {error}"
            raise CNIError(Code.HOST_SETTING, reason) from error
        attachment.identity = attachment.place = ""


class View:
    """What this process sees of the holders of ports; to be made after these were listed, and for one use."""

    def is_gone(self, owner: Owner) -> bool:
        """Tell whether a holder certainly is gone."""
        return self.lives(owner) is False

    def lives(self, owner: Owner) -> bool | None:
        """Tell whether a holder's network namespace is at its path; ``False`` if it is gone, ``None`` if neither."""
        if not owner.netns:
            return None
        try:
            at_path = _is_at_path(owner)
        except (OSError, ValueError):
            return None
        return False if at_path is None and owner.identity and self._is_nowhere(owner) else at_path

    def _is_nowhere(self, owner: Owner) -> bool:
        """Tell whether a holder's network namespace certainly does not exist."""
        inode = owner.identity.partition(":")[2]
        if self._existing is None or not inode.isdecimal():
            return False
        path = self._existing.get(inode)
        if path is None:
            return True
        try:
            with netns.namespace(path) as namespace:
                return netns.file_identity(namespace) == owner.identity and not _is_that(owner, namespace)
        except (OSError, ValueError):
            return False  # it may be ending

    @cached_property
    def _existing(self) -> dict[str, str] | None:
        """A path to each network namespace, by its inode; ``None`` where this process may not see them all."""
        try:
            return dict(_everywhere()) if sees_all_processes() else None
        except OSError:
            return None


def _is_at_path(owner: Owner) -> bool | None:
    """Tell whether a holder's network namespace is at its path, ``None`` if it may be for another process.

    Raises ``OSError`` and ``ValueError`` if the path cannot be looked at.
    """
    as_noted = False  # the path leads where it does for the process that noted it
    try:
        with _directory(owner.netns) as (directory, name):
            as_noted = owner.place.split(":")[:2] == netns.file_identity(directory).split(":")
            if _is_in_proc(owner.netns):
                as_noted &= re.fullmatch(PROCESS_NAMESPACE, name) is not None
            else:
                as_noted &= not S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
            with netns.namespace(name, directory) as namespace:
                if not owner.identity or _is_that(owner, namespace):
                    return True
    except OSError as error:
        if error.errno not in netns.GONE:
            raise
        as_noted &= error.errno != ENOTTY  # a file, on which another process may see something mounted
    if not owner.identity and sees_everything(owner.netns):
        return False
    return False if as_noted else None


def _is_that(owner: Owner, namespace: int) -> bool:
    """Tell whether an open network namespace is that of a holder, as far as can be told."""
    if netns.file_identity(namespace) != owner.identity:
        return False
    cookie = owner.place.split(":")[2:]
    try:
        return not cookie or netns.cookie(namespace) in {"", *cookie}
    except OSError:
        return True


@contextmanager
def _directory(path: str) -> Iterator[tuple[int, str]]:
    """Open the directory in which a path is a name, and give that name; raises ``OSError`` if there is none."""
    directory, name = split(path)
    if _is_in_proc(path):
        directory, name = PROC, normpath(path).lstrip("/").removeprefix("proc/")
    descriptor = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor, name
    finally:
        os.close(descriptor)


def _is_in_proc(path: str) -> bool:
    return path.startswith("/") and f"/{normpath(path).lstrip('/')}".startswith(f"{PROC}/")


def sees_all_processes() -> bool:
    """Tell whether this process sees all processes, and may see what is theirs; raises ``OSError``."""
    try:
        return os.stat(f"{PROC}/self/ns/pid").st_ino == INITIAL_PID_NAMESPACE and bool(os.stat(f"{PROC}/1/ns/net"))
    except (FileNotFoundError, PermissionError):
        return False


def sees_everything(path: str = "") -> bool:
    """Tell whether this process sees all processes, and the mounts of the first one, at least those where a path leads.

    Raises ``OSError``.
    """
    if not sees_all_processes():
        return False
    with _opened("/") as own, _opened(f"{PROC}/1/root") as first:
        # the mount namespace itself would not do: in the resident process, the root is that of a caller
        if (_mount(own), netns.file_identity(own)) == (_mount(first), netns.file_identity(first)):
            return True
    return bool(path) and _receives_mounts(path)


def _receives_mounts(path: str) -> bool:
    """Tell whether what is mounted for the first process where a path leads comes on here, as in units of systemd's.

    The mount there is of a peer group of the first process's, or follows one, by mount_namespaces(7).
    """
    directory = os.path.abspath(path)
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    with _opened(directory) as descriptor:
        mount = next((fields for fields in _mounts("thread-self") if fields[0] == _mount(descriptor)), None)
    if mount is None:
        return False
    groups = {
        field.replace("master:", "shared:")
        for field in mount[6 : mount.index("-")]
        if field.startswith(("shared:", "master:"))
    }
    return any(fields[3:5] == mount[3:5] and groups & {*fields[6 : fields.index("-")]} for fields in _mounts("1"))


def _mounts(process: str) -> list[list[str]]:
    """Return the fields of each mount that a process sees: its number first, its root and its place, by proc(5)."""
    with open(f"{PROC}/{process}/mountinfo", errors="surrogateescape") as lines:
        return [line.split(" ") for line in lines]


def _mount(descriptor: int) -> str:
    """Return the number of the mount, which belongs to one mount namespace, that a descriptor is of."""
    with open(f"{PROC}/thread-self/fdinfo/{descriptor}") as lines:
        return next(line for line in lines if line.startswith("mnt_id:")).split()[1]


@contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _everywhere() -> Iterator[tuple[str, str]]:
    """Yield inode and path of the network namespace of each process, and of all that are mounted for one.

    Raises ``OSError``.
    """
    seen = set()
    for process in filter(str.isdecimal, os.listdir(PROC)):
        try:
            namespace = f"{PROC}/{process}/ns/net"
            yield _inode(os.readlink(namespace)), namespace
            mounts = os.readlink(f"{PROC}/{process}/ns/mnt"), os.readlink(f"{PROC}/{process}/root")
            if mounts not in seen:
                fields = _mounts(process)
                seen.add(mounts)
                for _, _, _, root, path, *_ in fields:
                    if root.startswith("net:["):
                        yield _inode(root), f"{PROC}/{process}/root{unescaped(path)}"
        except OSError as error:
            if error.errno not in {ENOENT, ESRCH}:  # the process has ended
                raise


def _inode(namespace: str) -> str:
    return namespace.removeprefix("net:[").removesuffix("]")


def unescaped(path: str) -> str:
    """Return a path as it is, from the form in which ``mountinfo`` has it."""
    return re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), path)
