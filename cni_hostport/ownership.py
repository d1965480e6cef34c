"""Who holds a host port: claiming ports, taking over from holders that are gone, letting go.

Every change is one transaction that fails if what it was built from is no longer true; then it is built again.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from cni_hostport import conntrack, host, ruleset
from cni_hostport.attachment import SHORT_ID, Attachment, Owner
from cni_hostport.errors import CNIError, Code, NFTError, NotFoundError, UnavailableError
from cni_hostport.installed import Element, Installed
from cni_hostport.nft import Nft
from cni_hostport.plan import Plan
from cni_hostport.table import POD_MAPS, PORT_MAPS, base, deleted, note_deleted

ATTEMPTS = 12  # each but the last was lost against somebody else's success
LONGEST_PAUSE = 0.05  # seconds
LONGEST_QUOTE = 250  # characters of a refused command, which can hold thousands of mappings

Log = Callable[[str], None]


def claim(nft: Nft, attachment: Attachment, plan: Plan, log: Log) -> Plan:
    """Install a plan, in the place of the same attachment's older one and of holders that are gone.

    Returns what of the plan is installed: ports that another attachment of the same container holds stay with that.
    Raises ``CNIError``: code 100 if another container that lives holds one of the ports, 11 if too many races were
    lost; and ``NFTError`` if nftables refuses the rules.
    """
    own, leaving, installed = plan, dict[str, str](), Installed((), {})
    for attempt in range(ATTEMPTS):
        commands = [command for holder in leaving for command in installed.detach(holder)]
        if own.forwards:
            commands += install(attachment, own, "add")
        try:
            nft.run(commands)
        except NFTError as error:
            if error.of_other_declarations:
                declare_again(nft)
            elif not error.may_be_a_race:
                raise
            refusal = error
        else:
            break
        pause(attempt)
        installed = nft.installed()
        own = unshared(installed, attachment, plan)
        leaving = _leaving(nft, installed, attachment, own, newest=True)
    else:
        raise lost_races(refusal)
    for forward in plan.forwards:
        if forward not in own.forwards:
            log(f"host port {forward} stays with another attachment of {attachment.container_id}")
    _take_over(attachment, own, leaving, installed, log)
    return own


def declare_again(nft: Nft) -> None:
    """Put the maps that another version of this plugin declared in the form that they have now, in one transaction.

    Nothing is done where others were faster, or deleted an attachment meanwhile: what needs the maps then finds them
    either way, and comes back. Raises ``NFTError`` if nftables refuses it for another reason.
    """
    with suppress(NotFoundError):
        nft.run(nft.installed().declared_again())


def run_on_base(nft: Nft, commands: list[str]) -> None:
    """Declare the base and run commands, in one transaction.

    Raises ``CNIError`` with code 11 if too many races were lost, and ``NFTError`` if nftables refuses.
    """
    for _ in range(ATTEMPTS):
        try:
            return nft.run([*base(), *commands])
        except NFTError as error:
            if not error.of_other_declarations:
                raise
            refusal = error
        declare_again(nft)
    raise lost_races(refusal)


def reinstate(nft: Nft, attachment: Attachment, plan: Plan, seen: Installed, log: Log) -> Plan:
    """Install once more what an attachment had, in the place of what is left of it and of holders that are gone.

    Returns what of the plan is installed, as ``claim`` does, but takes nothing from containers that live, their
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
    """Return what of a plan can be installed once more, who has to make room for it and why, and the commands.

    Raises ``CNIError`` with code 100 if a container that lives is in the way.
    """
    own = unshared(seen, attachment, plan)
    leaving = _leaving(nft, seen, attachment, own, newest=False)
    commands = [command for holder in leaving for command in seen.detach(holder)]
    return own, leaving, commands + (install(attachment, own, "create") if own.forwards else [])


