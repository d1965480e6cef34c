"""The holders of host ports: claiming ports, taking them over from holders that are gone, releasing them.

Each change is one transaction. It fails if the ruleset has changed since it was read; then it is read again.
"""

from __future__ import annotations

import time
from itertools import chain

from cni_hostport.errors import CNIError, NFTError, NotFoundError
from cni_hostport.kernel import conntrack, ipvs, localnet, presence
from cni_hostport.lookup import Lookup
from cni_hostport.names import DYNAMIC, POD_MAPS, PODS, PORT_MAPS, interface_in
from cni_hostport.precedence import leaving_holders, shared_ports
from cni_hostport.ruleset.base import base_commands, deleted_command, deletion_note_commands
from cni_hostport.ruleset.commands import (
    attach_commands,
    claims,
    exclusion_commands,
    guard_commands,
    need_command,
    reservation,
)
from cni_hostport.ruleset.installed import Installed
from cni_hostport.ruleset.plan import Forward, Plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cni_hostport.attachment import Attachment
    from cni_hostport.kernel.nft import Nft
    from cni_hostport.log import Log
    from cni_hostport.ruleset.elements import Element

ATTEMPTS = 12  # of a transaction; each that fails was lost against somebody else's success
MAX_PAUSE = 0.05  # seconds
BY_NUMBER = "by number"  # what a port is claimed as that is no dynamic one, whatever its host address: no map's name


def claim(nft: Nft, attachment: Attachment, plan: Plan, log: Log) -> Plan:
    """Install a plan. It takes the place of the attachment's older plan, and of holders that are gone.

    Returns the part of the plan that is in force: where another attachment of the same container holds a port, this one
    waits for the port. Raises ``CNIError`` with ``PORT_TAKEN`` if another container that lives holds one of the ports,
    with ``TRY_AGAIN`` if too many races were lost; and ``NFTError`` if nftables refuses the rules.
    """
    presence.note(attachment)
    holders, leaving, installed = dict[Forward, str](), dict[str, str](), Installed((), {})
    for attempt in range(ATTEMPTS):
        try:
            commands = _replace_commands(installed, leaving, attachment, plan, holders, verb="add")
            nft.run([*base_and_services_commands(), *commands])
        except NFTError as error:
            from cni_hostport.kernel import refusals

            if refusals.refused_declarations(error):
                from cni_hostport import upgrade

                upgrade.declare_again(nft)
            elif not refusals.may_be_a_race(error):
                raise
            refusal = error
        else:
            # the kernel does not delete the chain of a holder for whose port this attachment waits; but that holder may
            # have released the port before
            if not holders or holders == shared_ports(nft.installed(), attachment, plan):
                break
            refusal = NotFoundError([("the port has another holder", "")])
        pause(attempt)
        installed = nft.installed()
        holders = shared_ports(installed, attachment, plan)
        leaving = leaving_holders(nft, installed, attachment, plan.without(holders), is_newest=True)
    else:
        raise _lost_races(refusal)
    for forward in holders:
        log(f"host port {forward} stays with another attachment of {attachment.container_id}")
    held = plan.without(holders)
    _take_over(attachment, held, leaving, installed, log)
    return held


def _replace_commands(
    installed: Installed,
    leaving: Mapping[str, str],
    attachment: Attachment,
    plan: Plan,
    holders: Mapping[Forward, str],
    *,
    verb: str,
) -> list[str]:
    """Return the commands that install an attachment in the place of the holders that leave."""
    wanted = {claim for forward in plan.forwards if forward not in holders for claim in claims(forward)}
    return [
        *installed.detach_commands(*leaving, wanted=wanted),
        *_install_commands(attachment, plan, holders, verb),
        *installed.waiter_commands(attachment.key, leaving, wanted),
    ]


def run_on_base(nft: Nft, commands: list[str]) -> None:
    """Declare the base and run commands, in one transaction.

    Raises ``CNIError`` with ``TRY_AGAIN`` if too many races were lost, and ``NFTError`` if nftables refuses.
    """
    for _ in range(ATTEMPTS):
        try:
            return nft.run([*base_commands(), *commands])
        except NFTError as error:
            from cni_hostport.kernel import refusals

            if not refusals.refused_declarations(error):
                raise
            refusal = error
        from cni_hostport import upgrade

        upgrade.declare_again(nft)
    raise _lost_races(refusal)


class Reinstatement:
    """What installs again what an attachment had, in the place of what is left of it, and of holders that are gone.

    It takes nothing from containers that live, their addresses included. ``held`` is the part of the plan that is in
    force then, as ``claim`` returns it. ``commands`` come after those of the base. ``claims`` are what it takes,
    elements, as (map, key), and holders to remove. ``conflicts`` are what others must not claim that are installed in
    the same transaction: the same, and its ports as dynamic ones, or those of its dynamic ports by their numbers.
    """

    def __init__(self, nft: Nft, attachment: Attachment, plan: Plan, installed: Installed) -> None:
        """Plan it; raises ``CNIError`` with ``PORT_TAKEN`` if a container that lives is in the way."""
        presence.note(attachment)
        holders = shared_ports(installed, attachment, plan)
        self.held = plan.without(holders)
        self._attachment, self._installed = attachment, installed
        self._leaving = leaving_holders(nft, installed, attachment, self.held, is_newest=False)
        self.commands = _replace_commands(installed, self._leaving, attachment, plan, holders, verb="create")
        ports = chain.from_iterable(map(claims, self.held.forwards))
        pods = ((PODS[pod_ip.version], str(pod_ip)) for pod_ip in plan.masquerade)
        taken = {*ports, *pods, *(("", holder) for holder in (attachment.key, *self._leaving))}
        kinds = {(bool(forward.request), reservation(forward)[1]) for forward in self.held.forwards}
        self.claims = taken | {(DYNAMIC if is_dynamic else BY_NUMBER, port) for is_dynamic, port in kinds}
        self.conflicts = taken | {(BY_NUMBER if is_dynamic else DYNAMIC, port) for is_dynamic, port in kinds}

    def take_over(self, log: Log) -> None:
        """Do what is left to do once the commands were run, for the sake of the holders that had to leave."""
        _take_over(self._attachment, self.held, self._leaving, self._installed, log)


