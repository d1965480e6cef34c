from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from dynamic_ports import given
from lab import CLIENT4, CLIENT6, NODE4, NODE6
from runtimes.containerd import IPV4, REFUSED, Containerd, mapped, port
from runtimes.cri import CRIError
from runtimes.host import wait_for

from cni_hostport.dynamic_ports import keys

PORT, OTHER = 8080, 8081


def test_what_a_sandbox_serves_is_reached_from_outside_on_both_families(containerd: Containerd) -> None:
    node = containerd.host.node
    sandbox = containerd.run("web", port(PORT), port(0, 9090), port(5353, 53, "UDP"), port(0, 53, "UDP"))
    sandbox.namespace.serve("tcp", 80, "web")
    sandbox.namespace.serve("udp", 53, "dns")
    for address, client in ((NODE4, CLIENT4), (NODE6, CLIENT6)):
        assert node.client.ask("tcp", address, PORT) == f"web {client}"
        assert node.client.ask("udp", address, 5353) == f"dns {client}"
    assert mapped(node) == ["ipv4 . tcp . 8080", "ipv4 . udp . 5353", "ipv6 . tcp . 8080", "ipv6 . udp . 5353"]

    containerd.stop(sandbox)
    assert mapped(node) == []
    assert "dnat-" not in node.ruleset()
    assert node.client.is_silent("tcp", NODE4, PORT)
    assert node.client.is_silent("udp", NODE6, 5353)


def test_a_sandbox_of_an_ipv4_network_is_reached_on_ipv4(containerd: Containerd) -> None:
    node = containerd.host.node
    sandbox = containerd.run("web", port(PORT), port(0, 81), network=IPV4)
    sandbox.namespace.serve("tcp", 80, "web")
    assert mapped(node) == ["ipv4 . tcp . 8080"]
    assert node.client.ask("tcp", NODE4, PORT) == f"web {CLIENT4}"
    assert node.client.is_silent("tcp", NODE6, PORT)


def test_a_sandbox_has_the_dynamic_ports_for_which_its_annotation_asks(containerd: Containerd) -> None:
    node = containerd.host.node
    sandbox = containerd.run("web", **{keys.REQUEST: "80, 53/udp", "other": "x"})
    sandbox.namespace.serve("tcp", 80, "web")
    ports = given(node)["web-uid"]
    assert ports.keys() == {"80/tcp", "53/udp"}
    assert node.client.ask("tcp", NODE4, ports["80/tcp"]) == f"web {CLIENT4}"
    file = "/run/hostport/pods/web-uid/dynamic-ports.json"
    assert json.loads(containerd.host.run("cat", file).stdout)["80/tcp"] == {"hostPort": ports["80/tcp"]}
    containerd.run("silent", port(PORT), other="x")
    assert [*given(node)] == ["web-uid"]
    with pytest.raises(CRIError, match="these are 17, and dynamicPortsPerPod allows 16"):
        containerd.run("greedy", **{keys.REQUEST: "1-17"})
    containerd.stop(sandbox)
    assert given(node) == {}
    assert containerd.host.run("ls", "/run/hostport/pods").stdout == ""


def test_an_sctp_port_is_translated(containerd: Containerd) -> None:
    containerd.run("signalling", port(5000, 5001, "SCTP"), port(0, 5002, "SCTP"))
    ruleset = containerd.host.node.ruleset()
    assert mapped(containerd.host.node) == ["ipv4 . sctp . 5000", "ipv6 . sctp . 5000"]
    assert "ipv4 sctp dport 5000 dnat ip to 10.88." in ruleset
    assert "ipv6 sctp dport 5000 dnat ip6 to [fd00:88::" in ruleset
    assert "5002" not in ruleset


def test_a_mapping_with_a_host_address_is_reached_there_only(containerd: Containerd) -> None:
    node = containerd.host.node
    mappings = [port(PORT, 80, "TCP", NODE4), port(PORT, 81, "TCP", NODE6), port(OTHER, 80, "TCP", "127.0.0.1")]
    sandbox = containerd.run("web", *mappings, port(0, 80, "TCP", NODE4))
    sandbox.namespace.serve("tcp", 80, "first")
    sandbox.namespace.serve("tcp", 81, "second")
    assert node.client.ask("tcp", NODE4, PORT) == f"first {CLIENT4}"
    assert node.client.ask("tcp", NODE6, PORT) == f"second {CLIENT6}"
    assert node.ask("tcp", "127.0.0.1", OTHER).startswith("first ")
    assert node.is_silent("tcp", "127.0.0.1", PORT)
    assert node.client.is_silent("tcp", NODE4, OTHER)


def test_three_pods_share_one_port_on_two_addresses_and_two_protocols(containerd: Containerd) -> None:
    node = containerd.host.node
    places = {"pod1": ("TCP", "127.0.0.1"), "pod2": ("TCP", NODE4), "pod3": ("UDP", NODE4)}
    for name, (protocol, host_ip) in places.items():
        sandbox = containerd.run(name, port(54323, 8080, protocol, host_ip))
        sandbox.namespace.serve(protocol.lower(), 8080, name)
    assert node.ask("tcp", "127.0.0.1", 54323).startswith("pod1 ")
    for asking in (node, node.client):
        assert asking.ask("tcp", NODE4, 54323).startswith("pod2 ")
        assert asking.ask("udp", NODE4, 54323).startswith("pod3 ")


def test_a_sandbox_is_stopped_and_removed_any_number_of_times(containerd: Containerd) -> None:
    sandbox = containerd.run("web", port(PORT))
    for _ in range(2):
        containerd.stop(sandbox)
        assert "dnat-" not in containerd.host.node.ruleset()
    for _ in range(2):
        containerd.remove(sandbox)
    assert containerd.calls(sandbox) == [("ADD", sandbox.netns), ("DEL", sandbox.netns), ("DEL", ""), ("DEL", "")]
    assert containerd.sandboxes() == {}


