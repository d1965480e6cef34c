"""Who holds a host port: claiming ports, taking over from holders that are gone, letting go.

Every change is one transaction that fails if what it was built from is no longer true; then it is built again.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from cni_hostport.attachment import SHORT_ID, Attachment
from cni_hostport.errors import LONGEST_QUOTE, CNIError, Code, NFTError, NotFoundError, PortTakenError, UnavailableError
from cni_hostport.kernel import conntrack, ipvs, localnet, presence
from cni_hostport.kernel.nft import Nft
from cni_hostport.lookup import Lookup
from cni_hostport.names import POD_MAPS, PODS, PORT_MAPS, interface_in, network_in
from cni_hostport.ruleset.base import base_commands, deleted_command, deletion_note_commands
from cni_hostport.ruleset.commands import attach_commands, guard_commands, map_and_key
from cni_hostport.ruleset.comment import Owner
from cni_hostport.ruleset.installed import Element, Installed
from cni_hostport.ruleset.plan import Forward, Plan
from cni_hostport.text import escaped

ATTEMPTS = 12  # each but the last was lost against somebody else's success
LONGEST_PAUSE = 0.05  # seconds

Log = Callable[[str], None]


def claim(nft: Nft, attachment: Attachment, plan: Plan, log: Log) -> Plan:
    """Install a plan, in the place of the same attachment's older one and of holders that are gone.

    Returns what of the plan is in force: for ports that another attachment of the same container holds, this one waits.
    Raises ``CNIError``: code 100 if another container that lives holds one of the ports, 11 if too many races were
    lost; and ``NFTError`` if nftables refuses the rules.
    """
    presence.note(attachment)
    holders, leaving, installed = dict[Forward, str](), dict[str, str](), Installed((), {})
    for attempt in range(ATTEMPTS):
        try:
            nft.run(_replace(installed, leaving, attachment, plan, holders, verb="add"))
        except NFTError as error:
            if error.of_other_declarations:
                from cni_hostport import upgrade

                upgrade.declare_again(nft)
            elif not error.may_be_a_race:
                raise
            refusal = error
        else:
            # the kernel does not let a chain go for which somebody waits; but it may have let go of a port before
            if not holders or holders == shared(nft.installed(), attachment, plan):
                break
            refusal = NotFoundError([("the port has another holder", "")])
        pause(attempt)
        installed = nft.installed()
        holders = shared(installed, attachment, plan)
        leaving = _leaving(nft, installed, attachment, plan.without(holders), newest=True)
    else:
        raise lost_races(refusal)
    for forward in holders:
        log(f"host port {forward} stays with another attachment of {attachment.container_id}")
    own = plan.without(holders)
    _take_over(attachment, own, leaving, installed, log)
    return own


def _replace(
    installed: Installed,
    leaving: Mapping[str, str],
    attachment: Attachment,
    plan: Plan,
    holders: Mapping[Forward, str],
    *,
    verb: str,
) -> list[str]:
    """Return the commands that install an attachment in the place of those that leave."""
    wanted = {map_and_key(forward) for forward in plan.forwards if forward not in holders}
    return [
        *installed.detach(*leaving, wanted=wanted),
        *install(attachment, plan, holders, verb),
        *installed.wait_again(attachment.key, leaving, wanted),
    ]


def run_on_base(nft: Nft, commands: list[str]) -> None:
    """Declare the base and run commands, in one transaction.

    Raises ``CNIError`` with code 11 if too many races were lost, and ``NFTError`` if nftables refuses.
    """
    for _ in range(ATTEMPTS):
        try:
            return nft.run([*base_commands(), *commands])
        except NFTError as error:
            if not error.of_other_declarations:
                raise
            refusal = error
        from cni_hostport import upgrade

        upgrade.declare_again(nft)
    raise lost_races(refusal)


def reinstate(nft: Nft, attachment: Attachment, plan: Plan, seen: Installed, log: Log) -> Plan:
    """Install once more what an attachment had, in the place of what is left of it and of holders that are gone.

    Returns what of the plan is in force, as ``claim`` does, but takes nothing from containers that live, their
    addresses included, and is one attempt: raises ``NFTError`` if anything is not as it was ``seen``, and if the
    attachment was deleted.
    """
    own, leaving, commands = reinstatement(nft, attachment, plan, seen)
    nft.run(commands)
    _take_over(attachment, own, leaving, seen, log)
    return own


def reinstatement(
    nft: Nft, attachment: Attachment, plan: Plan, seen: Installed
) -> tuple[Plan, dict[str, str], list[str]]:
    """Return what of a plan would be in force once more, who has to make room for it and why, and the commands.

    Raises ``CNIError`` with code 100 if a container that lives is in the way.
    """
    presence.note(attachment)
    holders = shared(seen, attachment, plan)
    own = plan.without(holders)
    leaving = _leaving(nft, seen, attachment, own, newest=False)
    return own, leaving, _replace(seen, leaving, attachment, plan, holders, verb="create")


def _take_over(attachment: Attachment, own: Plan, leaving: dict[str, str], installed: Installed, log: Log) -> None:
    """Say whose place was taken, and forget the flows to those."""
    wanted = {map_and_key(forward) for forward in own.forwards}
    for holder, reason in leaving.items():
        if reason:
            announce(log, f"{reason}; container {attachment.container_id} ({attachment.ifname}) takes over")
        gone = [element for element in installed.of(holder) if reason or (element.map, element.key) not in wanted]
        _forget_flows(gone, log)
    _close_localnet(installed, leaving, log)


def install(attachment: Attachment, plan: Plan, holders: Mapping[Forward, str], verb: str) -> list[str]:
    """Return the commands that install an attachment, which is then no longer among the deleted ones.

    With the verb ``create`` they fail if it is among them. ``holders`` are as for ``attach_commands``.
    """
    key = attachment.key
    commands = [*base_commands(), deleted_command(verb, key), deleted_command("delete", key), *ipvs.fill()]
    if plan.local_route_to and plan.interface:
        # what is restored was open before, by this plugin unless somebody else needs it for the same containers
        opens = verb == "create" or not localnet.is_open(plan.interface)
        commands += guard_commands(plan.interface, opens=opens, needed_by=key)
    return [*commands, *attach_commands(attachment, plan, holders)]


def shared(installed: Installed, attachment: Attachment, plan: Plan) -> dict[Forward, str]:
    """Return the forwards whose port another attachment of the same container has, with that one's key.

    A runtime publishes a container's ports on each of its networks; the first one has them, unless it is the former
    holder of the same address.
    """
    places = {(PODS[pod_ip.version], str(pod_ip)) for pod_ip in plan.masquerade}
    former = {element.holder for element in installed.elements if (element.map, element.key) in places}
    holders = {
        (element.map, element.key): element.holder
        for element in installed.elements
        if element.holder not in {"", attachment.key, *former} and element.owner.is_beside(attachment)
    }
    keys = {forward: map_and_key(forward) for forward in plan.forwards}
    return {forward: holders[key] for forward, key in keys.items() if key in holders}


def _leaving(nft: Nft, installed: Installed, attachment: Attachment, plan: Plan, *, newest: bool) -> dict[str, str]:
    """Return the holders that have to make room, each with the reason, which is empty for the attachment itself.

    A pod's address belongs to its ``newest`` attachment, even if another one lives: on the same network, whose IPAM
    says whose it is now, or of the same container. Raises ``CNIError`` with code 100 if one lives that does not have to
    make room.
    """
    key = attachment.key
    leaving = {key: ""} if key in installed.holders or key in installed.interfaces else {}

    view = presence.View()

    def is_gone(owner: Owner, view: presence.View | None = None) -> bool:
        # a process that does not see the runtime's namespaces, such as its own container's, would find everybody dead
        return bool(attachment.identity) and (view or presence.View()).is_gone(owner)

    by_place = {(element.map, element.key): element for element in installed.elements}
    for pod_ip in plan.masquerade:
        element = by_place.get((PODS[pod_ip.version], str(pod_ip)))
        if element and element.holder not in {"", key}:
            owner = installed.owner_of(element.holder)
            has_moved = newest and (network_in(element.holder) == network_in(key) or owner.is_beside(attachment))
            if not has_moved and not is_gone(owner, view):
                raise CNIError(
                    Code.PORT_TAKEN,
                    f"pod address {pod_ip} is that of {_whose(nft, element.holder, owner)}"
                    f" on network {element.network or network_in(element.holder)}; container"
                    f" {attachment.container_id} ({attachment.ifname}) on network {attachment.network} cannot have it",
                )
            leaving[element.holder] = f"pod address {pod_ip} was that of {_who(owner)}"
    for forward in plan.forwards:
        element = by_place.get(map_and_key(forward))
        if element is None:
            continue
        # who waits for it would get it from a holder that leaves
        heirs = [] if element.holder == key else installed.heirs(element, leaving)
        for holder, owner in ((element.holder, element.owner), *((heir.waiter, heir.owner) for heir in heirs)):
            if holder in leaving:
                continue
            if not (holder and is_gone(owner, view)):
                msg = f"host port {forward} is taken by {_whose(nft, holder, owner)}"
                raise PortTakenError(msg, element, partial(is_gone, owner))
            leaving[holder] = f"host port {forward} was held by {_who(owner)}, whose namespace {owner.netns} is gone"
    return leaving


def _whose(nft: Nft, holder: str, owner: Owner) -> str:
    pod = nft.pod_name(holder)
    return f"pod {pod}, {_who(owner)}" if pod else _who(owner)


def _who(owner: Owner) -> str:
    return f"container {owner.container_id[:SHORT_ID]} ({owner.ifname})"


def release(nft: Nft, key: str, log: Log, seen: Installed | None = None) -> None:
    """Remove all of an attachment's; nothing being there is success. ``seen`` spares the first listing.

    Raises ``CNIError`` with code 11 if too many races were lost, and ``NFTError`` if nftables refuses.
    """
    for attempt in range(ATTEMPTS):
        installed = seen or nft.installed()
        seen = None
        commands = installed.detach(key)
        if not commands:
            return
        try:
            nft.run([*commands, *deletion_note_commands(key)])
        except NFTError as error:
            if not error.may_be_a_race:
                raise
            refusal = error
            pause(attempt)
        else:
            _forget_flows(installed.of(key), log)
            _close_localnet(installed, [key], log)
            return
    raise lost_races(refusal)


def _close_localnet(installed: Installed, leaving: Iterable[str], log: Log) -> None:
    """Close the interfaces towards attachments that have left, where no other needs them."""
    chains = {installed.interfaces[key] for key in leaving if key in installed.interfaces}
    for chain in chains:
        localnet.close(Lookup(kept=True), interface_in(chain), log)


def _forget_flows(elements: Iterable[Element], log: Log) -> None:
    ports = [element.place for element in elements if element.map in PORT_MAPS]
    pods = [element.address.packed for element in elements if element.map in POD_MAPS and element.address]
    if ports and pods:
        conntrack.forget_to(pods, ports, log)


def refused(error: NFTError, config: Mapping[str, object] | None = None) -> CNIError:
    """Translate what nftables will not take, or that it cannot be used at all, in a call with this configuration."""
    if isinstance(error, UnavailableError):
        from cni_hostport.kernel import crashes

        return CNIError(Code.RULESET_REFUSED, crashes.explained(error, config or {}))
    first = ": ".join(error.refusals[0])
    return CNIError(Code.RULESET_REFUSED, f"nftables refused the host port rules: {first[:LONGEST_QUOTE]}", str(error))


def lost_races(error: NFTError) -> CNIError:
    """Translate a change that others were always faster than."""
    return CNIError(
        Code.TRY_AGAIN, f"the host port rules were changed by others {ATTEMPTS} times in a row; try again", str(error)
    )


def pause(attempt: int) -> None:
    """Wait a random time before the next attempt, but not before the second: there most often is no race at all."""
    if attempt:
        import random

        time.sleep(random.uniform(0, LONGEST_PAUSE))  # noqa: S311 - jitter, not a secret


def announce(log: Log, line: str) -> None:
    """Tell the operator, who may not see the stderr of a plugin that succeeded."""
    import syslog

    log(line)
    syslog.openlog("hostport", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_NOTICE, escaped(line))
