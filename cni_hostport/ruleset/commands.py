"""The commands that install an attachment's plan. Pure; ``installed`` reads listings back.

One table holds everything. Base chains send connections to local addresses through ``dispatch``, which looks the port
up in verdict maps: one lookup, however many ports the node has. A map element leads to the chain of the attachment that
holds the port, and that chain translates the destination.

An attachment's chain is its ownership token. One transaction creates its elements and chains, with ``create``, so that
a port has one holder. One transaction deletes them, the chain included. If two callers delete the same attachment, the
second one finds no chain, and the kernel rolls its whole transaction back: it cannot delete elements of a new holder.

Syntax is that of nftables 1.0.6 and later. Listings are read as JSON; commands are text, because 1.0.6 reads a JSON map
with a concatenated value as a set.
"""

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from cni_hostport.attachment import COMMENT_BYTES, Attachment
from cni_hostport.names import (
    ANY_ADDRESS,
    DYNAMIC,
    FAMILY,
    LOCALNET,
    LOCALNET_NEEDS,
    ONE_ADDRESS,
    OPENED,
    PODS,
    TABLE,
    address_form,
    dnat_chain,
    dynamic_comment,
    localnet_chain,
    masq_chain,
    target_map,
    waiting_map,
)
from cni_hostport.ruleset.base import PORT, base_commands, target_maps
from cni_hostport.ruleset.comment import Owner
from cni_hostport.ruleset.plan import EVERYWHERE, Forward, Plan

MAX_RULES = 16  # of one IP version; a chain of more mappings looks its port up in a map


def attach_commands(attachment: Attachment, plan: Plan, holders: Mapping[Forward, str] | None = None) -> list[str]:
    """Return the commands that install an attachment's plan; its rules have the pod's name as a comment, if known.

    ``holders`` has the forwards for which the attachment waits, with the key of the attachment that has the port now.
    The commands fail with ``ExistsError`` if the attachment is installed already, or a port or pod address has a
    holder.
    """
    holders, key = holders or {}, attachment.key
    dnat, masq = dnat_chain(key), masq_chain(key)
    commands = [f"create chain {FAMILY} {TABLE} {chain}" for chain in (dnat, masq)]
    maps, rules = _translations(plan, attachment)
    commands += [*maps, *(f"add rule {FAMILY} {TABLE} {dnat} {rule}" for rule in rules)]
    for pod_ip, sources in plan.masquerade.items():
        commands += [f"add rule {FAMILY} {TABLE} {masq} {_masquerade_rule(source)}" for source in sources]
        network = f'comment "{attachment.network[:COMMENT_BYTES]}"'
        commands.append(create_command(PODS[pod_ip.version], f"{pod_ip} {network} : goto {masq}"))
    comment = Owner.from_attachment(attachment).comment()
    by_map: dict[str, list[str]] = {}
    for forward in plan.forwards:
        name, port = map_and_key(forward)
        if forward in holders:
            by_map.setdefault(waiting_map(name), []).append(waiter_element(key, port, comment, holders[forward]))
            continue
        by_map.setdefault(name, []).append(holder_element(port, comment, key))
        if forward.request:
            label = dynamic_comment(forward.request, attachment.pod_id)
            by_map.setdefault(DYNAMIC, []).append(holder_element(reservation(forward)[1], label, key))
    return commands + [create_command(name, ", ".join(elements)) for name, elements in by_map.items()]


def guard_commands(interface: int, *, opens: bool, needed_by: str = "") -> list[str]:
    """Return the commands that guard an interface, by its index, on which an attachment needs ``route_localnet``.

    ``opens`` tells whether this plugin sets ``route_localnet`` there; ``needed_by`` is the attachment's key.
    """
    opened = f' comment "{OPENED}"' if opens else ""
    chain = localnet_chain(interface)
    commands = [
        f"add chain {FAMILY} {TABLE} {chain}",
        f"add element {FAMILY} {TABLE} {LOCALNET} {{ {interface}{opened} }}",
    ]
    return [*commands, need_command(interface, needed_by)] if needed_by else commands


def need_command(interface: int, key: str) -> str:
    """Return the command by which an attachment needs an interface that is guarded; it fails without the guard."""
    return create_command(LOCALNET_NEEDS, f"{address_form(key)} : goto {localnet_chain(interface)}")


def holder_element(port: str, comment: str, key: str) -> str:
    """Return the element that leads a port to an attachment; ``comment`` names the owner."""
    return f'{port} comment "{comment}" : goto {dnat_chain(key)}'


def waiter_element(key: str, port: str, comment: str, holder: str) -> str:
    """Return the element of an attachment that waits for a port; ``holder`` is the key of the one that has the port."""
    return f'{address_form(key)} . {port} comment "{comment}" : goto {dnat_chain(holder)}'


def create_command(name: str, elements: str) -> str:
    """Return the command that creates elements of a map; it fails if one of them exists."""
    return f"create element {FAMILY} {TABLE} {name} {{ {elements} }}"


def map_and_key(forward: Forward) -> tuple[str, str]:
    """Return the map in which a forward's port stands, and its key there as nft prints it."""
    if forward.host_ip is None:
        return ANY_ADDRESS, f"ipv{forward.version} . {forward.protocol} . {forward.host_port}"
    return ONE_ADDRESS[forward.version], f"{forward.host_ip} . {forward.protocol} . {forward.host_port}"


def reservation(forward: Forward) -> tuple[str, str]:
    """Return the map in which a forward's port stands if it is a dynamic one, and its key there."""
    return DYNAMIC, f"ipv{forward.version} . {forward.protocol} . {forward.host_port}"


