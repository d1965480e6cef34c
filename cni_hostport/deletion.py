"""The end of an attachment: what was found of it is removed, and that it was deleted is noted, whatever was found."""

from __future__ import annotations

from cni_hostport.errors import NFTError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni_hostport.log import Log
    from cni_hostport.lookup import Held, Lookup


def remove(
    lookup: Lookup, key: str, held: Held, log: Log, leave: Callable[[Callable[[], None]], None] | None = None
) -> None:
    """Remove what was found of an attachment, note that, and forget the flows to it.

    ``leave`` takes what need not be done before the answer. Raises ``CNIError`` with ``Code.TRY_AGAIN`` if too many
    races were lost, and ``NFTError`` if nftables refuses.
    """
    dynamic_ports = held.dynamic_ports
    if dynamic_ports:
        from cni_hostport.dynamic_ports import assignment, pod_files

        pod_ids = assignment.pods(lookup, dynamic_ports)
    if not lookup.remove(key, held):
        from cni_hostport import ownership
        from cni_hostport.kernel.nft import Nft

        ownership.release(Nft(), key, log)
        return
    pods, ports = held.pods, held.ports
    if pods and ports:
        from cni_hostport.kernel import conntrack

        # clients of UDP may be sending right now, and their server may answer
        at_once = [port for port in ports if port[0] == "udp"] if leave else ports
        if at_once:
            conntrack.forget_to(pods, at_once, log)
        later = [port for port in ports if port[0] != "udp"]
        if leave and later:
            leave(lambda: conntrack.forget_to_deleted(held, later, log))
    if dynamic_ports:
        pod_files.keep(lookup, pod_ids, log)
    if held.interface:
        from cni_hostport.kernel import localnet

        localnet.close(lookup, held.interface, log)


def note(lookup: Lookup, key: str) -> None:
    """Note that an attachment was deleted of which nothing was found."""
    if lookup.note_deletion(key):
        return
    from contextlib import suppress

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.ruleset.base import deletion_note_commands, table_command

    with suppress(NFTError):  # where there can be no table, nothing can be restored either
        Nft().run([table_command(), *deletion_note_commands(key)])
