"""The code that the resident process and its children run: all of it is loaded before a child enters a caller's root.

No file of that root directory becomes code. What is still read there is data: by libnftables (``/etc/protocols``,
``/etc/services``, ``/etc/hosts``, ``/etc/iproute2``, ``/etc/connlabel.conf``), by syslog, and by operations.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from importlib import import_module

from cni_hostport.config import NetworkConfig
from cni_hostport.kernel.library import DATABASES, LIBRARY, look_names_up_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

OPERATIONS_IMPORT = (
    *(
        f"cni_hostport.{module}"
        for module in (
            "addition",
            "check",
            "config",
            "kernel.conntrack",
            "deletion",
            "dynamic_ports.allocation",
            "dynamic_ports.note",
            "dynamic_ports.pod_files",
            "failures",
            "kernel.addresses",
            "kernel.library_socket",
            "kernel.listeners",
            "kernel.refusals",
            "ruleset.differences",
            "log",
            "lookup",
            "migration.removal",
            "ownership",
            "plugin",
            "portmap",
            "upgrade",
            "kernel.xtables",
        )
    ),
    "nftables",
    "random",
    "syslog",
    "traceback",
)


def load() -> None:
    """Load the code of all operations, so that children share it; raises ``OSError`` if libnftables cannot be."""
    for module in OPERATIONS_IMPORT:
        import_module(module)
    NetworkConfig.parse({})  # builds the validator, which otherwise is left to the first call
    ctypes.CDLL(LIBRARY)
    look_names_up_in("files", *DATABASES)
    ctypes.CDLL(None).getprotobyname(b"tcp")  # before glibc 2.34, the lookup in files is a library too
    gc.collect()
    gc.freeze()  # children then do not copy all of it only to count references
    gc.disable()


def close() -> None:
    """Have no module imported from now on."""
    sys.meta_path[:] = [_End()]


class _End:
    """Ends the process that looks for a module: the caller then runs its call itself."""

    def find_spec(self, *_: object) -> NoReturn:
        os._exit(0)
