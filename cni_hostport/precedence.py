"""Which of several attachments has a host port or a pod's address: who keeps it, who waits, and who has to leave."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cni_hostport.attachment import short_id
from cni_hostport.errors import CNIError, Code, PortHeldError
from cni_hostport.kernel import presence
from cni_hostport.names import DYNAMIC, PODS, network_in
from cni_hostport.ruleset.commands import map_and_key, reservation
from cni_hostport.ruleset.comment import Owner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.attachment import Attachment
    from cni_hostport.kernel.nft import Nft
    from cni_hostport.ruleset.elements import Element
    from cni_hostport.ruleset.installed import Installed
    from cni_hostport.ruleset.plan import Forward, Plan


def shared_ports(installed: Installed, attachment: Attachment, plan: Plan) -> dict[Forward, str]:
    """Return the forwards whose port another attachment of the same container has, with the key of that attachment.

    A runtime publishes a container's ports on each of its networks. The first attachment has them, unless it is the
    former holder of the same pod address. A dynamic port is shared by those that ask for it with the same words only.
    """
    elements = installed.by_key
    pods = (elements.get((PODS[pod_ip.version], str(pod_ip))) for pod_ip in plan.masquerade)
    others = {"", attachment.key, *(pod.holder for pod in pods if pod)}
    holders = {forward: elements.get(map_and_key(forward)) for forward in plan.forwards}
    return {
        forward: element.holder
        for forward, element in holders.items()
        if element and element.holder not in others and element.owner.is_beside(attachment)
        if _asks_alike(installed, forward)
    }


def leaving_holders(
    nft: Nft, installed: Installed, attachment: Attachment, plan: Plan, *, is_newest: bool
) -> dict[str, str]:
    """Return the keys of the holders that have to leave, each with the reason, an empty one for the attachment itself.

    ``is_newest`` tells that no attachment came after this one. A pod's address belongs to the newest attachment of its
    network, because that network's IPAM gave it the address; and to the newest one of its container. Raises
    ``CNIError`` with ``PORT_TAKEN`` if a holder lives and does not have to leave.
    """
    key, view = attachment.key, presence.View()
    leaving = {key: ""} if key in installed.holders or key in installed.localnet_chains else {}
    elements = installed.by_key

    def is_gone(owner: Owner, view: presence.View | None = None) -> bool:
        # a process that does not see the runtime's namespaces, such as its own container's, would find everybody dead
        return bool(attachment.identity) and (view or presence.View()).is_gone(owner)

    for pod_ip in plan.masquerade:
        element = elements.get((PODS[pod_ip.version], str(pod_ip)))
        if element and element.holder not in {"", key}:
            owner = installed.owner(element.holder)
            is_later = is_newest and (network_in(element.holder) == network_in(key) or owner.is_beside(attachment))
            if not is_later and not is_gone(owner, view):
                raise _address_taken(nft, pod_ip, element, owner, attachment)
            leaving[element.holder] = f"pod address {pod_ip} was that of {_container(owner)}"
    for forward in plan.forwards:
        for element in in_the_way(installed, forward):
            # if the holder leaves, its port would go to an attachment that waits for it
            keeps = element.holder == key and _asks_alike(installed, forward)
            heirs = [] if keeps else installed.heirs(element, leaving)
            for holder, owner in ((element.holder, element.owner), *((heir.waiter, heir.owner) for heir in heirs)):
                if holder in leaving:
                    continue
                if not (holder and is_gone(owner, view)):
                    msg = f"host port {forward} is taken by {_pod_and_container(nft, holder, owner)}"
                    raise PortHeldError(msg, element, partial(is_gone, owner))
                namespace = f"whose namespace {owner.netns} is gone"
                leaving[holder] = f"host port {forward} was held by {_container(owner)}, {namespace}"
    return leaving


def _asks_alike(installed: Installed, forward: Forward) -> bool:
    """Tell whether a forward's port is no dynamic one, or one that was asked for with the same words."""
    reserved = installed.by_key.get(reservation(forward))
    return not reserved or reserved.request == forward.request


def in_the_way(installed: Installed, forward: Forward) -> list[Element]:
    """Return the elements whose holders keep a forward from having its port.

    A port that was asked for by its number can be that of several attachments, each for another host address. A dynamic
    one is that of one attachment alone.
    """
    key = reservation(forward)[1]
    reserved = installed.by_key.get((DYNAMIC, key))
    if forward.request or reserved:
        found = [*installed.by_reservation.get(key, ())]
        if reserved and not any(element.holder == reserved.holder for element in found):  # somebody removed the port's
            owner = installed.owner(reserved.holder)
            found.append(replace(reserved, owner=owner if owner.container_id else Owner(reserved.pod_id, "")))
        return found
    element = installed.by_key.get(map_and_key(forward))
    return [element] if element else []


def _address_taken(
    nft: Nft, pod_ip: IPv4Address | IPv6Address, element: Element, owner: Owner, attachment: Attachment
) -> CNIError:
    return CNIError(
        Code.PORT_TAKEN,
        f"pod address {pod_ip} is that of {_pod_and_container(nft, element.holder, owner)}"
        f" on network {element.network or network_in(element.holder)}; container"
        f" {attachment.container_id} ({attachment.ifname}) on network {attachment.network} cannot have it",
    )


def _pod_and_container(nft: Nft, holder: str, owner: Owner) -> str:
    pod = nft.pod_name(holder)
    return f"pod {pod}, {_container(owner)}" if pod else _container(owner)


def _container(owner: Owner) -> str:
    return f"container {short_id(owner.container_id)}" + (f" ({owner.ifname})" if owner.ifname else "")
