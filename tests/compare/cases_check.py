"""CHECK, GC, STATUS and VERSION."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from compare.cases import case
from compare.expect import fall_short, named, reached, refused, silent, succeeded
from lab import NODE4, NODE6, mapping

if TYPE_CHECKING:
    from compare.plugins import Bench

BARE = {"cniVersion": "1.1.0", "name": "pods"}
BOTH = [mapping(8080), mapping(8080, 80, "udp")]
TRUTH = "who calls CHECK wants to know whether the port works as asked for"
COLLECTED = "CNI 1.1.0 has GC so that what a lost DEL left behind does not stay for ever"


@case()
def check_after_add(node: Bench) -> None:
    """CHECK passes after ADD, for each combination of families, snat and masqAll."""
    for families in ((4,), (6,), (4, 6)):
        for keys in ({}, {"snat": False}, {"masqAll": True}):
            pod = node.pod(*families)
            node.add(pod, *BOTH, **keys)
            succeeded(node.check(pod, *BOTH, **keys), f"CHECK with {keys} and {named(families)}")
            node.delete(pod)


@case()
def check_on_given_addresses(node: Bench) -> None:
    """CHECK passes after ADD of ports on given addresses."""
    pod = node.pod()
    mappings = [mapping(8080 + n, hostIP=ip) for n, ip in enumerate((NODE4, NODE6, "0.0.0.0", "::", "127.0.0.1"))]
    node.add(pod, *mappings)
    succeeded(node.check(pod, *mappings), "CHECK")


@case()
def check_without_mappings(node: Bench) -> None:
    """CHECK passes for a pod without port mappings."""
    pod = node.pod()
    node.add(pod)
    succeeded(node.check(pod), "CHECK")


@case()
def check_before_add(node: Bench) -> None:
    """CHECK fails before ADD."""
    refused(node.check(node.pod(), *BOTH), "CHECK")


@case()
def check_after_del(node: Bench) -> None:
    """CHECK fails after DEL."""
    pod = node.pod()
    node.add(pod, *BOTH)
    node.delete(pod)
    refused(node.check(pod, *BOTH), "CHECK")


@case()
def check_after_flush(node: Bench) -> None:
    """CHECK fails after "nft flush ruleset"."""
    pod = node.pod()
    node.add(pod, *BOTH)
    node.nft("flush ruleset")
    refused(node.check(pod, *BOTH), "CHECK")


@case()
def check_of_one_port_more(node: Bench) -> None:
    """CHECK fails when one more port is asked for than is installed."""
    pod = node.pod()
    node.add(pod, *BOTH)
    refused(node.check(pod, *BOTH, mapping(8081)), "CHECK")


@case(TRUTH)
def check_of_another_port(node: Bench) -> None:
    """CHECK fails when another host port is asked for than is installed."""
    pod = node.pod()
    node.add(pod, mapping(8080))
    refused(node.check(pod, mapping(8081)), "CHECK", "8081")


@case(TRUTH)
def check_of_another_target(node: Bench) -> None:
    """CHECK fails when the port leads to another container port."""
    pod = node.pod()
    node.add(pod, mapping(8080, 80))
    refused(node.check(pod, mapping(8080, 81)), "CHECK")


@case(TRUTH)
def check_of_a_flushed_hook(node: Bench) -> None:
    """CHECK fails when the rules of every chain on the prerouting hook are gone."""
    pod = node.web()
    node.add(pod, *BOTH)
    for item in json.loads(node.nft("-j list chains"))["nftables"]:
        chain = item.get("chain", {})
        if chain.get("hook") == "prerouting":
            node.nft(f"flush chain {chain['family']} {chain['table']} {chain['name']}")
    silent(node.client, NODE4)
    refused(node.check(pod, *BOTH), "CHECK")


@case(COLLECTED)
def gc_removes(node: Bench) -> None:
    """GC removes the pods that the runtime does not list and keeps the others."""
    kept, lost, foreign = node.web(name="kept"), node.web(name="lost"), node.web(name="foreign")
    node.add(kept, mapping(8080))
    node.add(lost, mapping(8081))
    node.add(foreign, mapping(8082), name="another")
    valid = {"cni.dev/valid-attachments": [{"containerID": kept.id, "ifname": "eth0"}]}
    succeeded(node.cni("GC", None, {**BARE, **valid}), "GC")
    reached(node.client, NODE4, 8080, by="kept")
    reached(node.client, NODE4, 8082, by="foreign")
    silent(node.client, NODE4, 8081)


@case(COLLECTED)
def gc_of_all(node: Bench) -> None:
    """GC with no valid attachment, null or an empty list, removes all of its network."""
    lists: tuple[None, list[object]] = None, []
    for number, valid in enumerate(lists):
        node.add(node.web(), mapping(8080 + number))
        succeeded(node.cni("GC", None, {**BARE, "cni.dev/valid-attachments": valid}), "GC")
        silent(node.client, NODE4, 8080 + number)


@case()
def gc_without_a_list(node: Bench) -> None:
    """GC without the list of valid attachments removes nothing."""
    node.add(node.web(), mapping(8080))
    node.cni("GC", None, BARE)
    reached(node.client, NODE4)


@case()
def status_of_a_node_that_works(node: Bench) -> None:
    """STATUS succeeds on a node where ADD would."""
    succeeded(node.cni("STATUS", None, BARE), "STATUS")


@case("a runtime asks STATUS before it sends pods to a node on which every ADD would fail")
def status_without_rights(node: Bench) -> None:
    """STATUS is code 50 where ADD has no right to change the rules."""
    node.confined("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    if not node.attempt(node.pod(), mapping(8080)).status:
        fall_short("ADD succeeds without the right")
    refused(node.cni("STATUS", None, BARE), "STATUS", code=50)


@case()
def version(node: Bench) -> None:
    """VERSION lists CNI 0.1.0 to 1.1.0."""
    wanted = {"0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}
    if missing := wanted.difference(node.cni("VERSION", None, BARE).json["supportedVersions"]):
        fall_short(f"{sorted(missing)} are missing")
