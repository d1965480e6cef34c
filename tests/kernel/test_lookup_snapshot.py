from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import scratch
from lab import mapping
from scratch import ADDRESSES, KEY, nft, run

from cni_hostport.attachment import Attachment
from cni_hostport.config import NetworkConfig
from cni_hostport.kernel.nft import Nft
from cni_hostport.kernel.snapshot import snapshot
from cni_hostport.lookup import Lookup
from cni_hostport.ruleset import base
from cni_hostport.ruleset.commands import attach_commands
from cni_hostport.ruleset.plan import Request

if TYPE_CHECKING:
    from collections.abc import Callable

BOTH = [mapping(8080), mapping(5353, 53, "udp", hostIP="192.0.2.1")]
KEYS: dict[str, Any] = {"conditionsV4": ["ip", "saddr", "!=", "203.0.113.0/24"]}
ELEMENT = f'ipv6 . tcp . 8080 comment "c1 eth0 /run/netns/c1" : goto dnat-{KEY}'
DELETE_8080 = "delete element inet hostport hostports { ipv4 . tcp . 8080 }"


def nothing() -> None:
    pass


def commands(*mappings: dict[str, Any], container: str = "c1", **keys: Any) -> list[str]:
    """Return what ADD would run."""
    config = NetworkConfig.parse(
        {
            "prevResult": {"ips": [{"address": address} for address in ADDRESSES[container]]},
            "runtimeConfig": {"portMappings": list(mappings)},
            **keys,
        }
    )
    attachment = Attachment("pods", container, "eth0", f"/run/netns/{container}", keys.get("pod", ""))
    return [
        *base.base_commands(),
        *attach_commands(attachment, Request(config, config.prev_result.addresses("eth0")).plan()),
    ]


def snapshot_of(installed: list[str], then: Callable[[], object] = nothing) -> object:
    """Install in an empty namespace, do something, and return what is seen of c1 then."""
    with scratch.namespace():
        Nft().run(installed)
        then()
        return snapshot(Lookup(), KEY)


def others() -> None:
    run("ADD", mapping(9090), container="c2", masqAll=True)
    run("ADD", mapping(9091), name="another", addresses=["10.1.0.9/24"])
    run("DEL", name="another")


pytestmark = pytest.mark.usefixtures("_kernel")


@pytest.mark.parametrize(
    "then",
    [
        nothing,
        others,
        lambda: Nft().run(base.base_commands()),
        lambda: (run("DEL"), run("ADD", *BOTH, **KEYS)),
        lambda: nft("add element inet hostport local_ip4 { 192.0.2.1 }"),
        lambda: nft("add element inet hostport deleted { ::1 }"),
        lambda: nft("delete set inet hostport deleted"),
        lambda: nft("add table inet foreign; add chain inet foreign x { type filter hook input priority 0; }"),
    ],
    ids=[
        "nothing",
        "others",
        "base again",
        "added again",
        "learnt addresses",
        "a deleted attachment",
        "no deleted attachments",
        "another table",
    ],
)
def test_the_same_plan_is_seen_alike_everywhere(then: Callable[[], object]) -> None:
    installed = commands(*BOTH, **KEYS)
    expected = snapshot_of(installed)
    assert expected is not None
    assert snapshot_of(installed, then) == expected


