from __future__ import annotations

import re
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
import scratch
from lab import mapping
from scratch import KEY, deleted, nft, ruleset, run

from cni_hostport import names
from cni_hostport.attachment import Attachment
from cni_hostport.errors import CNIError, Code
from cni_hostport.garbage_collection import VALID_ATTACHMENTS
from cni_hostport.kernel import localnet
from cni_hostport.kernel.nft import Nft
from cni_hostport.lookup import Held, Lookup
from cni_hostport.ruleset import base

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cni_hostport.ruleset.plan import Plan

ONE = [mapping(8080)]
MANY = [mapping(port) for port in range(8000, 8017)]
FEW_OR_MANY = pytest.mark.parametrize("mappings", [ONE, MANY], ids=["one mapping", "more mappings than rules"])
OTHERS = Attachment("pods", "c2", "eth0").key
RESTORE = base.deleted_command("add", names.RESTORING)


@pytest.fixture(autouse=True)
def _scratch(_kernel: None) -> Iterator[None]:
    with scratch.namespace():
        yield


@pytest.mark.parametrize("known", [[], ONE], ids=["without mappings", "with mappings"])
def test_del_without_a_listing_leaves_the_key(monkeypatch: pytest.MonkeyPatch, known: Sequence[dict[str, Any]]) -> None:
    run("ADD", *ONE)
    with monkeypatch.context() as patched:
        patched.delattr(Nft, "listing")
        patched.delattr(Nft, "run")
        run("DEL", *known)
    assert deleted() == {KEY}


@FEW_OR_MANY
def test_del_leaves_the_key_of_its_attachment_and_no_other(mappings: Sequence[dict[str, Any]]) -> None:
    run("ADD", mapping(9090), container="c2")
    run("ADD", mapping(9091), name="another", addresses=["10.1.0.9/24"])
    run("ADD", *mappings)
    run("DEL")
    assert deleted() == {KEY}
    run("DEL", container="c2")
    assert deleted() == {KEY, OTHERS}


@FEW_OR_MANY
def test_a_second_del_keeps_the_key(mappings: Sequence[dict[str, Any]]) -> None:
    run("ADD", *mappings)
    for known in ([], mappings, []):
        run("DEL", *known)
        assert deleted() == {KEY}


def test_the_key_is_kept_for_ten_minutes() -> None:
    run("ADD", *ONE)
    run("DEL")
    listed = subprocess.run(["nft", "list", "set", "inet", "hostport", "deleted"], check=True, capture_output=True)
    assert re.search(rb"timeout 10m\n\t\telements = \{ \S+ expires (10m|9m5\ds)", listed.stdout)


def test_del_of_a_pod_without_mappings_leaves_no_key() -> None:
    run("ADD", mapping(9090), container="c2")
    run("DEL")
    assert deleted() == set()


def test_del_of_a_pod_without_mappings_leaves_its_key_while_attachments_are_restored() -> None:
    run("ADD", mapping(9090), container="c2")
    nft(RESTORE)
    run("DEL")
    assert deleted() == {names.RESTORING, KEY}


def test_del_on_a_node_without_the_table_and_without_mappings_makes_nothing() -> None:
    run("DEL")
    assert ruleset() == ""


def test_del_of_mappings_that_a_flush_took_away_leaves_the_key_in_an_empty_table() -> None:
    run("ADD", *ONE)
    nft("flush ruleset")
    run("DEL", *ONE)
    assert deleted() == {KEY}
    assert "goto dnat-" not in ruleset()


@FEW_OR_MANY
def test_del_makes_the_set_where_it_is_missing(mappings: Sequence[dict[str, Any]]) -> None:
    run("ADD", *mappings)
    nft("delete set inet hostport deleted")
    run("DEL")
    assert KEY not in ruleset()
    assert deleted() == {KEY}


@pytest.mark.parametrize("known", [[], ONE], ids=["without mappings", "with mappings"])
def test_del_of_what_is_not_installed_makes_the_set_for_mappings_only(known: Sequence[dict[str, Any]]) -> None:
    run("ADD", mapping(9090), container="c2")
    nft("delete set inet hostport deleted")
    run("DEL", *known)
    assert deleted() == ({KEY} if known else set())


