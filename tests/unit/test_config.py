from __future__ import annotations

from ipaddress import ip_address, ip_interface
from typing import Any

import pytest
from lab import mapping, result

from cni_hostport.config import NetworkConfig
from cni_hostport.errors import CNIError

ANY4 = "0.0.0.0"
BOTH = [ip_interface("10.1.0.2/24"), ip_interface("fd00::2/64")]


def parse(**keys: Any) -> NetworkConfig:
    return NetworkConfig.parse({"cniVersion": "1.1.0", "name": "pods", "prevResult": result(), **keys})


def mapped(*mappings: object) -> list[str]:
    return [f"{port}:{port.container_port}" for port in parse(runtimeConfig={"portMappings": list(mappings)}).mappings]


def refusal(**keys: Any) -> str:
    with pytest.raises(CNIError) as caught:
        parse(**keys)
    assert caught.value.code == 7
    return caught.value.msg


def mapping_refusal(*mappings: object) -> str:
    return refusal(runtimeConfig={"portMappings": list(mappings)}).removeprefix("runtimeConfig.portMappings")


def addresses(**keys: Any) -> list[Any]:
    return parse(prevResult=keys).prev_result.addresses("eth0")


@pytest.mark.parametrize("keys", [{}, dict.fromkeys(["snat", "masqAll", "backend", "conditionsV4", "conditionsV6"])])
def test_every_key_has_a_default_which_null_means_as_well(keys: dict[str, None]) -> None:
    config = parse(**keys, runtimeConfig=None, markMasqBit=None, externalSetMarkChain=None)
    assert (config.snat, config.masq_all, config.backend) == (True, False, "nftables")
    assert (config.conditions_v4, config.conditions_v6, config.mappings) == ((), (), ())


def test_every_key_is_read() -> None:
    tokens = ["ip", "saddr", "{", "192.0.2.0/24,", "198.51.100.7", "}"]
    config = parse(
        snat=False, masqAll=True, backend="nftables", markMasqBit=31, conditionsV4=tokens, conditionsV6=["iif", '"lo"'],
        capabilities={"portMappings": True}, unknown={"x": 1}, runtimeConfig={"bandwidth": None, "portMappings": []},
    )  # fmt: skip
    assert (config.snat, config.masq_all, config.mark_masq_bit) == (False, True, 31)
    assert (config.conditions_v4, config.conditions_v6) == (tuple(tokens), ("iif", '"lo"'))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("snat", "yes"), ("snat", 1), ("masqAll", "true"), ("masqAll", []),
        ("backend", "iptables"), ("backend", ""), ("backend", 5),
        ("waitForHolder", 21), ("waitForHolder", -1), ("waitForHolder", "5"), ("waitForHolder", True),
        ("waitForHolder", 2.0),
        ("markMasqBit", 32), ("markMasqBit", -1), ("markMasqBit", "5"), ("markMasqBit", True), ("markMasqBit", 2.0),
        ("externalSetMarkChain", "KUBE-MARK-MASQ"), ("externalSetMarkChain", ""),
        ("runtimeConfig", "x"), ("runtimeConfig", 5), ("prevResult", "x"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_key_and_value(key: str, value: object) -> None:
    assert refusal(**{key: value}).startswith(f"{key} {value!r} is ")


@pytest.mark.parametrize(
    "value", ["192.0.2.1", "192.0.2.0/33", "2001:db8::/129", "fe80::%eth0/64", "all", "", "10.0.0.0/", 7, None, [], {}]
)
def test_a_host_address_that_is_no_cidr_is_refused_by_place_and_value(value: object) -> None:
    wrong = refusal(hostAddresses=["192.0.2.0/24", value])
    assert wrong == f"hostAddresses[1] {value!r} is not a CIDR, such as 192.0.2.0/24 or 2001:db8::/64"


@pytest.mark.parametrize("value", ["192.0.2.0/24", 7, True, {"192.0.2.0/24": None}])
def test_host_addresses_that_are_no_list_are_refused_by_key_and_value(value: object) -> None:
    assert refusal(hostAddresses=value) == f"hostAddresses {value!r} is not a list"


@pytest.mark.parametrize("value", [None, []])
def test_no_host_addresses_are_no_limit(value: object) -> None:
    assert parse(hostAddresses=value).host_addresses == ()


@pytest.mark.parametrize("key", ["conditionsV4", "conditionsV6"])
@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ("ip saddr 192.0.2.1", "is not a list of strings"),
        (["ip", 5], "is not a list of strings"),
        ([None], "is not a list of strings"),
        (["-s", "192.0.2.0/24"], "are iptables arguments"),
        (["!", "-d", "192.0.2.0/24"], "are iptables arguments"),
        (["--sport", "80"], "are iptables arguments"),
        *(([f"ip{text}saddr"], "hold a character") for text in (";", "#", "\\", "$", "\n", "\t", "\0", "\u2028", '"')),
        (["iifname", '"lo'], "hold a character"),
        (["iifname", '"a"', '"'], "hold a character"),
    ],
)
def test_a_condition_that_is_not_one_nftables_match_is_refused(key: str, tokens: object, reason: str) -> None:
    assert refusal(**{key: tokens}).startswith(f"{key} {tokens!r} {reason}")


