"""libnftables in this process. The only importer of ``nftables``.

It reads the sets of all tables before it runs a transaction, and up to version 1.1.1 crashes on those that 1.1.3 and
later have declared with ``type``. These can be kept from it: it then knows only of sets that the transaction itself
declares. Until version 1.1.0 it reads all chains as well. It needs them to list, to rename a chain, and for a rule that
is named by its place (without them it asks for ever); no transaction here does that, and none is told of chains.
"""

from __future__ import annotations

import os
from contextlib import suppress

from cni_hostport.errors import UnavailableError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    Answer = tuple[int, bytes, bytes]  # status, output, errors

LIBRARY = "libnftables.so.1"
JSON, HANDLES, STATELESS = "json", "handle", "stateless"  # kinds of output, in the binding's words
# databases of nsswitch.conf(5) by which libnftables looks names up
DATABASES = ("group", "hosts", "networks", "passwd", "protocols", "services")
NFT_CTX_INPUT_NO_DNS = 1  # nftables/libnftables.h, since 1.0.8


class Context:
    """A libnftables context in this process, bound for good to the network namespace in which it was made."""

    def __init__(self) -> None:
        """Open it; raises ``UnavailableError`` where there is no libnftables, or none that can be used."""
        try:
            from ctypes import CDLL

            import nftables

            from cni_hostport.kernel.library_socket import make_room_for_refusals

            library = CDLL(LIBRARY)  # without it, the binding's destructor would write a traceback to stderr
            first_unused = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
            os.close(first_unused)
            self._context = nftables.Nftables()
        except Exception as error:  # an installation can be broken in every way
            raise UnavailableError(
                [(f"libnftables cannot be used: {str(error) or type(error).__name__}", "")]
            ) from error
        self._netlink, self._output = first_unused, set[str]()
        self._is_known = make_room_for_refusals(self._netlink)
        # a host name in a condition must not ask whoever answers for names: what it means would be theirs to say
        look_names_up_in("files", *DATABASES)
        with suppress(AttributeError):
            library.nft_ctx_input_set_flags(self._context._Nftables__ctx, NFT_CTX_INPUT_NO_DNS)  # noqa: SLF001 - the binding has no word for it

    def ask(self, command: bytes, output: Collection[str], *, without_sets: bool = False) -> Answer:
        """Run a command, for these kinds of output; libnftables then knows no sets but those it declares."""
        for kind in self._output.symmetric_difference(output):
            getattr(self._context, f"set_{kind}_output")(kind in output)
        self._output = set(output)
        from cni_hostport.kernel.library_socket import NEWCHAIN, NEWSET

        kinds = [NEWSET] if without_sets else []
        if self._is_known and not command.startswith(b"list "):
            answer = self._run_without(command, [*kinds, NEWCHAIN])
            if answer and not answer[0]:
                return answer
            # what it makes of a refusal can depend on the chains that it knows
        answer = self._run_without(command, kinds)
        if not answer:
            raise OSError(0, "libnftables has no socket yet")
        return answer

    def _run_without(self, command: bytes, kinds: Sequence[int]) -> Answer | None:
        """Run a command while libnftables is not told of these kinds of objects, ``None`` where that cannot be."""
        from cni_hostport.kernel.library_socket import leave_out

        try:
            if kinds:
                leave_out(self._netlink, kinds)
        except OSError:
            return None
        try:
            return self._context.cmd(command)  # type: ignore[no-any-return]
        finally:
            if kinds:
                leave_out(self._netlink, [])


def look_names_up_in(sources: str, *databases: str) -> None:
    """Have the C library look names of these databases up in these sources alone, from now on.

    Both are those of nsswitch.conf(5). With ``files`` and ``dns`` no library is loaded for that, nor with another C
    library than glibc.
    """
    from ctypes import CDLL

    with suppress(AttributeError):
        for database in databases:
            CDLL(None)["__nss_configure_lookup"](database.encode(), sources.encode())
