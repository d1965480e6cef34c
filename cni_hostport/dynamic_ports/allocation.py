"""Host ports are picked for a pod, and claimed by the transaction that installs it.

There is nothing else that allocates: a port is free if nobody has it, and it is a pod's once the kernel has created its
element, which it does once. Who was slower looks again, and takes the next port in its pod's order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport import nf_tables
from cni_hostport.dynamic_ports.picker import PORT_BYTES, OvertakenError, Picker, given
from cni_hostport.errors import NFTError, PortTakenError
from cni_hostport.names import ONE_ADDRESS
from cni_hostport.ruleset.commands import map_and_key, reservation

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from cni_hostport.attachment import Attachment
    from cni_hostport.dynamic_ports.assignment import Assigned
    from cni_hostport.dynamic_ports.picker import Port
    from cni_hostport.kernel.nft import Nft
    from cni_hostport.lookup import Lookup
    from cni_hostport.ruleset.plan import Plan, Request


def claim(
    nft: Nft,
    lookup: Lookup,
    request: Request,
    attachment: Attachment,
    *,
    install: Callable[[Plan], Plan],
    release: Callable[[], None],
) -> Plan:
    """Pick the host ports that a request lacks, install its plan, and return what ``install`` does.

    A pod that has ports already keeps them. ``release`` removes what was installed. Raises ``CNIError``:
    ``INVALID_CONFIG`` if it may not have as many, or any; ``PORT_TAKEN`` if none is free; and what ``install`` raises
    for other reasons. Nothing is installed then.
    """
    taken, may_be_new = set[tuple[str, int]](), True
    while True:
        picker = Picker(nft, lookup, request, attachment, taken)
        try:
            plan = request.plan(picker.pick(picker.present(may_be_new=may_be_new)))
        except OvertakenError:
            may_be_new = False
            continue
        dynamic = {(forward.protocol, forward.host_port) for forward in plan.forwards if forward.request}
        try:
            held = install(plan)
        except PortTakenError as refusal:
            if refusal.port not in dynamic:
                raise
            taken.add(refusal.port)
            continue
        try:
            # a mapping of one address that was installed since then has another key, which collides with nothing
            hidden = given_elsewhere(plan, given(lookup, request.pods))
        except NFTError:
            release()
            raise
        if not hidden:
            return held
        taken |= hidden
        release()  # there may be no other port


def complete(nft: Nft, lookup: Lookup, request: Request, attachment: Attachment, kept: Assigned) -> Assigned:
    """Return the host ports that are ``kept``, and free ones for what lacks; claims none.

    Raises what ``claim`` does.
    """
    return Picker(nft, lookup, request, attachment, ()).pick(kept)


def given_elsewhere(plan: Plan, given: Mapping[int, Collection[bytes]]) -> set[Port]:
    """Return those dynamic ports of an installed plan that another mapping has, for one host address."""
    own = {(name, nf_tables.packed_port(key)) for name, key in map(map_and_key, plan.forwards)}
    found = set[tuple[str, int]]()
    for forward in plan.forwards:
        name, port = ONE_ADDRESS[forward.version], nf_tables.packed_port(reservation(forward)[1])[-PORT_BYTES:]
        others = (key for key in given[forward.version] if key.endswith(port) and (name, key) not in own)
        if forward.request and any(others):
            found.add((forward.protocol, forward.host_port))
    return found
