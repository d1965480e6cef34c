from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from lab import CLIENT4, Namespace, Node, mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

REMOTE, SECOND, GATEWAY = "203.0.113.9", "198.51.100.1", "198.51.100.2"


@pytest.fixture
def remote(node: Node) -> Iterator[Namespace]:
    """Have a client beyond a second uplink of the node, whose default route is by the first one."""
    with Namespace("remote") as made:
        node.ip(f"link add uplink2 type veth peer name uplink2 netns {made.name}")
        node.ip(f"addr add {SECOND}/24 dev uplink2", "link set uplink2 up", f"route add default via {CLIENT4}")
        made.ip(f"addr add {GATEWAY}/24 dev uplink2", f"addr add {REMOTE}/32 dev lo", "link set uplink2 up")
        node.set_sysctl("net/ipv4/conf/uplink2/rp_filter", 2)
        node.ip(f"rule add from {SECOND} lookup 102", f"route add default via {GATEWAY} dev uplink2 table 102")
        yield made


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_answers_leave_by_the_second_uplink_where_connections_carry_its_mark(
    node: Node, remote: Namespace, protocol: str
) -> None:
    pod = node.pod(4)
    pod.serve(protocol, 80, "web")
    node.serve(protocol, 9000, "node", SECOND)
    node.add(pod, mapping(8080, 80, protocol))
    assert remote.ask(protocol, SECOND, 9000, source=REMOTE).startswith("node ")
    assert remote.is_silent(protocol, SECOND, 8080, source=REMOTE)
    node.nft_file("""
        table inet uplinks {
            chain prerouting {
                type filter hook prerouting priority mangle;
                iifname "uplink2" ct state new ct mark set 102
                iifname != "uplink2" ct mark 102 meta mark set 102
            }
        }
    """)
    node.ip("rule add fwmark 102 lookup 102")
    assert remote.ask(protocol, SECOND, 8080, source=REMOTE) == f"web {REMOTE}"


def test_a_broadcast_is_not_for_a_host_port(node: Node) -> None:
    pod = node.pod(4)
    pod.serve("udp", 80, "web")
    node.add(pod, mapping(8080, 80, "udp"))
    with node.client.socket("udp", CLIENT4) as sender:
        sender.setsockopt(1, 6, 1)  # SOL_SOCKET, SO_BROADCAST
        sender.settimeout(0.4)
        sender.sendto(b"?", ("192.0.2.255", 8080))
        with pytest.raises(TimeoutError):
            sender.recv(64)
