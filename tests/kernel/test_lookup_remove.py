from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import scratch
from lab import LAUNCHER, mapping
from scratch import KEY, nft, ruleset, run

from cni_hostport.attachment import Attachment
from cni_hostport.config import NetworkConfig
from cni_hostport.errors import CNIError, NFTError
from cni_hostport.kernel.nft import Nft
from cni_hostport.lookup import Held, Lookup
from cni_hostport.ruleset.commands import attach_commands
from cni_hostport.ruleset.plan import Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scratch import Traffic

BOTH = [mapping(8080), mapping(5353, 53, "udp", hostIP="192.0.2.1")]
MANY = [mapping(port) for port in range(8000, 8017)]
CHANGES = {
    "rules flushed": "flush chain inet hostport dnat-KEY",
    "table flushed": "flush table inet hostport",
    "other element": "add element inet hostport hostports { ipv4 . tcp . 99 : goto dnat-KEY }",
    "other pod address": "add element inet hostport pods_ip4 { 10.1.0.99 : goto masq-KEY }",
    "jump from another chain": "add rule inet hostport dispatch tcp dport 99 jump dnat-KEY",
    "replaced rule": "flush chain inet hostport dnat-KEY; add rule inet hostport dnat-KEY accept",
}
UNPRIVILEGED = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]


@pytest.fixture(autouse=True)
def traffic(_kernel: None) -> Iterator[Traffic]:
    with scratch.namespace() as traffic:
        yield traffic


def found() -> Held:
    held = Lookup().find(KEY)
    assert held is not None
    return held


def is_left_alone(held: Held) -> bool:
    before = ruleset()
    removed = Lookup().remove(KEY, held)
    return not removed and ruleset() == before


@pytest.mark.parametrize("snat", [True, False])
def test_an_attachment_is_removed_whole_and_nothing_of_others(*, snat: bool) -> None:
    run("ADD", mapping(8081), container="c2")
    before = ruleset()
    run("ADD", *BOTH, snat=snat)
    assert Lookup().remove(KEY, found())
    assert KEY not in ruleset()
    run("CHECK", mapping(8081), container="c2")
    assert ruleset().count("handle") == before.count("handle")


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_removed_of_what_is_not_known_whole(change: str) -> None:
    run("ADD", *BOTH)
    nft(CHANGES[change])
    assert is_left_alone(found())


@pytest.mark.parametrize("change", [change for change in CHANGES if not change.startswith("jump")])
def test_del_then_finds_the_rest_by_listing(change: str) -> None:
    run("ADD", *BOTH)
    nft(CHANGES[change])
    run("DEL")
    assert KEY not in ruleset()


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_removed_that_changes_after_it_was_found(change: str) -> None:
    run("ADD", *BOTH)
    held = found()
    nft(CHANGES[change])
    removed = Lookup().remove(KEY, held)
    # whoever changes rules only leaves nothing that could hold the chain
    assert removed == (change in {"rules flushed", "table flushed", "replaced rule"})
    assert (KEY in ruleset()) != removed


@pytest.mark.parametrize("again", [BOTH, [mapping(9090)]], ids=["the same", "another port"])
def test_a_later_chain_of_the_same_name_is_left_alone(again: Sequence[dict[str, Any]]) -> None:
    run("ADD", *BOTH)
    held = found()
    run("DEL")
    run("ADD", *again)
    assert is_left_alone(held)
    run("CHECK", *again)


@pytest.mark.parametrize("flushed", [False, True], ids=["deleted", "flushed"])
def test_the_next_holder_of_the_port_is_left_alone(*, flushed: bool) -> None:
    run("ADD", *BOTH)
    held = found()
    if flushed:
        nft("flush ruleset")
    else:
        run("DEL")
    run("ADD", *BOTH, container="c2")
    assert is_left_alone(held)


@pytest.mark.parametrize("how", ["flush ruleset", "delete table inet hostport"])
def test_what_is_gone_is_not_removed_again(how: str) -> None:
    run("ADD", *BOTH)
    held = found()
    nft(how)
    assert is_left_alone(held)
    assert Lookup().find(KEY) is None


