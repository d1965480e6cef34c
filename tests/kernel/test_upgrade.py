from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import node_process
import pytest
from all_processes import SEES_ALL
from kernel.test_security import attacker
from lab import BRIDGE4, CLIENT4, CLIENT6, NODE4, NODE6, Node, alike, config, mapping, wait
from resident import eventually
from tcp_connection import Conversation

from cni_hostport import upgrade
from cni_hostport.kernel.nft import Nft

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lab import Namespace

BASE_CHAINS = ("dispatch", "prerouting", "output", "postrouting", "loopback")
SETS = ("local_ip4", "local_ip6", "deleted")
MAPS = ("hostports", "hostports_ip4", "hostports_ip6", "pods_ip4", "pods_ip6")
OLDER = {
    "a rule is missing": "flush chain inet hostport loopback;"
    'add rule inet hostport loopback iifname != "lo" ip daddr 127.0.0.0/8 drop;',
    "a rule has another form": "flush chain inet hostport postrouting;"
    "add rule inet hostport postrouting ct status dnat counter ip daddr vmap @pods_ip4;"
    "add rule inet hostport postrouting ct status dnat counter ip6 daddr vmap @pods_ip6;",
    "the loopback interface is named by its index": "flush chain inet hostport prerouting;"
    'add rule inet hostport prerouting iif != "lo" ip daddr 127.0.0.0/8 return;'
    "add rule inet hostport prerouting fib daddr type local goto dispatch;",
    "there is a rule more": "add rule inet hostport output counter;",
    "rules stand in another order": "flush chain inet hostport dispatch;"
    "add rule inet hostport dispatch meta nfproto . meta l4proto . th dport vmap @hostports;"
    "add rule inet hostport dispatch ip daddr . meta l4proto . th dport vmap @hostports_ip4;",
    "a base chain is missing": "delete chain inet hostport loopback;",
    "a map is missing": "flush chain inet hostport dispatch; delete map inet hostport hostports_ip6;"
    "add rule inet hostport dispatch ip daddr . meta l4proto . th dport vmap @hostports_ip4;"
    "add rule inet hostport dispatch meta nfproto . meta l4proto . th dport vmap @hostports;",
    "deleted attachments are not remembered": "delete set inet hostport deleted;",
    "a base chain has another policy": "delete chain inet hostport loopback;"
    "add chain inet hostport loopback { type filter hook prerouting priority raw; policy drop; };"
    "add rule inet hostport loopback accept;",
}


def base(node: Node) -> list[str]:
    """Return the base chains and the declarations of maps and sets as nft prints them."""
    chains = [f"-s list chain inet hostport {name}" for name in BASE_CHAINS]
    maps = [f"-t list map inet hostport {name}" for name in MAPS]
    sets = [f"-t list set inet hostport {name}" for name in SETS]
    return [alike(node.run("nft", *command.split(), check=False).stdout) for command in (*chains, *maps, *sets)]


@pytest.fixture
def newest() -> list[str]:
    with Node() as fresh:
        fresh.add(fresh.pod(), mapping(8080))
        return base(fresh)


@pytest.mark.parametrize("difference", OLDER)
def test_an_older_ruleset_is_upgraded_by_the_next_add_under_open_connections(
    node: Node, newest: list[str], difference: str
) -> None:
    old, new = node.pod(), node.pod()
    mappings = [mapping(8080), mapping(8888, 8888), mapping(5353, 53, "udp", hostIP=NODE4)]
    for pod, name in ((old, "old"), (new, "new")):
        pod.serve("tcp", 80, name)
        pod.serve("udp", 53, name)
    node.add(old, *mappings)
    node.nft_file(OLDER[difference])
    assert base(node) != newest
    with Conversation(node.client, NODE4, 8888, old) as four, Conversation(node.client, NODE6, 8888, old) as six:
        node.add(new, mapping(9090))
        assert four.goes_on()
        assert six.goes_on()
    for address, client in ((NODE4, CLIENT4), (NODE6, CLIENT6)):
        assert node.client.ask("tcp", address, 8080) == f"old {client}"
        assert node.client.ask("tcp", address, 9090) == f"new {client}"
    assert node.client.ask("udp", NODE4, 5353) == f"old {CLIENT4}"
    assert base(node) == newest
    for pod, installed in ((old, mappings), (new, [mapping(9090)])):
        checked = node.cni("CHECK", pod, config(pod, *installed))
        assert not checked.status, checked
    node.delete(old)
    assert node.client.is_silent("tcp", NODE4, 8080)


