"""What containers asked for, by the calls that are in libcni's cache: whose they are, and what they want installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport import plugin
from cni_hostport.attachment import pod_name
from cni_hostport.dynamic_ports import assignment, note
from cni_hostport.dynamic_ports.assignment import Assigned
from cni_hostport.kernel import namespaces
from cni_hostport.lookup import Lookup

if TYPE_CHECKING:
    from collections.abc import Callable

    from cni_hostport.attachment import Attachment
    from cni_hostport.ruleset.plan import Plan, Request
    from cni_hostport.skel import Call

    Pick = Callable[[Request, Attachment, Assigned], Assigned]


def container(call: Call) -> str:
    """Name the container of a call by its pod, or by its ID where the pod is not known."""
    pod = pod_name(call.args)
    return f"pod {pod}" if pod else f"container {call.container_id}"


def name(call: Call) -> str:
    """Name the attachment of a call, as in ``pod shop/web (eth0, network pods)``."""
    return f"{container(call)} ({call.ifname}, network {call.network})"


def plan(call: Call, pick: Pick | None = None) -> tuple[Plan | None, str]:
    """Return what a call's attachment wants installed, ``None`` if that is nothing; or ``None`` and why it is gone.

    Its dynamic host ports are those that the ruleset has for it, or else those that its interface carries a note of;
    ``pick`` is given these, and returns them with what lacks. Raises ``CNIError`` if its plan cannot be made, or it
    cannot be told whether it is there.
    """
    interface = namespaces.pod_interface(call.netns, call.ifname)
    if interface.why_gone:
        return None, interface.why_gone
    request = plugin.request_of(call)
    if request is None:
        return None, ""
    attachment, assigned = plugin.attachment_of(call), Assigned()
    if request.blocks:
        listing = assignment.Listing(Lookup(shared=True))
        noted = note.read(interface.alias, request.blocks, request.config.dynamic_ports)
        assigned = listing.assigned(attachment.pod_id) | noted | listing.held_by(attachment.key)
        assigned = pick(request, attachment, assigned) if pick else assigned
    wanted = request.plan(assigned)
    if not wanted.forwards and not request.blocks:
        return None, ""
    absence = interface.why_lost(wanted.masquerade)
    return (None, absence) if absence else (wanted, "")