def test_every_wrong_key_is_named_in_one_error() -> None:
    message = refusal(snat=1, backend="iptables", runtimeConfig={"portMappings": [mapping(-1, 0)]})
    for wrong in ("snat 1", "backend 'iptables'", "portMappings[0].hostPort -1", "portMappings[0].containerPort 0"):
        assert wrong in message


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"runtimeConfig": "x"}, "runtimeConfig"),
        ({"runtimeConfig": {"portMappings": "x"}}, "runtimeConfig.portMappings"),
        ({"prevResult": {"ips": [5]}}, "prevResult.ips[0]"),
        ({"prevResult": {"interfaces": ["eth0"]}}, "prevResult.interfaces[0]"),
    ],
)
def test_errors_speak_of_json_and_not_of_this_program(keys: dict[str, Any], name: str) -> None:
    message = refusal(**keys)
    assert message.startswith(f"{name} ")
    assert not [word for word in ("instance", "tuple", "dictionary", "_") if word in message]


@pytest.mark.parametrize(
    "spelling",
    [
        {"hostPort": 8080, "containerPort": 80, "protocol": "udp", "hostIP": "192.0.2.1"},
        {"HostPort": 8080, "ContainerPort": 80, "Protocol": "UDP", "HostIP": "192.0.2.1"},
        {"HOSTPORT": 8080, "containerport": 80, "pRoToCoL": "Udp", "hostip": "192.0.2.1", "Unknown": [{}]},
    ],
)
def test_keys_of_a_mapping_and_its_protocol_are_read_in_any_case(spelling: dict[str, object]) -> None:
    assert mapped(spelling) == ["8080/udp on 192.0.2.1:80"]


@pytest.mark.parametrize("unspecified", [{"hostPort": 0}, {"hostPort": None}, {}, {"HostPort": 0, "Protocol": "UDP"}])
def test_a_host_port_of_zero_null_or_none_is_dropped_as_unspecified(unspecified: dict[str, object]) -> None:
    port = {"containerPort": 80, "protocol": "tcp"} | unspecified
    assert mapped(port) == []
    assert mapped(port, mapping(8080), port | {"protocol": "UDP"}, port) == ["8080/tcp:80"]


@pytest.mark.parametrize("port", [-1, 65536, 10**30, "8080", "", "0", 80.5, 8080.0, 0.0, True, False, [], {}])
def test_a_port_that_is_not_a_whole_number_in_range_is_refused(port: object) -> None:
    bad = {"hostPort": port, "containerPort": port}
    both = [f"[1].{key} {port!r} is not a whole number from 1 to 65535" for key in bad]
    assert mapping_refusal(mapping(1), bad) == "; runtimeConfig.portMappings".join(both)


@pytest.mark.parametrize("port", [0, None])
def test_a_container_port_cannot_be_unspecified(port: object) -> None:
    bad = {"hostPort": 8080, "containerPort": port}
    assert mapping_refusal(bad) == f"[0].containerPort {port!r} is not a whole number from 1 to 65535"
    assert mapping_refusal({"hostPort": 8080}) == "[0].containerPort is missing"


def test_the_first_and_the_last_port_are_ports() -> None:
    assert mapped(mapping(1, 65535), mapping(65535, 1)) == ["1/tcp:65535", "65535/tcp:1"]


@pytest.mark.parametrize(
    ("protocol", "read"), [("tcp", "tcp"), ("SCTP", "sctp"), ("Udp", "udp"), ("", "tcp"), (None, "tcp")]
)
def test_a_protocol_is_tcp_unless_it_is_given(protocol: str | None, read: str) -> None:
    assert mapped(mapping(8080) | {"protocol": protocol}) == [f"8080/{read}:80"]
    assert mapped({"hostPort": 8080, "containerPort": 80}) == ["8080/tcp:80"]