@FEW_OR_MANY
def test_add_takes_its_own_key_out(mappings: Sequence[dict[str, Any]]) -> None:
    for container in ("c1", "c2"):
        run("ADD", *mappings, container=container)
        run("DEL", container=container)
    run("ADD", *mappings)
    assert deleted() == {OTHERS}
    run("CHECK", *mappings)


def test_an_add_that_takes_over_its_own_rules_takes_its_key_out() -> None:
    run("ADD", *ONE)
    nft(base.deleted_command("add", KEY))
    run("ADD", mapping(8081))
    assert deleted() == set()


def test_an_add_that_is_refused_leaves_the_key() -> None:
    run("ADD", *ONE)
    run("DEL")
    run("ADD", *ONE, container="c2")
    with pytest.raises(CNIError, match="taken by container c2"):
        run("ADD", *ONE)
    assert deleted() == {KEY}


def test_an_add_that_cannot_finish_leaves_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: Plan, _log: object) -> None:
        raise CNIError(Code.HOST_SETTING, f"cannot set route_localnet towards {plan.local_route_to}")

    monkeypatch.setattr(localnet, "open_for", fail)
    with pytest.raises(CNIError, match=r"towards 10\.1\.0\.2"):
        run("ADD", *ONE)
    assert KEY not in ruleset()
    assert deleted() == {KEY}


@pytest.mark.parametrize("command", ["CHECK", "STATUS"])
def test_keys_of_deleted_attachments_do_not_matter_to_others(command: str) -> None:
    run("ADD", *ONE)
    run("ADD", mapping(9090), container="c2")
    run("DEL", container="c2")
    for change in (RESTORE, base.deleted_command("add", KEY), "delete set inet hostport deleted"):
        nft(change)
        run(command, *ONE)


def test_gc_leaves_the_keys_of_what_it_removes_and_of_what_was_deleted_before() -> None:
    for container, port in (("c1", 8080), ("c2", 8081)):
        run("ADD", mapping(port), container=container)
    run("DEL", container="c2")
    none_valid: dict[str, Any] = {VALID_ATTACHMENTS: []}
    for _ in range(2):
        run("GC", **none_valid)
        assert deleted() == {KEY, OTHERS}


@pytest.mark.parametrize("known", [[], ONE], ids=["without mappings", "with mappings"])
def test_del_removes_what_is_restored_while_it_looks(
    monkeypatch: pytest.MonkeyPatch, known: Sequence[dict[str, Any]]
) -> None:
    find = Lookup.find
    run("ADD", mapping(9090), container="c2")
    nft(RESTORE)

    def find_before_it_is_restored(lookup: Lookup, key: str) -> Held | None:
        monkeypatch.setattr(Lookup, "find", find)
        held = lookup.find(key)
        run("ADD", *ONE)
        return held

    monkeypatch.setattr(Lookup, "find", find_before_it_is_restored)
    run("DEL", *known)
    assert KEY not in ruleset()
    assert deleted() == {names.RESTORING, KEY}


def test_the_lookup_tells_what_was_deleted() -> None:
    lookup = Lookup()
    assert (lookup.is_deleted(KEY), lookup.note_deletion(KEY)) == (False, False)
    nft("add table inet hostport; add set inet hostport deleted { type ipv6_addr; flags timeout; timeout 10m; }")
    assert (lookup.is_deleted(KEY), lookup.note_deletion(KEY)) == (False, True)
    assert (lookup.is_deleted(KEY), lookup.note_deletion(KEY)) == (True, True)
    assert not lookup.is_deleted(OTHERS)
    assert deleted() == {KEY}


def test_a_second_del_renews_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_DELETED_SET", base._DELETED_SET.replace("10m", "3s"))  # noqa: SLF001 - to be quick
    run("ADD", *ONE)
    for _ in range(3):
        run("DEL", *ONE)
        time.sleep(1.5)
    assert deleted() == {KEY}


@pytest.mark.parametrize("key", ["hostPort", "HostPort"])
def test_del_of_host_port_0_alone_creates_nothing(key: str) -> None:
    run("DEL", {key: 0, "containerPort": 80})
    assert ruleset() == ""


def test_del_leaves_the_key_in_a_table_that_an_older_version_declared() -> None:
    nft("table inet hostport { map hostports { type nf_proto . inet_proto . inet_service : verdict; }; }")
    run("DEL", *ONE)
    assert deleted() == {KEY}
