"""ADD of a container that has something to map: its ports are claimed, then what follows from that is done."""

from __future__ import annotations

from contextlib import suppress

from cni_hostport import ownership, portmap
from cni_hostport.errors import CNIError, Code
from cni_hostport.kernel.nft import Nft
from cni_hostport.lookup import Lookup
from cni_hostport.skel import AFTERWARDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni_hostport.attachment import Attachment
    from cni_hostport.log import Log
    from cni_hostport.ruleset.plan import Plan, Request


def install(request: Request, attachment: Attachment, log: Log) -> None:
    """Install what a container asks for.

    Raises ``CNIError`` and ``NFTError``: then nothing is installed.
    """
    nft = Nft()
    held = _claim(nft, request, attachment, log)
    if nft.crash:
        log(f"{nft.crash} on the sets of other tables, and was used without them: 'hostport doctor' says on which")
    try:
        _follow_up(nft, held, log, AFTERWARDS.append)
        if request.blocks:
            _tell_pod(attachment, request, held, log, AFTERWARDS.append)
    except BaseException:
        with suppress(Exception):  # the first error is the one to report; the runtime calls DEL after it
            ownership.release(nft, attachment.key, log)
        raise
    by_number = held.without({forward: "" for forward in held.forwards if forward.request})
    if not by_number.forwards:
        return  # no program listens on a port that was picked
    try:
        from cni_hostport.kernel import listeners

        listeners.tell(attachment, by_number, log)
    except Exception as error:  # noqa: BLE001 - all is installed: no message is worth a failure
        log(f"programs of this node that listen on these host ports were not looked for: {error}")


def _claim(nft: Nft, request: Request, attachment: Attachment, log: Log) -> Plan:
    """Claim the ports, and wait for them if their holders may be on their way out; return the plan that is in force."""

    def attempt() -> Plan:
        lookup = Lookup()
        lookup.leave_open()
        portmap_rules = portmap.Rules(lookup)

        def claim(plan: Plan) -> Plan:
            if portmap_rules.may_exist():
                from cni_hostport.migration import removal

                removal.make_room(portmap_rules, attachment, plan, log)
            return ownership.claim(nft, attachment, plan, log)

        if not request.blocks:
            return claim(request.plan())
        from cni_hostport.dynamic_ports import allocation

        def release() -> None:
            ownership.release(nft, attachment.key, log)

        return allocation.claim(nft, lookup, request, attachment, install=claim, release=release)

    try:
        return attempt()
    except CNIError as refusal:
        if refusal.code != Code.PORT_TAKEN:
            raise
        from cni_hostport import port_wait

        return port_wait.claim(attempt, refusal, attachment, request.config.wait_for_holder, log)


def _follow_up(nft: Nft, plan: Plan, log: Log, leave: Callable[[Callable[[], None]], None]) -> None:
    """Do what an installed plan needs besides its rules; ``leave`` takes what need not be done before the answer.

    Raises ``CNIError`` with ``Code.HOST_SETTING`` if ``route_localnet`` cannot be set.
    """
    from cni_hostport.kernel import conntrack, localnet

    localnet.open_for(plan, log)
    udp = plan.limited_to("udp")
    if udp.forwards:  # their clients may be sending right now
        conntrack.forget_elsewhere([udp], lambda: nft.installed().given_ports, log, conntrack.CLIENTS)
    if plan.forwards:
        leave(lambda: conntrack.forget_the_rest(plan, log))


def _tell_pod(
    attachment: Attachment, request: Request, plan: Plan, log: Log, leave: Callable[[Callable[[], None]], None]
) -> None:
    """Leave a pod's dynamic host ports where the pod, and whoever restores them, find them."""
    from cni_hostport.dynamic_ports import note, pod_files

    pod_files.write(attachment.pod_id, plan.assigned, log)
    note.write(attachment, request.blocks, plan.assigned, log)
    # others may have written at the same time, for another attachment of the pod
    leave(lambda: pod_files.keep(Lookup(), [attachment.pod_id], log, plan.assigned))
