"""An executable that sees all processes: the first in a namespace of process IDs that it takes for the initial one."""

from __future__ import annotations

import sys

ALL = """
import os
from cni_hostport.kernel import presence
presence.INITIAL_PID_NAMESPACE = os.stat("/proc/self/ns/pid").st_ino
from cni_hostport.__main__ import main
main()
"""
SEES_ALL = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-Ic", ALL]
# one that sees the mounts of the first process, and has some of its own, as in a unit of systemd's
IN_A_UNIT = [
    # shared among themselves, and not with the machine, whose /run/netns would be hidden for good
    *("unshare", "--pid", "--fork", "--mount-proc", "--propagation", "private", "sh", "-c"),
    'mount --make-rshared /; mount -t tmpfs none /run/netns; unshare --mount --propagation slave "$@"; exit $?',
    "sh",
]
ALONE = [sys.executable, "-Ic", ALL]