def test_what_only_tells_a_person_is_not_compared() -> None:
    installed = commands(*BOTH, pod="shop/web")
    unlabelled = [
        command.replace("/run/netns/c1", "").replace('comment "shop/web"', "").replace('comment "pods"', "")
        for command in installed
    ]
    assert unlabelled != installed
    assert snapshot_of(installed) == snapshot_of(unlabelled) is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("dnat ip to 10.1.0.2:80", "dnat ip to 10.1.0.2:81"),
        ("dnat ip to 10.1.0.2:80", "dnat ip to 10.1.0.3:80"),
        ("dnat ip6 to [fd00::2]:80", "dnat ip6 to [fd00::3]:80"),
        ("dnat ip6 to", "counter dnat ip6 to"),
        ("dport 8080 dnat", "dport 8081 dnat"),
        ("ip daddr 192.0.2.1 meta l4proto udp", "meta l4proto udp"),
        ("203.0.113.0/24", "203.0.113.0/25"),
        ("ip saddr != 203.0.113.0/24", ""),
        ("ip saddr != 203.0.113.0/24", "ip saddr 203.0.113.0/24"),
        ("saddr 10.1.0.0/24 masquerade", "saddr 10.1.0.0/25 masquerade"),
        ("saddr 10.1.0.0/24 masquerade", "saddr 10.1.0.0/24 masquerade random"),
        (ELEMENT, ELEMENT.replace("8080", "8081")),
        (ELEMENT, ELEMENT.replace("goto", "jump")),
        (ELEMENT, f"{ELEMENT}, ipv4 . tcp . 99 : goto dnat-{KEY}"),
        ('10.1.0.2 comment "pods"', '10.1.0.3 comment "pods"'),
        ("priority srcnat", "priority srcnat + 1"),
        ("priority dstnat + 1", "priority dstnat"),
        ("hook output priority -99; policy accept", "hook output priority -99; policy drop"),
        ("type filter hook prerouting priority raw", "type filter hook input priority raw"),
        ("hostport loopback { type filter hook prerouting priority raw; policy accept; }", "hostport loopback"),
        ("flags dynamic,timeout; timeout 1m;", "flags dynamic,timeout; timeout 2m;"),
        ("flags dynamic,timeout; timeout 1m;", "flags dynamic,timeout;"),
        ('comment "CNI hostport plugin";', "flags dormant;"),
        ("goto dispatch", "jump dispatch"),
        ("127.0.0.0/8 drop", "127.0.0.0/8 accept"),
        ("vmap @hostports_ip4", "vmap @hostports_ip4 counter"),
    ],
)  # fmt: skip
def test_what_was_installed_otherwise_differs(old: str, new: str) -> None:
    text = "\n".join(commands(*BOTH, **KEYS))
    assert old in text
    assert snapshot_of(text.splitlines()) != snapshot_of(text.replace(old, new).splitlines())


@pytest.mark.parametrize(
    "damage",
    [
        DELETE_8080,
        "delete element inet hostport hostports_ip4 { 192.0.2.1 . udp . 5353 }",
        "delete element inet hostport pods_ip6 { fd00::2 }",
        "flush map inet hostport hostports",
        "add element inet hostport hostports { ipv4 . tcp . 99 : goto dnat-KEY }",
        "add element inet hostport hostports_ip6 { 2001:db8::1 . tcp . 99 : goto dnat-KEY }",
        "add element inet hostport pods_ip4 { 10.1.0.99 : goto masq-KEY }",
        "insert rule inet hostport dnat-KEY accept",
        "insert rule inet hostport dnat-KEY ip saddr 203.0.113.7 tcp dport 8080 drop",
        "add rule inet hostport masq-KEY counter",
        "flush chain inet hostport dnat-KEY",
        "flush chain inet hostport masq-KEY",
        *(f"{verb} chain inet hostport {name}" for verb in ("flush", "delete") for name in ("output", "loopback")),
        "flush chain inet hostport dispatch",
        "insert rule inet hostport dispatch tcp dport 8080 return",
        "add chain inet hostport postrouting { policy drop; }",
        "add table inet hostport { flags dormant; }",
        "flush table inet hostport",
        "delete table inet hostport",
        "flush chain inet hostport dispatch; delete map inet hostport hostports_ip6",
        "delete chain inet hostport output; add chain inet hostport output { type nat hook output priority -99; }",
        f"{DELETE_8080}; add element inet hostport hostports {{ ipv4 . tcp . 8080 : drop }}",
        f"{DELETE_8080}; add element inet hostport hostports {{ ipv4 . tcp . 99 : goto dnat-KEY }}",
    ],
)
def test_what_was_changed_since_differs(damage: str) -> None:
    installed = commands(*BOTH, **KEYS)
    assert snapshot_of(installed, lambda: nft(damage)) != snapshot_of(installed)


def test_a_port_that_is_another_pods_by_now_differs() -> None:
    installed = commands(*BOTH, **KEYS)

    def lose() -> None:
        nft("delete element inet hostport hostports { ipv4 . tcp . 8080, ipv6 . tcp . 8080 }")
        run("ADD", mapping(8080), container="c2")

    assert snapshot_of(installed, lose) != snapshot_of(installed)


@pytest.mark.parametrize(
    ("mappings", "keys"),
    [
        ([mapping(port) for port in range(8000, 8017)], {}),
        (BOTH, {"conditionsV4": ["ip", "saddr", "{", "192.0.2.2,", "192.0.2.3", "}"]}),
    ],
    ids=["more mappings than rules", "set in a condition"],
)
def test_a_rule_with_a_map_of_its_own_cannot_be_compared(mappings: list[dict[str, Any]], keys: dict[str, Any]) -> None:
    assert snapshot_of(commands(*mappings, **keys)) is None
