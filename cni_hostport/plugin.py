"""The CNI operations. Each is a plan, then one nftables transaction; the kernel's transaction is the only lock.

The ruleset is the only state: files are written for pods to read, never to be read here, and DEL and GC go by what is
installed, never by what the runtime says was asked for. Most pods have no host ports, and each import costs them time:
an operation imports what it needs once it knows that it does.
"""

from __future__ import annotations

from cni_hostport.errors import CNIError, Code, NFTError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from cni_hostport.attachment import Attachment
    from cni_hostport.log import Log
    from cni_hostport.ruleset.plan import Plan, Request
    from cni_hostport.skel import Call

    Operation = Callable[[Call, Log], Mapping[str, Any] | None]


def add(call: Call, log: Log) -> Mapping[str, Any]:
    """Install the mappings of ``runtimeConfig``, and pass ``prevResult`` on."""
    result = _prev_result(call)
    request = request_of(call)
    for line in request.unmapped() if request else ():
        log(line)
    if not request or not request.is_mapped:
        _remove_former(call, log)
        return result
    from cni_hostport import addition

    addition.install(request, attachment_of(call), log)
    return result


def _remove_former(call: Call, log: Log) -> None:
    """Remove what an attachment that has no mappings had by an earlier ADD."""
    from cni_hostport.lookup import Lookup

    key = attachment_of(call).key
    try:
        lookup = Lookup()
        lookup.leave_open()
        held = lookup.find(key)
    except NFTError as error:  # no reason to refuse a container that needs nothing of nftables
        log(f"warning: host ports that {call.container_id} may have had before were not looked for: {error}")
        return
    if held:
        from cni_hostport import deletion
        from cni_hostport.skel import AFTERWARDS

        deletion.remove(lookup, key, held, log, AFTERWARDS.append)


def delete(call: Call, log: Log) -> None:
    """Remove all that is installed for the attachment."""
    from cni_hostport import deletion, portmap
    from cni_hostport.lookup import Lookup
    from cni_hostport.names import RESTORING
    from cni_hostport.skel import AFTERWARDS

    lookup, key = Lookup(), attachment_of(call).key
    held = lookup.find(key)
    if held is None and (may_have_host_ports(call) or lookup.is_deleted(RESTORING)):
        deletion.note(lookup, key)
        held = lookup.find(key)  # what was restored between the first look and the note
    if held:
        deletion.remove(lookup, key, held, log, AFTERWARDS.append)
    if not (held and held.dynamic_ports) and _asks_for_dynamic_ports(call.config.get("runtimeConfig")):
        # of a ruleset that is lost, or was damaged, the file may be left
        from cni_hostport.dynamic_ports import pod_files

        pod_files.keep(lookup, [attachment_of(call).pod_id], log)
    portmap_rules = portmap.Rules(lookup)
    if portmap_rules.may_exist():
        from cni_hostport.migration import removal

        removal.delete(portmap_rules, call, log)


def check(call: Call, _log: Log) -> None:
    """Compare what is installed with what ADD would install now."""
    _prev_result(call)
    request = request_of(call)
    if request is None:
        return
    plan = installed_plan(call, request)
    if not plan.forwards:
        return
    from cni_hostport.check import Comparison

    differences = Comparison().differences(attachment_of(call), plan)
    if differences:
        raise CNIError(
            Code.CHECK_FAILED,
            f"the host ports of {call.container_id} ({call.ifname}) are not as installed by ADD: {differences[0]}",
            "\n".join(differences),
        )


def gc(call: Call, log: Log) -> None:
    """Remove the attachments of this network that the runtime does not list as valid."""
    from cni_hostport import garbage_collection

    garbage_collection.collect(call, log)


def status(call: Call, _log: Log) -> None:
    """Tell whether host ports are available to this network."""
    from cni_hostport import availability

    availability.probe(call.config)


def _translated(operation: Operation) -> Operation:
    def run(call: Call, log: Log) -> Mapping[str, Any] | None:
        try:
            return operation(call, log)
        except NFTError as error:
            from cni_hostport import failures

            raise failures.refused(error, call.config) from error

    return run


