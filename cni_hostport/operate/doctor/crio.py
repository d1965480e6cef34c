"""CRI-O on this node: the fixed host ports of its pods are its own work, and no plugin's.

It is known by the socket on which it listens for the kubelet. The kernel lists the sockets of this network namespace,
and only while somebody has them: a CRI-O that is installed and does not run has none, and one in a container is not
here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from cni_hostport.dynamic_ports.keys import REQUEST
from cni_hostport.operate.statements import note

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.operate.statements import Statement

UNIX_SOCKETS = Path("/proc/thread-self/net/unix")
# a line of these, with the one flag that there is: somebody listens (net/unix/af_unix.c, ``unix_seq_show``)
CRIO_LISTENS = re.compile(r"^\w+: \w+ \w+ 00010000 \w+ \w+ +\w+ .*/crio\.sock$", re.MULTILINE)


def statements() -> Iterator[Statement]:
    """Say that CRI-O runs here, if it does; raises ``OSError`` where that cannot be told."""
    if CRIO_LISTENS.search(UNIX_SOCKETS.read_text(errors="replace")):
        yield note(
            "CRI-O runs on this node: it makes the fixed host ports of its pods itself",
            "It sends no plugin any mapping, whatever disable_hostport_mapping says. Nothing is broken: these host"
            " ports work without hostport, which does nothing for them and does not list them. Dynamic host ports are"
            f" hostport's here too: a pod asks for them by its annotation {REQUEST}.",
            "To see them: nft list ruleset, in the tables crio-hostports; with an older CRI-O, iptables -t nat -S.",
        )
