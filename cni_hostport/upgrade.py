"""A table that another version of this plugin declared, put into the form that it has now."""

from _socket import if_nameindex
from contextlib import suppress

from cni_hostport.errors import CNIError, Code, ExistsError, NotFoundError
from cni_hostport.kernel import interfaces, localnet, routes
from cni_hostport.kernel.nft import Nft
from cni_hostport.names import FAMILY, LOCALNET, POD_MAPS, PODS, TABLE
from cni_hostport.ruleset.base import BASE_CHAINS, base_commands
from cni_hostport.ruleset.commands import guard_commands
from cni_hostport.ruleset.installed import Installed


def declare_again(nft: Nft) -> None:
    """Put what another version of this plugin declared in the form that it has now, in one transaction.

    Nothing is done where others were faster, or deleted an attachment meanwhile: what needs the declarations then finds
    them either way, and comes back. Raises ``NFTError`` if nftables refuses it for another reason, and ``CNIError``
    with code 102 if it cannot be told which interfaces are to be guarded.
    """
    installed = nft.installed()
    try:
        guards = _guards(nft, installed)
    except OSError as error:
        reason = f"cannot tell which interfaces route 127.0.0.0/8: {error.strerror}"
        raise CNIError(Code.HOST_SETTING, reason) from error
    with suppress(NotFoundError, ExistsError):
        nft.run([*_declarations(installed), *guards])


def _guards(nft: Nft, installed: Installed) -> list[str]:
    """Return the commands that guard the interfaces which an older version opened for its attachments.

    It guarded all there are, and closed none with the last attachment: a bridge that is open stays guarded, until the
    next last one goes.
    """
    commands = []
    if installed.chains and not nft.listing(f"set {FAMILY} {TABLE} {LOCALNET}"):
        for interface, _ in if_nameindex():
            if localnet.is_open(interface) and interfaces.kind(interface) == "bridge":
                commands += guard_commands(interface, opens=True)
    for element in installed.elements:
        if element.map == PODS[4] and element.address and element.holder and element.holder not in installed.interfaces:
            with suppress(routes.NoRouteError):
                route = routes.route_to(element.address)
                if route.prefix_length and localnet.is_open(route.interface):
                    # refused if the attachment has gone meanwhile
                    there = f"{element.key} : goto {element.chain}"
                    commands.append(f"add element {FAMILY} {TABLE} {element.map} {{ {there} }}")
                    commands += guard_commands(route.interface, opens=True, needed_by=element.holder)
    return commands


def _declarations(installed: Installed) -> list[str]:
    """Return the commands that make the declarations anew, with all that leads from them to attachments.

    None if there is no table.
    """
    if not installed.chains:
        return []
    there = [name for name in BASE_CHAINS if name in installed.chains]
    commands = [f"flush chain {FAMILY} {TABLE} {name}" for name in there]
    # by handle: whoever made one anew meanwhile may have put in what is not in this listing
    hooked = [name for name in there if BASE_CHAINS[name][0]]
    commands += [f"delete chain {FAMILY} {TABLE} handle {installed.chains[name]}" for name in hooked]
    commands += [f"delete set {FAMILY} {TABLE} handle {handle}" for handle in installed.outdated.values()]
    commands += base_commands()
    led = dict[str, list[str]]()
    for element in installed.elements:
        if element.holder and element.map in installed.outdated:
            comment = element.network if element.map in POD_MAPS else element.owner.comment()
            told = f' comment "{comment}"' if comment.strip() else ""
            led.setdefault(element.map, []).append(f"{element.key}{told} : goto {element.chain}")
    return commands + [f"add element {FAMILY} {TABLE} {name} {{ {', '.join(of)} }}" for name, of in led.items()]
