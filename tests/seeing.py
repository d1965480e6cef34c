"""An executable that sees all processes: the first in a namespace of process IDs that it takes for the initial one."""

from __future__ import annotations

import sys

ALL = """
import os
from cni_hostport import presence
presence.INITIAL_PID_NAMESPACE = os.stat("/proc/self/ns/pid").st_ino
from cni_hostport.__main__ import main
main()
"""
SEES_ALL = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-Ic", ALL]
