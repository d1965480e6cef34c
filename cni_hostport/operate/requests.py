"""What containers asked for, by the calls that are in libcni's cache: whose they are, and what they want installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport import plugin
from cni_hostport.attachment import pod_name
from cni_hostport.kernel import namespaces

if TYPE_CHECKING:
    from cni_hostport.ruleset.plan import Plan
    from cni_hostport.skel import Call


def container(call: Call) -> str:
    """Name the container of a call by its pod, or by its ID where the pod is not known."""
    pod = pod_name(call.args)
    return f"pod {pod}" if pod else f"container {call.container_id}"


def attachment(call: Call) -> str:
    """Name the attachment of a call, as in ``pod shop/web (eth0, network pods)``."""
    return f"{container(call)} ({call.ifname}, network {call.network})"


def plan(call: Call) -> tuple[Plan | None, str]:
    """Return what a call's attachment wants installed, ``None`` if that is nothing; or ``None`` and why it is gone.

    Raises ``CNIError`` if its plan cannot be made, or it cannot be told whether it is there.
    """
    interface = namespaces.pod_interface(call.netns, call.ifname)
    if interface.why_gone:
        return None, interface.why_gone
    wanted = plugin.plan_of(call)
    if wanted is None or not wanted.forwards:
        return None, ""
    absence = interface.why_lost(wanted.masquerade)
    return (None, absence) if absence else (wanted, "")