def reinstate(nft: Nft, reinstatements: Sequence[Reinstatement]) -> None:
    """Run the commands of all, as one transaction.

    It is one attempt: raises ``NFTError`` if the ruleset is no longer as they take it to be, or if an attachment was
    deleted. Only where there is one, the error names the commands that were refused.
    """
    commands = chain.from_iterable(reinstatement.commands for reinstatement in reinstatements)
    nft.run([*base_and_services_commands(), *commands], names_refused=len(reinstatements) == 1)


def _take_over(attachment: Attachment, held: Plan, leaving: dict[str, str], installed: Installed, log: Log) -> None:
    """Announce which holders had to leave, and forget the flows to them."""
    wanted = {claim for forward in held.forwards for claim in claims(forward)}
    for holder, reason in leaving.items():
        if reason:
            from cni_hostport.log import announce

            announce(log, f"{reason}; container {attachment.container_id} ({attachment.ifname}) takes over")
        lost = [
            element for element in installed.elements_to(holder) if reason or (element.map, element.key) not in wanted
        ]
        _forget_flows(lost, log)
        _keep_files(lost, log)
    _close_localnet(installed, leaving, log)


def base_and_services_commands() -> list[str]:
    """Return the commands that declare the base, and have its sets of Services' addresses hold what they should.

    Raises what ``ipvs.fill`` does.
    """
    return [*base_commands(), *ipvs.fill()]


def _install_commands(attachment: Attachment, plan: Plan, holders: Mapping[Forward, str], verb: str) -> list[str]:
    """Return the commands that install an attachment, and take it from the deleted ones.

    With the verb ``create`` they fail if it is among the deleted ones. ``holders`` are as for ``attach_commands``.
    """
    key = attachment.key
    commands = [deleted_command(verb, key), deleted_command("delete", key)]
    if plan.local_route_to and plan.interface:
        if Lookup(shared=True).is_guarded(plan.interface):
            # to name the interface would have libnftables read all interfaces of the node
            commands.append(need_command(plan.interface, key))
        else:
            # an attachment that is restored had the interface open: by this plugin, unless somebody else needs it too
            opens = verb == "create" or not localnet.is_open(plan.interface)
            commands += guard_commands(plan.interface, opens=opens, needed_by=key)
    commands += exclusion_commands([forward for forward in plan.forwards if forward not in holders])
    return [*commands, *attach_commands(attachment, plan, holders)]


def release(nft: Nft, key: str, log: Log, known: Installed | None = None, *, is_deleted: bool = True) -> None:
    """Remove all that an attachment has; if it has nothing, that is success.

    With ``known``, a listing that was read already, the first listing is skipped. One that ``is_deleted`` is noted as
    such, and not restored.
    Raises ``CNIError`` with ``TRY_AGAIN`` if too many races were lost, and ``NFTError`` if nftables refuses.
    """
    for attempt in range(ATTEMPTS):
        installed = known or nft.installed()
        known = None
        commands = installed.detach_commands(key)
        if not commands:
            return
        try:
            nft.run([*commands, *(deletion_note_commands(key) if is_deleted else ())])
        except NFTError as error:
            from cni_hostport.kernel import refusals

            if not refusals.may_be_a_race(error):
                raise
            refusal = error
            pause(attempt)
        else:
            _forget_flows(installed.elements_to(key), log)
            _keep_files(installed.elements_to(key), log)
            _close_localnet(installed, [key], log)
            return
    raise _lost_races(refusal)


def _close_localnet(installed: Installed, leaving: Iterable[str], log: Log) -> None:
    """Close the interfaces towards attachments that have left, where no other needs them."""
    chains = {installed.localnet_chains[key] for key in leaving if key in installed.localnet_chains}
    for interface in map(interface_in, chains):
        localnet.close(Lookup(shared=True), interface, log)


def _forget_flows(elements: Iterable[Element], log: Log) -> None:
    ports = [element.endpoint for element in elements if element.map in PORT_MAPS]
    pods = [element.address.packed for element in elements if element.map in POD_MAPS and element.address]
    if ports and pods:
        conntrack.forget_to(pods, ports, log)


def _keep_files(elements: Iterable[Element], log: Log) -> None:
    """Have the files of pods that had dynamic host ports say what is left of these."""
    pod_ids = {element.pod_id for element in elements if element.pod_id}
    if pod_ids:
        from cni_hostport.dynamic_ports import pod_files

        pod_files.keep(Lookup(shared=True), pod_ids, log)


def pause(attempt: int) -> None:
    """Wait a random time before the next attempt, but not before the second one: most often there is no race at all."""
    if attempt:
        import random

        time.sleep(random.uniform(0, MAX_PAUSE))  # noqa: S311 - jitter, not a secret


def _lost_races(error: NFTError) -> CNIError:
    from cni_hostport import failures

    return failures.lost_races(error, ATTEMPTS)
