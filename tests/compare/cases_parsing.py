"""What the plugin makes of its input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compare.cases import case
from compare.expect import fall_short, reached, refused, silent, succeeded
from lab import CLIENT4, CLIENT6, NODE4, NODE6, config, mapping, result

if TYPE_CHECKING:
    from compare.plugins import Bench
    from lab import Pod


def old_result(pod: Pod, version: str) -> dict[str, Any]:
    """Return a result of versions before 1.0.0."""
    four, six = pod.addresses
    if version in {"0.1.0", "0.2.0"}:
        return {"cniVersion": version, "ip4": {"ip": four}, "ip6": {"ip": six}}
    ips = [{"version": number, "address": address, "interface": 2} for number, address in (("4", four), ("6", six))]
    return {**result(sandbox=pod.path, version=version), "ips": ips}


def works_in(node: Bench, *versions: str) -> None:
    for version in versions:
        pod = node.web()
        prev = result(*pod.addresses, sandbox=pod.path, version=version)
        keys = {"cniVersion": version, "prevResult": prev if version >= "1.0.0" else old_result(pod, version)}
        if node.add(pod, mapping(8080), **keys).json["cniVersion"] != version:
            fall_short("the result is of another version")
        for address in (NODE4, NODE6):
            reached(node.client, address)
        node.delete(pod)
        silent(node.client, NODE4)


@case()
def versions_0_1_and_0_2(node: Bench) -> None:
    """CNI 0.1.0 and 0.2.0: both addresses of the result are forwarded to."""
    works_in(node, "0.1.0", "0.2.0")


@case()
def versions_0_3_and_0_4(node: Bench) -> None:
    """CNI 0.3.0, 0.3.1 and 0.4.0: both addresses of the result are forwarded to."""
    works_in(node, "0.3.0", "0.3.1", "0.4.0")


@case()
def versions_1(node: Bench) -> None:
    """CNI 1.0.0 and 1.1.0: both addresses of the result are forwarded to."""
    works_in(node, "1.0.0", "1.1.0")


@case()
def unknown_version(node: Bench) -> None:
    """An unknown CNI version is answered with code 1."""
    pod = node.pod()
    refused(node.attempt(pod, mapping(8080), cniVersion="9.9.9"), "ADD", code=1)


@case()
def missing_variable(node: Bench) -> None:
    """A missing CNI_CONTAINERID is answered with code 4."""
    pod = node.pod()
    refused(node.cni("ADD", pod, config(pod, mapping(8080)), CONTAINERID=""), "ADD", "CNI_CONTAINERID", code=4)


@case()
def result_is_passed_on(node: Bench) -> None:
    """The result of the plugin before is passed on."""
    pod = node.pod()
    given, passed = result(*pod.addresses, sandbox=pod.path), node.add(pod, mapping(8080)).json
    for key in ("ips", "interfaces", "routes"):
        if passed[key] != given[key]:
            fall_short(f"{key} changed")


@case()
def no_previous_result(node: Bench) -> None:
    """ADD without a result of a plugin before is refused."""
    pod = node.pod()
    call = config(pod, mapping(8080))
    del call["prevResult"]
    refused(node.cni("ADD", pod, call), "ADD")


@case()
def nothing_to_map(node: Bench) -> None:
    """A pod without port mappings is let through, also with null in their place."""
    pod = node.pod()
    runtimes: list[Any] = [
        {"portMappings": []},
        {"portMappings": None},
        {},
        None,
        {"mac": None, "aliases": {"pods": ["a"]}},
    ]
    for runtime in runtimes:
        node.add(pod, runtimeConfig=runtime)


@case()
def unknown_keys(node: Bench) -> None:
    """Unknown keys are ignored at every level."""
    pod = node.web()
    node.add(pod, mapping(8080, name="http"), new={"key": 1}, capabilities={"portMappings": True, "bandwidth": True})
    reached(node.client, NODE4)


@case()
def addresses_of_the_node_side(node: Bench) -> None:
    """Addresses of the node's interfaces in the result are skipped."""
    pod = node.web()
    prev = result(*pod.addresses, sandbox=pod.path)
    prev["ips"] = [
        {"address": "10.88.0.1/24", "interface": 0},
        {"address": "fd00:88::1/64", "interface": 1},
        *prev["ips"],
    ]
    node.add(pod, mapping(8080), prevResult=prev)
    reached(node.client, NODE4, seen_as=CLIENT4)
    reached(node.client, NODE6, seen_as=CLIENT6)


@case()
def address_without_interface(node: Bench) -> None:
    """An address of the result that names no interface counts as the pod's."""
    pod = node.web()
    node.add(pod, mapping(8080), prevResult={"cniVersion": "1.1.0", "ips": [{"address": a} for a in pod.addresses]})
    for address in (NODE4, NODE6):
        reached(node.client, address)


@case("a pod whose ports are asked for and not mapped is worse than an error, or than asking the pod's own interface")
def no_address_in_the_result(node: Bench) -> None:
    """A result without addresses does not lose the mappings in silence."""
    pod = node.web()
    outcome = node.attempt(pod, mapping(8080), prevResult={"cniVersion": "1.1.0", "interfaces": []})
    if not outcome.status:
        reached(node.client, NODE4)


@case()
def foreign_conditions(node: Bench) -> None:
    """Conditions written for another back end are refused."""
    outcome = node.attempt(node.pod(), mapping(8080), conditionsV4=list(node.plugin.foreign_condition))
    refused(outcome, "ADD", "conditionsV4")


@case()
def long_names(node: Bench) -> None:
    """Container IDs and network names of 200 characters work."""
    pod = node.web()
    call, variables = config(pod, mapping(8080), name="n" * 200), {"CONTAINERID": "c" * 200}
    succeeded(node.cni("ADD", pod, call, **variables), "ADD")
    reached(node.client, NODE4)
    succeeded(node.cni("DEL", pod, call, **variables), "DEL")
    silent(node.client, NODE4)