OPERATIONS = {
    "ADD": _translated(add),
    "DEL": _translated(delete),
    "CHECK": _translated(check),
    "GC": _translated(gc),
    "STATUS": _translated(status),
}


def attachment_of(call: Call) -> Attachment:
    """Return the attachment that a call is about."""
    from cni_hostport.attachment import Attachment, pod_name, pod_uid

    attachment = Attachment(call.network, call.container_id, call.ifname, call.netns, pod_name(call.args))
    attachment.pod_uid = pod_uid(call.args)
    return attachment


def _prev_result(call: Call) -> Mapping[str, Any]:
    result = call.config.get("prevResult")
    if not isinstance(result, dict):
        raise CNIError(
            Code.INVALID_CONFIG, "there is no prevResult: hostport is a chained plugin and must come after one"
        )
    return result


def _has_mappings(call: Call) -> bool:
    runtime = call.config.get("runtimeConfig")
    if runtime is None or (isinstance(runtime, dict) and runtime.get("portMappings") in (None, [])):
        return _asks_for_dynamic_ports(runtime)
    return True


def _asks_for_dynamic_ports(runtime: object) -> bool:
    """Tell whether ``runtimeConfig`` asks for dynamic host ports; if in doubt, it does not."""
    if not isinstance(runtime, dict):
        return False
    names = (*runtime, *(name for value in runtime.values() if isinstance(value, dict) for name in value))
    if not any("dynamic" in name for name in names):
        return False  # most pods, whatever annotations they have: nothing is imported for them
    from cni_hostport.dynamic_ports import keys

    return keys.are_in(runtime)


def may_have_host_ports(call: Call) -> bool:
    """Tell whether a runtime's mappings have a host port, or one is to be picked, however that is written.

    If in doubt, they have.
    """
    if _asks_for_dynamic_ports(call.config.get("runtimeConfig")):
        return True
    try:
        mappings = (call.config.get("runtimeConfig") or {}).get("portMappings") or ()
        return any(value for mapping in mappings for key, value in mapping.items() if key.lower() == "hostport")
    except (AttributeError, TypeError):
        return True


def request_of(call: Call) -> Request | None:
    """Return what the attachment wants installed, ``None`` where it wants nothing."""
    if not _has_mappings(call):
        return None  # most pods: nothing is imported, validated or asked for them
    from cni_hostport.config import NetworkConfig  # pydantic: only for those who have something to map

    config = NetworkConfig.parse(call.config)
    if not config.mappings and not config.requests:
        return None
    from cni_hostport.kernel import routes
    from cni_hostport.ruleset.plan import Request

    addresses = config.prev_result.addresses(call.ifname) or routes.pod_addresses(call.netns, call.ifname)
    if not addresses:
        raise CNIError(
            Code.INVALID_CONFIG,
            f"{Request(config, ()).name} cannot be mapped: {call.ifname} of {call.container_id} has no address",
        )
    try:
        pod_routes = routes.pod_routes(addresses)
    except OSError as error:
        raise CNIError(Code.HOST_SETTING, f"cannot tell how the node reaches {addresses[0].ip}: {error}") from error
    return Request(config, addresses, pod_routes)


def installed_plan(call: Call, request: Request) -> Plan:
    """Return what ADD would install again: the plan with the dynamic host ports that the ruleset has for the pod.

    Raises ``CNIError`` with ``CHECK_FAILED`` if it lacks some.
    """
    if not request.blocks:
        return request.plan()
    from cni_hostport.dynamic_ports import assignment
    from cni_hostport.lookup import Lookup

    attachment = attachment_of(call)
    assigned = assignment.assigned(Lookup(), attachment.pod_id, attachment.key)
    for port in (port for block in request.blocks for port in block):
        if str(port) not in assigned:
            msg = f"container port {port} of {call.container_id} ({call.ifname}) has no dynamic host port any more"
            raise CNIError(Code.CHECK_FAILED, msg)
    return request.plan(assigned)
