from lab import CLIENT4, CLIENT6, NODE4, NODE6, Node, mapping


def test_a_host_port_is_reached_from_outside_with_the_clients_address_kept(node: Node) -> None:
    pod = node.pod()
    for protocol in ("tcp", "udp"):
        pod.serve(protocol, 80, "web")
    node.add(pod, mapping(8080), mapping(8080, 80, "udp"), mapping(0, 81))
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    assert node.client.ask("tcp", NODE6, 8080) == f"web {CLIENT6}"
    assert node.client.ask("udp", NODE4, 8080) == f"web {CLIENT4}"
    assert node.client.ask("udp", NODE6, 8080) == f"web {CLIENT6}"
    assert node.ask("tcp", "127.0.0.1", 8080) == "web 10.88.0.1"
    node.delete(pod)
    assert not node.holds(pod)
    assert node.client.is_silent("tcp", NODE4, 8080)
