"""Waiting for the holder of a host port that is on its way out.

A container that is deleted holds its ports until its DEL, which a runtime calls when its processes have ended: seconds
after its successor was started, when that was done at once (``kubectl delete --force``). A kubelet whose ADD is refused
tries again after 10 to 15 seconds; an ADD that waits has the port as soon as it is free. Nothing is installed or held
meanwhile, and each attempt is a whole claim from its beginning: of several that wait for one port, one gets it.
"""

from __future__ import annotations

import os
import time

from cni_hostport.errors import CNIError, Code, PortHeldError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni_hostport.attachment import Attachment
    from cni_hostport.log import Log
    from cni_hostport.lookup import Lookup
    from cni_hostport.ruleset.plan import Plan

LOOK_INTERVAL = 0.2  # seconds; a look asks the kernel for one element, however many there are
ATTEMPT_INTERVAL = 0.5  # seconds, where only an attempt, which lists everything, tells whether the port is free

# Descriptors by which another process counts this one among those at work: they are closed before it waits.
PLACES: list[int] = []


def claim(attempt: Callable[[], Plan], refusal: CNIError, attachment: Attachment, seconds: int, log: Log) -> Plan:
    """Repeat an attempt that was refused until it is not, for at most so many seconds, and return its result.

    Raises the last refusal when the time is over, or when the container that waits has itself gone; and whatever else
    an attempt raises.
    """
    from cni_hostport.kernel import presence
    from cni_hostport.ruleset.comment import Owner

    if not seconds:
        raise refusal
    while PLACES:
        os.close(PLACES.pop())
    reason, begun = refusal.msg, time.monotonic()
    presence.note(attachment)
    owner = Owner.from_attachment(attachment)  # each attempt notes anew, perhaps that nothing is there any more
    while time.monotonic() < begun + seconds:
        _wait(refusal, begun + seconds)
        if owner.identity and presence.View().is_gone(owner):
            break
        try:
            plan = attempt()
        except CNIError as error:
            if error.code != Code.PORT_TAKEN:
                raise
            refusal = error
        else:
            log(f"waited {time.monotonic() - begun:.1f} s for an end of this: {reason}")
            return plan
    raise refusal


def _wait(refusal: CNIError, until: float) -> None:
    """Wait until another attempt may succeed, at the longest until a time of the monotonic clock."""
    if not isinstance(refusal, PortHeldError):
        return _sleep(ATTEMPT_INTERVAL, until)
    from cni_hostport.lookup import Lookup
    from cni_hostport.netlink import leave_open

    lookup = Lookup()
    leave_open(lookup)
    while time.monotonic() < until:
        _sleep(LOOK_INTERVAL, until)
        if refusal.is_gone() or not _is_held(lookup, refusal):
            return None
    return None


def _is_held(lookup: Lookup, refusal: PortHeldError) -> bool:
    return lookup.chain_of(refusal.element.map, refusal.element.key) == refusal.element.chain


def _sleep(seconds: float, until: float) -> None:
    time.sleep(max(0, min(seconds, until - time.monotonic())))