def make_older(node: Node) -> None:
    """Put a node's table into the form that it had when maps did not count and pods' addresses named no network."""
    listed = node.nft("list table inet hostport")
    older = re.sub(r"\tcounter\n", "\n", re.sub(r" counter packets \d+ bytes \d+", "", listed))
    node.nft("delete table inet hostport")
    node.nft_file(re.sub(r'(\[?[\da-f.:]+\]?) comment "\w+" : goto masq', r"\1 : goto masq", older))


def test_maps_that_an_older_version_declared_otherwise_are_made_anew_with_all_that_is_in_them(node: Node) -> None:
    old, other, new = node.pod(), node.pod(), node.pod()
    mappings = [mapping(8080), mapping(5353, 53, "udp", hostIP=NODE4), mapping(8080, hostIP=NODE6)]
    for pod, name in ((old, "old"), (new, "new")):
        pod.serve("tcp", 80, name)
        pod.serve("udp", 53, name)
    node.add(old, *mappings)
    node.add(other, mapping(9999), name="another")
    make_older(node)
    before = {pod.id: node.footprint(pod, network) for pod, network in ((old, "pods"), (other, "another"))}
    status = node.cni("STATUS", None, {"cniVersion": "1.1.0", "name": "pods"})
    assert status.status == 0, status
    assert "counter" not in node.nft("list maps")
    assert node.add(new, mapping(9090)).status == 0
    assert node.nft("list maps").count("counter\n") == 3
    assert {pod.id: node.footprint(pod, network) for pod, network in ((old, "pods"), (other, "another"))} == before
    assert node.client.ask("tcp", NODE4, 8080) == f"old {CLIENT4}"
    assert node.client.ask("udp", NODE4, 5353) == f"old {CLIENT4}"
    assert node.client.ask("tcp", NODE4, 9090) == f"new {CLIENT4}"
    assert 'comment "' + old.id in node.ruleset()
    for pod, installed in ((old, mappings), (new, [mapping(9090)])):
        checked = node.cni("CHECK", pod, config(pod, *installed))
        assert not checked.status, checked
    node.delete(old)
    assert not node.footprint(old)


def put_ahead(node: Node) -> None:
    """Put a node's table into the form that it had when its hooks were ahead of all others', and its guard everywhere.

    It then held no identities of namespaces, nobody who waits, and no addresses of Services.
    """
    listed = node.nft("list table inet hostport")
    later = r"\t(map|set|chain) (waiting_\w+|localnet\S*|ipvs_ip\d) \{.*?\n\t\}\n"
    older = re.sub(later, "", listed, flags=re.DOTALL)
    older = re.sub(r"\t\t(ip6? daddr (@ipvs_ip\d|fe80::/10)|iif(name)? != \"lo\" .*) return\n", "", older)
    older = re.sub(r'(comment "\S+ [^@ ]+)@[\d:]+ \d+:\d+', r"\1", older).replace("iif @localnet", 'iifname != "lo"')
    older = older.replace("priority dstnat + 1", "priority dstnat - 1").replace("priority -99", "priority -101")
    node.nft("delete table inet hostport")
    node.nft_file(older)


@contextmanager
def asked_all_the_time(asking: Namespace, address: str, port: int) -> Iterator[list[str]]:
    """Have new connections opened, one after the other, during the block; what they are told comes in a list."""
    heard: list[str] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                heard.append(asking.ask("tcp", address, port))
            except OSError as error:
                heard.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert eventually(lambda: heard)
        yield heard
        reached = len(heard)
        assert eventually(lambda: len(heard) > reached + 2)
    finally:
        over.set()
        thread.join()


def test_a_table_ahead_of_others_moves_behind_them_without_a_lost_or_misled_connection(
    node: Node, newest: list[str]
) -> None:
    old, new = node.pod(), node.pod()
    old.serve("tcp", 80, "old")
    mappings = [mapping(8080), mapping(8888, 8888), mapping(5353, 53, "udp", hostIP=NODE4)]
    node.add(old, *mappings)
    for _ in range(5):
        put_ahead(node)
        assert base(node) != newest
        assert node.cni("STATUS", None, {"cniVersion": "1.1.0", "name": "pods"}).status == 0
        with (
            Conversation(node.client, NODE4, 8888, old) as four,
            Conversation(node.client, NODE6, 8888, old) as six,
            asked_all_the_time(node.client, NODE4, 8080) as outside4,
            asked_all_the_time(node.client, NODE6, 8080) as outside6,
            asked_all_the_time(node, "127.0.0.1", 8080) as within,
        ):
            node.add(new, mapping(9090))
            assert four.goes_on()
            assert six.goes_on()
        assert set(outside4) == {f"old {CLIENT4}"}
        assert set(outside6) == {f"old {CLIENT6}"}
        assert set(within) == {f"old {BRIDGE4}"}
        assert base(node) == newest
        for pod, installed in ((old, mappings), (new, [mapping(9090)])):
            checked = node.cni("CHECK", pod, config(pod, *installed))
            assert not checked.status, checked
        node.delete(new)
    node.delete(old)
    assert not node.footprint(old)
    assert node.client.is_silent("tcp", NODE4, 8080)