def _take_over(attachment: Attachment, own: Plan, leaving: dict[str, str], installed: Installed, log: Log) -> None:
    """Say whose place was taken, and forget the flows to those."""
    wanted = {ruleset.port_key(forward) for forward in own.forwards}
    for holder, reason in leaving.items():
        if reason:
            announce(log, f"{reason}; container {attachment.container_id} ({attachment.ifname}) takes over")
        gone = [element for element in installed.of(holder) if reason or (element.map, element.key) not in wanted]
        _forget_flows(gone, log)


def install(attachment: Attachment, plan: Plan, verb: str) -> list[str]:
    """Return the commands that install an attachment, which is then no longer among the deleted ones.

    With the verb ``create`` they fail if it is among them.
    """
    key = attachment.key
    return [*base(), deleted(verb, key), deleted("delete", key), *ruleset.attach(attachment, plan)]


def unshared(installed: Installed, attachment: Attachment, plan: Plan) -> Plan:
    """Return the plan without the ports that another attachment of the same container holds.

    A runtime publishes a container's ports on each of its networks; the first one has them.
    """
    shared = {
        (element.map, element.key)
        for element in installed.elements
        if element.holder != attachment.key and element.owner.is_beside(attachment)
    }
    return plan.without({forward for forward in plan.forwards if ruleset.port_key(forward) in shared})


def _leaving(nft: Nft, installed: Installed, attachment: Attachment, plan: Plan, *, newest: bool) -> dict[str, str]:
    """Return the holders that have to make room, each with the reason, which is empty for the attachment itself.

    A pod's address belongs to its ``newest`` attachment, even if another one lives. Raises ``CNIError`` with code 100
    if one lives that does not have to make room.
    """
    key = attachment.key
    leaving = {key: ""} if key in installed.holders else {}
    # a process that does not see the runtime's namespaces, its own container's among them, would find everybody dead
    may_judge = host.is_namespace(attachment.netns)

    def is_gone(owner: Owner) -> bool:
        return may_judge and bool(owner.netns) and host.is_gone(owner.netns)

    by_place = {(element.map, element.key): element for element in installed.elements}
    for pod_ip in plan.masquerade:
        element = by_place.get((f"pods_ip{pod_ip.version}", str(pod_ip)))
        if element and element.holder not in {"", key}:
            owner = installed.owner_of(element.holder)
            if not newest and not is_gone(owner):
                raise CNIError(Code.PORT_TAKEN, f"pod address {pod_ip} is that of {_who(owner)}")
            leaving[element.holder] = f"pod address {pod_ip} was that of {_who(owner)}"
    for forward in plan.forwards:
        element = by_place.get(ruleset.port_key(forward))
        if element is None or element.holder in leaving:
            continue
        owner = element.owner
        if not (element.holder and is_gone(owner)):
            pod = nft.pod_name(element.holder)
            whose = f"pod {pod}, {_who(owner)}" if pod else _who(owner)
            raise CNIError(Code.PORT_TAKEN, f"host port {forward} is taken by {whose}")
        leaving[element.holder] = (
            f"host port {forward} was held by {_who(owner)}, whose namespace {owner.netns} is gone"
        )
    return leaving


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
            nft.run([*commands, *note_deleted(key)])
        except NFTError as error:
            if not error.may_be_a_race:
                raise
            refusal = error
            pause(attempt)
        else:
            _forget_flows(installed.of(key), log)
            return
    raise lost_races(refusal)


def _forget_flows(elements: Iterable[Element], log: Log) -> None:
    ports = [element.place for element in elements if element.map in PORT_MAPS]
    pods = [element.address.packed for element in elements if element.map in POD_MAPS and element.address]
    if ports and pods:
        conntrack.forget_to(pods, ports, log)


def refused(error: NFTError) -> CNIError:
    """Translate what nftables will not take, or that it cannot be used at all."""
    if isinstance(error, UnavailableError):
        return CNIError(Code.RULESET_REFUSED, str(error))
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
    syslog.syslog(syslog.LOG_NOTICE, line)