def claims(forward: Forward) -> list[tuple[str, str]]:
    """Return the elements, as (map, key), that only one attachment can have: the port's, and that of a dynamic one."""
    return [map_and_key(forward), reservation(forward)] if forward.request else [map_and_key(forward)]


def exclusion_commands(forwards: Iterable[Forward]) -> list[str]:
    """Return the commands that fail if a dynamic port would be somebody else's as well, at other host addresses.

    The ports' own elements alone would allow that. A port that is asked for by its number must be nobody's dynamic one,
    and a dynamic port of one host address must be nobody's for all addresses. That a dynamic port for all is nobody's
    for one address, no command can ask: ``dynamic_ports.allocation`` looks for that afterwards.
    """
    excluded: dict[str, dict[str, None]] = {}
    for forward in forwards:
        if not forward.request or forward.host_ip:
            excluded.setdefault(ANY_ADDRESS if forward.request else DYNAMIC, {})[reservation(forward)[1]] = None
    commands = []
    for name, ports in excluded.items():
        elements = ", ".join(f"{port} : accept" for port in ports)  # for no longer than the transaction
        commands.append(create_command(name, elements))
        commands.append(f"delete element {FAMILY} {TABLE} {name} {{ {', '.join(ports)} }}")
    return commands


def _translations(plan: Plan, attachment: Attachment) -> tuple[list[str], list[str]]:
    """Return the commands that fill an attachment's own maps, and the rules that translate its connections."""
    label = f' comment "{attachment.pod}"' if attachment.pod else ""
    maps, rules = list[str](), list[str]()
    for version, family in ((4, "ip"), (6, "ip6")):
        forwards = [forward for forward in plan.forwards if forward.version == version]
        matches = " ".join((f"meta nfproto ipv{version}", *plan.conditions[version]))
        networks = ", ".join(map(str, plan.host_addresses[version]))
        limit = f" {family} daddr {{ {networks} }}" if networks else ""
        # a given host address first: in a pod's own chain too it beats any address
        for is_any in (False, True):
            group = [forward for forward in forwards if (forward.host_ip is None) == is_any]
            match = f"{matches}{limit}" if is_any else matches
            if len(forwards) > MAX_RULES and group:
                name = target_map(attachment.key, version, is_given=not is_any)
                maps += _target_map_commands(name, target_maps(attachment.key)[name], group)
                translations = [_map_translation(family, name, is_given=not is_any)]
            else:
                translations = [_translation(family, forward) for forward in group]
            rules += [f"{match} {translation}{label}" for translation in translations]
    return maps, rules


def _translation(family: str, forward: Forward) -> str:
    address = f"{family} daddr {forward.host_ip} " if forward.host_ip else ""
    pod_ip = f"[{forward.pod_ip}]" if forward.version == 6 else forward.pod_ip  # noqa: PLR2004 - IP version
    port = f"meta l4proto {forward.protocol} th dport {forward.host_port}"
    return f"{address}{port} dnat {family} to {pod_ip}:{forward.container_port}"


def _map_translation(family: str, name: str, *, is_given: bool) -> str:
    address = f"{family} daddr . " if is_given else ""
    return f"dnat {family} to {address}{PORT} map @{name}"


def _target_map_commands(name: str, declaration: str, forwards: list[Forward]) -> list[str]:
    """Return the commands that make a map of an attachment's forwards, in the place of a map that was left there.

    nftables 1.0.6 takes no rule with such a map that was there before (``conflicting protocols specified``).
    """
    elements = ", ".join(
        f"{f'{forward.host_ip} . ' if forward.host_ip else ''}{forward.protocol} . {forward.host_port}"
        f" : {forward.pod_ip} . {forward.container_port}"
        for forward in forwards
    )
    add, *_ = removal = _map_removal_commands(name, declaration)
    return [*removal, add, create_command(name, elements)]


def target_removal_commands(key: str) -> list[str]:
    """Return the commands that delete an attachment's own maps, if there are any; they fail while a rule uses one."""
    maps = target_maps(key).items()
    return [command for name, declaration in maps for command in _map_removal_commands(name, declaration)]


def _map_removal_commands(name: str, declaration: str) -> tuple[str, str]:
    # it is added first, because a map that does not exist cannot be deleted
    return f"add map {FAMILY} {TABLE} {name} {{ typeof {declaration}; }}", f"delete map {FAMILY} {TABLE} {name}"


def _masquerade_rule(source: IPv4Network | IPv6Network) -> str:
    if source == EVERYWHERE[source.version]:
        return f"meta nfproto ipv{source.version} masquerade"
    return f"{'ip' if source.version == 4 else 'ip6'} saddr {source} masquerade"  # noqa: PLR2004 - IP version


def probe_commands(conditions: dict[int, tuple[str, ...]] | None = None) -> list[str]:
    """Return commands that use every expression of this ruleset and end in one that must fail with ``NotFound``.

    The names and keys are ones that no attachment has (an impossible interface name, port 0, the unspecified address),
    so that nothing else can fail.
    """
    nowhere4, nowhere6 = IPv4Address(0), IPv6Address(0)
    plan = Plan(
        forwards=(Forward("tcp", None, 0, nowhere4, 1), Forward("udp", nowhere6, 0, nowhere6, 1)),
        masquerade={nowhere4: (EVERYWHERE[4],), nowhere6: (EVERYWHERE[6],)},
        conditions=conditions or {4: (), 6: ()},
        host_addresses={4: (IPv4Network("192.0.2.0/24"),), 6: ()},
    )
    return [
        *base_commands(),
        *attach_commands(Attachment("probe", "probe", ".."), plan),
        *guard_commands(0, opens=True, needed_by=Attachment("probe", "probe", "..").key),
        f"delete chain {FAMILY} {TABLE} {dnat_chain('cannot-exist')}",
    ]