@pytest.mark.parametrize("protocol", ["icmp", "tcp ", "6", 6, False, [], {}, "dccp"])
def test_another_protocol_is_refused(protocol: object) -> None:
    bad = mapping(8080) | {"protocol": protocol}
    assert mapping_refusal(bad) == f"[0].protocol {protocol!r} is not tcp, udp or sctp"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("", None), (None, None), (ANY4, ANY4), ("::", "::"), ("127.0.0.1", "127.0.0.1"),
        ("2001:DB8:0::1", "2001:db8::1"), ("::ffff:192.0.2.1", "192.0.2.1"), (f"::ffff:{ANY4}", ANY4),
    ],
)  # fmt: skip
def test_a_host_address_is_one_of_either_family_or_none(given: str | None, read: str | None) -> None:
    (port,) = parse(runtimeConfig={"portMappings": [mapping(8080, hostIP=given)]}).mappings
    assert port.host_ip == (ip_address(read) if read else None)


@pytest.mark.parametrize(
    "address",
    ["abcd", " 192.0.2.1", "192.0.2.1/24", "192.0.2", "010.0.0.1", "[::1]", "localhost", "fe80::1%eth0",
     "fe80::1%eth0; flush ruleset", 5, True, [], {}],
)  # fmt: skip
def test_what_is_not_a_host_address_is_refused_by_value(address: object) -> None:
    assert mapping_refusal(mapping(8080, hostIP=address)) == f"[0].hostIP {address!r} is not an IP address"


@pytest.mark.parametrize("bad", [5, "8080:80", [], True])
def test_a_mapping_is_an_object(bad: object) -> None:
    assert mapping_refusal(mapping(1), bad) == f"[1] {bad!r} is not a JSON object"


OLD = {"ip4": {"ip": "10.1.0.2/24", "gateway": "10.1.0.1"}, "ip6": {"ip": "fd00::2/64", "routes": []}, "dns": {}}
INTERFACES = [{"name": "veth1"}, {"name": "eth0", "mac": "", "sandbox": "/run/netns/c1"}]


@pytest.mark.parametrize(
    "previous",
    [
        pytest.param({"cniVersion": "0.1.0", **OLD}, id="0.1.0"),
        pytest.param({"cniVersion": "0.2.0", **OLD}, id="0.2.0"),
        *(
            pytest.param({
                "cniVersion": version,
                "interfaces": INTERFACES,
                "ips": [
                    {"version": "4", "address": "10.1.0.2/24", "interface": 1, "gateway": None},
                    {"version": "6", "address": "fd00::2/64", "interface": 1},
                ],
            }, id=version)
            for version in ("0.3.0", "0.3.1", "0.4.0")
        ),
        pytest.param(result("10.1.0.2/24", "fd00::2/64", version="1.0.0"), id="1.0.0"),
        pytest.param({
            "interfaces": [{"name": "eth0", "sandbox": "/run/netns/c1", "mtu": 1500, "pciID": "", "socketPath": ""}],
            "ips": [{"address": "10.1.0.2/24", "interface": 0}, {"address": "fd00::2/64", "interface": 0}],
            "routes": [{"dst": "::/0", "mtu": 1400, "priority": 1, "scope": 0}],
        }, id="1.1.0"),
    ],
)  # fmt: skip
def test_a_result_of_every_cni_version_has_the_same_addresses(previous: dict[str, Any]) -> None:
    assert addresses(**previous) == BOTH


@pytest.mark.parametrize("index", [{}, {"interface": None}, {"interface": -1}, {"interface": 2}, {"interface": 1}])
def test_an_address_without_a_known_interface_is_the_containers(index: dict[str, object]) -> None:
    assert addresses(interfaces=INTERFACES, ips=[{"address": "10.1.0.2/24", **index}]) == BOTH[:1]


@pytest.mark.parametrize(
    "interface", [{"name": "eth0"}, {"name": "eth0", "sandbox": ""}, {"name": "net1", "sandbox": "/run/netns/c1"}, {}]
)
def test_an_address_of_the_node_or_of_another_interface_is_passed_over(interface: dict[str, str]) -> None:
    assert addresses(interfaces=[interface], ips=[{"address": "10.1.0.2/24", "interface": 0}]) == []


@pytest.mark.parametrize(
    "previous", [{}, {"ips": None, "interfaces": None, "routes": None}, {"ip4": None, "ip6": None}, {"ips": []}]
)
def test_a_result_may_have_no_addresses(previous: dict[str, Any]) -> None:
    assert addresses(**previous) == []


@pytest.mark.parametrize("address", ["10.1.0.2", "x/24", "10.1.0.300/24", "10.1.0.2/33", "fe80::1%x/64", 5, None])
def test_a_wrong_address_in_the_result_is_refused_by_value(address: object) -> None:
    message = refusal(prevResult={"ips": [{"address": address}]})
    assert message.startswith(f"prevResult.ips[0].address {address!r} ")
    assert message.count(repr(address)) == 1
