"""The end of an attachment: what was found of it is removed, and that it was deleted is noted, whatever was found."""

from __future__ import annotations

from cni_hostport.errors import NFTError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni_hostport.lookup import Held, Lookup
    from cni_hostport.ownership import Log


def remove(lookup: Lookup, key: str, held: Held, log: Log) -> None:
    """Remove what was found of an attachment, note that, and forget the flows to it.

    Raises ``CNIError`` with code 11 if too many races were lost, and ``NFTError`` if nftables refuses.
    """
    if not lookup.remove(key, held):
        from cni_hostport import ownership
        from cni_hostport.kernel.nft import Nft

        ownership.release(Nft(), key, log)
        return
    if held.pods and held.ports:
        from cni_hostport.kernel import conntrack

        conntrack.forget_to(held.pods, held.ports, log)
    if held.interface:
        from cni_hostport.kernel import localnet

        localnet.close(lookup, held.interface, log)


def note(lookup: Lookup, key: str) -> None:
    """Note that an attachment was deleted of which nothing was found."""
    if lookup.note_deleted(key):
        return
    from contextlib import suppress

    from cni_hostport.kernel.nft import Nft
    from cni_hostport.ruleset.base import deletion_note_commands, table_command

    with suppress(NFTError):  # where there can be no table, nothing can be restored either
        Nft().run([table_command(), *deletion_note_commands(key)])