def test_a_sandbox_is_unmapped_though_the_runtime_lost_what_it_knew_of_its_network(containerd: Containerd) -> None:
    sandbox = containerd.run("web", port(PORT))
    containerd.host.run("rm", "-r", "/var/lib/cni/results")
    containerd.stop(sandbox)
    assert "dnat-" not in containerd.host.node.ruleset()


def test_a_sandbox_whose_namespace_is_gone_is_unmapped_and_removed(containerd: Containerd) -> None:
    node = containerd.host.node
    sandbox, other = containerd.run("web", port(PORT)), containerd.run("other", port(OTHER))
    containerd.host.run("ip", "netns", "del", sandbox.netns.rpartition("/")[2])
    containerd.stop(sandbox)
    assert mapped(node) == ["ipv4 . tcp . 8081", "ipv6 . tcp . 8081"]
    containerd.remove(sandbox)
    assert containerd.sandboxes() == {"other": other.id}


def test_a_killed_containerd_unmaps_after_its_restart_what_it_mapped_before(containerd: Containerd) -> None:
    node = containerd.host.node
    sandbox = containerd.run("web", port(PORT), port(0, 81))
    sandbox.namespace.serve("tcp", 80, "web")
    containerd.kill()
    assert node.client.ask("tcp", NODE4, PORT) == f"web {CLIENT4}"
    containerd.start()
    assert node.client.ask("tcp", NODE6, PORT) == f"web {CLIENT6}"
    containerd.stop(sandbox)
    assert mapped(node) == []
    assert "dnat-" not in node.ruleset()
    containerd.remove(sandbox)


def test_a_containerd_killed_while_sandboxes_start_leaves_no_port_behind_once_they_are_removed(
    containerd: Containerd,
) -> None:
    node = containerd.host.node
    with ThreadPoolExecutor(8) as kubelet:
        starting = [kubelet.submit(containerd.run, f"pod{number}", port(number)) for number in range(8100, 8108)]
        wait_for(lambda: mapped(node), containerd.log)
        containerd.kill()
        assert any(isinstance(sandbox.exception(), CRIError) for sandbox in starting)
    containerd.start()
    containerd.clear()
    assert mapped(node) == []
    assert "dnat-" not in node.ruleset()
    assert containerd.sandboxes() == {}


def test_a_sandbox_on_a_taken_port_fails_with_its_holder_named_and_starts_once_that_is_gone(
    containerd: Containerd,
) -> None:
    node = containerd.host.node
    first = containerd.run("first", port(PORT))
    with pytest.raises(CRIError) as refused:
        containerd.run("second", port(OTHER), port(PORT))
    assert f"host port 8080/tcp is taken by pod test/first, container {first.id[:12]} (eth0)" in str(refused.value)
    assert mapped(node) == ["ipv4 . tcp . 8080", "ipv6 . tcp . 8080"]
    assert containerd.sandboxes() == {"first": first.id}

    containerd.stop(first)
    assert mapped(node) == []
    second = containerd.run("second", port(OTHER), port(PORT))
    second.namespace.serve("tcp", 80, "second")
    for host_port in (PORT, OTHER):
        assert node.client.ask("tcp", NODE4, host_port) == f"second {CLIENT4}"


def test_a_sandbox_with_a_contradiction_in_its_ports_fails_with_a_sentence_about_it(containerd: Containerd) -> None:
    with pytest.raises(CRIError, match="host port 8080/tcp is mapped to two container ports, 80 and 81"):
        containerd.run("web", port(PORT, 80), port(PORT, 81))
    assert "dnat-" not in containerd.host.node.ruleset()
    assert containerd.sandboxes() == {}


def test_a_sandbox_that_fails_after_its_ports_were_mapped_leaves_nothing(containerd: Containerd) -> None:
    with pytest.raises(CRIError, match="refused while 8080 was mapped"):
        containerd.run("web", port(PORT), network=REFUSED)
    assert mapped(containerd.host.node) == []
    assert "dnat-" not in containerd.host.node.ruleset()
    assert containerd.sandboxes() == {}


def test_twenty_sandboxes_start_and_stop_at_once(containerd: Containerd) -> None:
    node, ports = containerd.host.node, range(8100, 8120)
    with ThreadPoolExecutor(len(ports)) as kubelet:
        sandboxes = list(kubelet.map(lambda number: containerd.run(f"pod{number}", port(number), port(0, 81)), ports))
        for number, sandbox in zip(ports, sandboxes, strict=True):
            sandbox.namespace.serve("tcp", 80, f"pod{number}")
        for number in ports:
            assert node.client.ask("tcp", NODE4, number) == f"pod{number} {CLIENT4}"
            assert node.client.ask("tcp", NODE6, number) == f"pod{number} {CLIENT6}"
        list(kubelet.map(containerd.stop, sandboxes))
        assert mapped(node) == []
        assert "dnat-" not in node.ruleset()
        list(kubelet.map(containerd.remove, sandboxes))
    assert containerd.sandboxes() == {}


def test_containerd_is_not_ready_while_the_plugin_says_that_host_ports_are_not_available(
    newest_containerd: Containerd,
) -> None:
    launcher = newest_containerd.executable.read_text()
    newest_containerd.replace_plugin(launcher.replace("exec ", "exec setpriv --bounding-set=-net_admin "))
    assert not newest_containerd.is_ready()
    condition = newest_containerd.conditions()["NetworkReady"]
    assert "host ports are not available: nftables cannot be used on this node" in condition["message"]
    newest_containerd.replace_plugin(launcher)
    assert newest_containerd.is_ready()