def test_an_attachment_whose_token_was_deleted_by_hand_is_left_to_a_listing() -> None:
    run("ADD", *BOTH)
    nft("flush map inet hostport hostports; flush map inet hostport hostports_ip4; delete chain inet hostport dnat-KEY")
    held = found()
    assert (held.elements, held.chains, held.handle) == ([], [f"masq-{KEY}"], b"")
    assert is_left_alone(held)
    run("DEL")
    assert KEY not in ruleset()


@pytest.mark.parametrize("given", [[], [mapping(9000, hostIP="2001:db8::1")]], ids=["alone", "beside a few"])
def test_more_mappings_than_rules_are_left_to_a_listing(given: Sequence[dict[str, Any]]) -> None:
    ipv4_only = [{**item, "hostIP": "0.0.0.0"} for item in MANY]
    run("ADD", *ipv4_only, *given)
    assert is_left_alone(found())
    run("DEL")
    assert KEY not in ruleset()


def test_a_map_that_was_replaced_by_one_of_another_type_does_not_stop_del() -> None:
    run("ADD", mapping(8080, hostIP="192.0.2.1"))
    nft("""
        flush chain inet hostport dispatch
        flush map inet hostport hostports_ip4
        delete map inet hostport hostports_ip4
        add map inet hostport hostports_ip4 { type ipv4_addr : verdict; }
    """)
    with pytest.raises(CNIError) as failed:
        run("CHECK", mapping(8080, hostIP="192.0.2.1"))
    run("DEL")
    assert (failed.value.code, KEY in ruleset()) == (103, False)


@pytest.mark.parametrize("installed", [True, False])
def test_del_without_privileges_is_refused_with_a_reason(*, installed: bool) -> None:
    if installed:
        run("ADD", *BOTH)
    before = ruleset()
    ran = subprocess.run(
        [*UNPRIVILEGED, *LAUNCHER], check=False, capture_output=True, text=True,
        input=json.dumps({"cniVersion": "1.1.0", "name": "pods"}),
        env={"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_PATH": "/bin"},
    )  # fmt: skip
    error = json.loads(ran.stdout)
    assert (ran.returncode, error["code"], ran.stderr) == (1, 101, "")
    assert "Operation not permitted" in error["msg"]
    assert ruleset() == before


def test_what_the_kernel_refuses_to_remove_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run("ADD", *BOTH)
    held, lookup = found(), Lookup()
    with monkeypatch.context() as patched:
        patched.setattr("cni_hostport.nf_tables.NFNL_SUBSYS_NFTABLES", 99)
        with pytest.raises(NFTError) as refused:
            lookup.remove(KEY, held)
    assert str(refused.value).endswith(": netlink")
    assert os.strerror(5) not in str(refused.value)
    assert lookup.remove(KEY, held)


def crowd(size: int) -> None:
    commands = []
    for number in range(size):
        address = f"10.2.{number // 200}.{number % 200 + 1}/16"
        config = NetworkConfig.parse(
            {
                "prevResult": {"ips": [{"address": address}]},
                "runtimeConfig": {"portMappings": [mapping(20000 + number), mapping(30000 + number, hostIP="::1")]},
            }
        )
        plan = Request(config, config.prev_result.addresses("eth0")).plan()
        commands += attach_commands(Attachment("pods", f"other{number}", "eth0"), plan)
    Nft().run(commands)


@pytest.mark.parametrize("command", ["CHECK", "DEL"])
@pytest.mark.parametrize("mappings", [[mapping(8080)], [mapping(port) for port in range(8000, 8016)]])
def test_what_del_and_check_ask_and_are_told_does_not_grow_with_the_node(
    traffic: Traffic, monkeypatch: pytest.MonkeyPatch, command: str, mappings: Sequence[dict[str, Any]]
) -> None:
    costs = []
    for others in (0, 200):
        crowd(others)
        run("ADD", *mappings)
        with monkeypatch.context() as patched:
            patched.delattr(Nft, "listing")
            before = traffic.so_far
            run(command, *mappings)
            costs.append([after - before for before, after in zip(before, traffic.so_far, strict=True)])
    assert costs[0] == costs[1] != [0, 0, 0]
