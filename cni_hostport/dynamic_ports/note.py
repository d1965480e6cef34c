"""The note on a pod's own interface of the host ports that it has: ``hostport 80/tcp=40017 9000-9002/udp=40100``.

It is in the pod's network namespace, and so outlives the node's ruleset and ends with the pod. From it, ``hostport
restore`` knows which ports a pod had. The pod itself sees it in ``/sys/class/net/eth0/ifalias``. The first host port of
a block of neighbours stands for all. Where that is too long, the host ports alone are noted, in the order in which they
are asked for: ``hostport 40017,40100``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport.dynamic_ports.request import named, parse
from cni_hostport.kernel import interfaces, netns

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cni_hostport.attachment import Attachment
    from cni_hostport.dynamic_ports.assignment import Assigned
    from cni_hostport.dynamic_ports.ranges import PortRange
    from cni_hostport.dynamic_ports.request import Block
    from cni_hostport.log import Log

MARK = "hostport "  # what a note of this plugin begins with


def write(attachment: Attachment, blocks: Iterable[Block], assigned: Mapping[str, int], log: Log) -> None:
    """Put the note onto an attachment's interface, and say where that fails: the pod has its ports all the same."""
    firsts = [(named(block), assigned[str(block[0])]) for block in blocks if str(block[0]) in assigned]
    text = MARK + " ".join(f"{name}={port}" for name, port in firsts)
    if len(text) > interfaces.LONGEST_ALIAS:
        text = MARK + ",".join(str(port) for _, port in firsts)
    try:
        with netns.inside(attachment.netns):
            index, present = interfaces.index_and_alias(attachment.ifname)
            if present and not present.startswith(MARK):
                reason = f"somebody else has put a note there: {present}"
            elif len(text) > interfaces.LONGEST_ALIAS:
                interfaces.set_alias(index, "")  # an older note is no longer true
                reason = f"it would be longer than {interfaces.LONGEST_ALIAS} bytes"
            else:
                interfaces.set_alias(index, text)
                return
    except (OSError, ValueError) as error:
        reason = str(error)
    log(f"the dynamic host ports of {attachment.container_id} are not noted on {attachment.ifname}: {reason}")


def read(alias: str, blocks: Iterable[Block], ranges: Sequence[PortRange]) -> Assigned:
    """Return those host ports in an interface's note that are in ranges; of what is no such note, none.

    ``blocks`` are what its container asks for.
    A pod that may change its network can write there what it likes: it gets no port that the network does not give.
    """
    items = alias.removeprefix(MARK).split(" ") if alias.startswith(MARK) else []
    if len(items) == 1 and "=" not in items[0]:
        items = [f"{named(block)}={port}" for block, port in zip(blocks, items[0].split(","), strict=False)]
    found: Assigned = {}
    for item in items:
        request, _, port = item.rpartition("=")
        try:
            [block] = parse(request)
            ports = range(int(port), int(port) + len(block))
        except ValueError:
            continue
        if any(first <= ports[0] and ports[-1] <= last for first, last in ranges):
            found |= {str(asked): port for asked, port in zip(block, ports, strict=True)}
    return found