def test_somebody_elses_translation_wins_once_a_table_is_upgraded(node: Node) -> None:
    old, other = node.pod(), node.pod()
    old.serve("tcp", 80, "old")
    other.serve("tcp", 80, "other")
    node.add(old, mapping(30080), mapping(8080))
    put_ahead(node)
    theirs = f"ip daddr {NODE4} tcp dport 30080 dnat ip to {other.ip4}:80;"
    node.nft_file(f"table inet others {{ chain c {{ type nat hook prerouting priority dstnat; {theirs} }}; }}")
    assert node.client.ask("tcp", NODE4, 30080) == f"old {CLIENT4}"
    node.add(node.pod(), mapping(9090))
    assert node.client.ask("tcp", NODE4, 30080) == f"other {CLIENT4}"
    assert node.client.ask("tcp", NODE4, 8080) == f"old {CLIENT4}"


@pytest.mark.parametrize("is_there", [True, False], ids=["a-pod-is-there", "all-pods-are-gone"])
def test_what_an_older_version_opened_is_guarded_and_in_the_end_closed(node: Node, is_there: bool) -> None:
    neighbour, old, new = attacker(node, "bridge"), node.pod(), node.pod()
    node.serve("tcp", 9000, "private", "127.0.0.1")
    node.add(old, mapping(8080))
    put_ahead(node)
    if not is_there:
        node.delete(old)
    assert node.get_sysctl("net/ipv4/conf/cni0/route_localnet") == "1"
    assert neighbour.is_silent("tcp", "127.0.0.1", 9000)
    node.add(new, mapping(9090))
    assert neighbour.is_silent("tcp", "127.0.0.1", 9000)
    node.delete(new)
    assert neighbour.is_silent("tcp", "127.0.0.1", 9000)
    node.delete(old)
    assert neighbour.is_silent("tcp", "127.0.0.1", 9000)
    assert node.get_sysctl("net/ipv4/conf/cni0/route_localnet") == "0"


def test_pods_of_an_older_table_go_before_it_is_upgraded(node: Node) -> None:
    pods = [node.pod(4) for _ in range(3)]
    for number, pod in enumerate(pods):
        pod.serve("tcp", 80, f"pod{number}")
        node.add(pod, mapping(8000 + number))
    put_ahead(node)
    node.delete(pods[0])
    assert not node.footprint(pods[0])
    assert node.client.is_silent("tcp", NODE4, 8000)
    pods[1].remove()
    node.launcher = SEES_ALL
    node.add(node.pod(4), mapping(8001))
    assert not node.footprint(pods[1])
    assert node.client.ask("tcp", NODE4, 8002) == f"pod2 {CLIENT4}"


def test_an_attachment_that_goes_while_its_table_is_upgraded_leaves_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = node.pod()
    node.add(old, mapping(8080))
    put_ahead(node)
    with node_process.on(node):
        nft = Nft()
        run = nft.run

        def late(commands: Sequence[str]) -> None:
            node.delete(old)
            run(commands)

        monkeypatch.setattr(nft, "run", late)
        upgrade.declare_again(nft)
    node.add(old, mapping(8080))
    assert node.get_sysctl("net/ipv4/conf/cni0/route_localnet") == "1"
    node.delete(old)
    assert not node.footprint(old)
    assert "elements" not in node.nft("list map inet hostport localnet_needs")


@pytest.mark.parametrize("age", [make_older, put_ahead])
def test_many_calls_at_once_on_an_older_table_all_do_what_they_should(node: Node, age: Callable[[Node], None]) -> None:
    going, coming, stays = [node.pod(4) for _ in range(8)], [node.pod(4) for _ in range(8)], node.pod(4)
    stays.serve("tcp", 80, "stays")
    for _ in range(3):
        for number, pod in enumerate([*going, stays]):
            node.add(pod, mapping(8000 + number))
        age(node)
        with asked_all_the_time(node.client, NODE4, 8008) as heard:
            calls = [node.start("ADD", pod, config(pod, mapping(9000 + number))) for number, pod in enumerate(coming)]
            calls += [node.start("DEL", pod, config(pod)) for pod in going]
            outcomes = [wait(call) for call in calls]
        assert [outcome.status for outcome in outcomes] == [0] * 16, outcomes
        assert set(heard) == {f"stays {CLIENT4}"}
        for number, pod in enumerate(coming):
            checked = node.cni("CHECK", pod, config(pod, mapping(9000 + number)))
            assert not checked.status, checked
        assert not any(node.footprint(pod) for pod in going)
        for pod in coming:
            node.delete(pod)
