from __future__ import annotations

import json
from typing import Any

import pytest
from lab import mapping

from cni_hostport.config import NetworkConfig
from cni_hostport.dynamic_ports import keys, note
from cni_hostport.dynamic_ports.request import merged, named, parse, status
from cni_hostport.errors import CNIError


def ports(text: str) -> list[list[str]]:
    return [[str(port) for port in block] for block in parse(text)]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("", []),
        (" , ,", []),
        ("80", [["80/tcp"]]),
        ("80/tcp", [["80/tcp"]]),
        (" 80/TCP ,\n7777/udp,", [["80/tcp"], ["7777/udp"]]),
        ("9000-9002/udp", [["9000/udp", "9001/udp", "9002/udp"]]),
        ("80-80", [["80/tcp"]]),
        ("080/tcp", [["80/tcp"]]),
        ("36412/sctp", [["36412/sctp"]]),
        ("80/tcp, 80/udp", [["80/tcp"], ["80/udp"]]),
        ("80,80/tcp,80/TCP", [["80/tcp"]]),
        ("192.0.2.1:443", [["192.0.2.1:443/tcp"]]),
        ("443, 192.0.2.1:443", [["443/tcp"], ["192.0.2.1:443/tcp"]]),
        ("[2001:DB8:0::1]:443-444/udp", [["[2001:db8::1]:443/udp", "[2001:db8::1]:444/udp"]]),
        ("0.0.0.0:80, [::]:80", [["0.0.0.0:80/tcp"], ["[::]:80/tcp"]]),
        ("[::ffff:192.0.2.1]:80", [["192.0.2.1:80/tcp"]]),
        ("1, 65535", [["1/tcp"], ["65535/tcp"]]),
    ],
)
def test_every_form_is_read_and_written_in_one_form(text: str, blocks: list[list[str]]) -> None:
    assert ports(text) == blocks
    assert parse(", ".join(map(named, parse(text)))) == parse(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("http", "has 'http', which is not a container port"),
        ("80 81", "has '80 81', which"),
        ("80/", "has '80/', which"),
        ("80/tcp/udp", "has '80/tcp/udp', which"),
        ("/tcp", "has '/tcp', which"),
        ("-80", "has '-80', which"),
        ("80-", "has '80-', which"),
        ("80.0", "has '80.0', which"),
        ("+80", "has '+80', which"),
        ("8_0", "has '8_0', which"),
        ("0x50", "has '0x50', which"),
        ("٨٠", "has '٨٠', which"),
        ("\uff18\uff10/tcp", "has '\uff18\uff10/tcp', which"),
        ("80\n/tcp", r"has '80\n/tcp', which"),
        ("80\x00", r"has '80\x00', which"),
        ("123456", "has '123456', which"),
        ("2001:db8::1:80", "has '2001:db8::1:80', which"),
        ("[fe80::1%eth0]:80", "has '[fe80::1%eth0]:80', which"),
        ("localhost:80", "has 'localhost:80', which"),
        ("80=40000", "has '80=40000', which"),
        ("0", "has '0', whose ports are not from 1 to 65535 and in order"),
        ("0-5/udp", "has '0-5/udp', whose ports are not"),
        ("65536", "has '65536', whose ports are not"),
        ("65000-65536", "has '65000-65536', whose ports are not"),
        ("9002-9000", "has '9002-9000', whose ports are not"),
        ("80/icmp", "has '80/icmp', whose protocol is not tcp, udp or sctp"),
        ("192.0.2.256:80", "has '192.0.2.256:80', whose address is not an IP address"),
        ("[::1::]:80", "has '[::1::]:80', whose address is not an IP address"),
        ("80-82, 81", "asks for 81/tcp twice, in 80-82/tcp and in 81/tcp"),
        ("80-82, 82-84", "asks for 82/tcp twice, in 80-82/tcp and in 82-84/tcp"),
        ("1-65535", "asks for more than 4096 ports"),
        ("1-4096, 5000", "asks for more than 4096 ports"),
        ("80," * 1400, "has more than 4096 characters"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^(has|asks) ") as caught:
        parse(text)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    "text", [",".join(["1-65535"] * 500), ",".join(["1-2000"] * 500), "1" * 4096, "[" * 4096, "[:" * 2048]
)
def test_no_text_makes_a_long_message(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(has|asks) ") as caught:
        parse(text)
    assert len(str(caught.value)) < 600


def test_blocks_of_two_lists_are_once_each_and_do_not_overlap() -> None:
    assert merged([*parse("80, 9000-9002/udp"), *parse("9000-9002/udp, 80/tcp")]) == parse("80, 9000-9002/udp")
    with pytest.raises(ValueError, match="asks for 9001/udp twice"):
        merged([*parse("9000-9002/udp"), *parse("9001/udp")])


def test_the_status_has_an_address_where_one_was_asked_for() -> None:
    assigned = {"192.0.2.7:443/tcp": 40003, "80/tcp": 40017, "[2001:db8::1]:80/tcp": 40004, "0.0.0.0:5/udp": 40001}
    told = status(assigned)
    assert list(told) == ["0.0.0.0:5/udp", "192.0.2.7:443/tcp", "[2001:db8::1]:80/tcp", "80/tcp"]
    assert {text: port["hostPort"] for text, port in told.items()} == assigned
    known = {text: port["hostIP"] for text, port in told.items() if "hostIP" in port}
    assert known == {"192.0.2.7:443/tcp": "192.0.2.7", "[2001:db8::1]:80/tcp": "2001:db8::1"}


RANGES = ((40000, 40999),)


@pytest.mark.parametrize(
    ("alias", "assigned"),
    [
        ("", {}),
        ("my uplink", {}),
        ("80/tcp=40017", {}),
        ("hostport ", {}),
        ("hostport 80/tcp=40017", {"80/tcp": 40017}),
        ("hostport 9000-9001/udp=40100 80/tcp=40017", {"9000/udp": 40100, "9001/udp": 40101, "80/tcp": 40017}),
        ("hostport 40017,40100", {"80/tcp": 40017, "9000/udp": 40100, "9001/udp": 40101}),
        ("hostport 40017", {"80/tcp": 40017}),
        ("hostport 22,40999", {}),
        ("hostport 40017,40100,40200", {"80/tcp": 40017, "9000/udp": 40100, "9001/udp": 40101}),
        ("hostport ,,", {}),
        ("hostport [2001:db8::1]:80/tcp=40017", {"[2001:db8::1]:80/tcp": 40017}),
        ("hostport 80/tcp=22 443/tcp=41000 53/udp=39999 9000-9001/udp=40999 5/tcp=-40001", {}),
        ("hostport 80/tcp=99999 81/tcp=x 82/tcp= 83/tcp=4e4 =40001 84/tcp, ,=40001", {}),
        ("hostport 1-65535/tcp=1 80/tcp=" + "9" * 5000, {}),
        ("hostport \x00 \x1b[2J= 80/tcp=40017", {"80/tcp": 40017}),
    ],
)
def test_a_note_gives_what_is_in_the_ranges_and_nothing_else(alias: str, assigned: dict[str, int]) -> None:
    assert note.read(alias, parse("80, 9000-9001/udp"), RANGES) == assigned


def parsed(**config: Any) -> NetworkConfig:
    return NetworkConfig.parse({"name": "pods", "prevResult": {}, **config})


def refusal(**config: Any) -> str:
    with pytest.raises(CNIError) as caught:
        parsed(**config)
    assert caught.value.code == 7
    return caught.value.msg


@pytest.mark.parametrize(
    ("value", "ranges"),
    [
        ("40000-40999", ((40000, 40999),)),
        ("40000", ((40000, 40000),)),
        (["42000", "40000-40999"], ((40000, 40999), (42000, 42000))),
        ("42000-42001,40000-40999", ((40000, 40999), (42000, 42001))),
        (["40000-40100, 40050-40200"], ((40000, 40200),)),
        ("40000-40999, 41000-41999", ((40000, 41999),)),
        ("40000-40999, 40100-40200, 41001", ((40000, 40999), (41001, 41001))),
        ("1-65535", ((1, 65535),)),
        (["40000-40000"] * 1000, ((40000, 40000),)),
        ([], ()),
        (None, ()),
    ],
)
def test_ranges_are_a_text_or_a_list_and_are_joined(value: object, ranges: tuple[tuple[int, int], ...]) -> None:
    assert parsed(dynamicPorts=value).dynamic_ports == ranges


@pytest.mark.parametrize(
    ("value", "named_value"),
    [
        ("", "''"), ("0", "'0'"), ("0-5", "'0-5'"), ("65536", "'65536'"), ("40000-65536", "'40000-65536'"),
        ("40999-40000", "'40999-40000'"), ("40000-", "'40000-'"), ("-40000", "'-40000'"), ("1:9", "'1:9'"),
        ("40000-40999,", "''"), ("40000 - 40999", "'40000 - 40999'"), ("٤٠٠٠٠", "'٤٠٠٠٠'"), ("+40000", "'+40000'"),
        (40000, "40000"), ([40000], "[40000]"), ([["40000"]], "[['40000']]"), ({"first": 1}, "{'first': 1}"),
        (True, "True"), (["40000", None], "['40000', None]"), ("9" * 5000, "'99999"),
    ],
)  # fmt: skip
def test_wrong_ranges_are_named(value: object, named_value: str) -> None:
    message = refusal(dynamicPorts=value)
    assert message.startswith("dynamicPorts ")
    assert named_value in message
    assert len(message) < 900


@pytest.mark.parametrize("quota", [-1, 4097, "16", 16.0, True])
def test_a_wrong_quota_is_named(quota: object) -> None:
    assert refusal(dynamicPortsPerPod=quota).startswith(f"dynamicPortsPerPod {quota!r} ")
    assert [parsed(dynamicPortsPerPod=right).dynamic_ports_per_pod for right in (0, 4096, None)] == [0, 4096, 16]


def asking(annotation: object = None, capability: object = None, *mappings: Any) -> dict[str, Any]:
    pod = {keys.ANNOTATIONS: {keys.REQUEST: annotation, "other": "x"}} if annotation is not None else {}
    return {"portMappings": list(mappings), keys.CAPABILITY: capability, **pod}


@pytest.mark.parametrize(
    ("runtime", "requests"),
    [
        (asking("80/tcp"), ["80/tcp"]),
        (asking(None, "80/tcp"), ["80/tcp"]),
        (asking("80, 7777/udp", "80/tcp"), ["80/tcp", "7777/udp"]),
        (asking("9000-9002/udp", "80", mapping(8080)), ["80/tcp", "9000-9002/udp"]),
        ({keys.ANNOTATIONS: None}, []),
        ({keys.ANNOTATIONS: {keys.REQUEST: None}}, []),
        ({keys.ANNOTATIONS: {keys.REQUEST: ""}}, []),
        ({keys.ANNOTATIONS: {"other": 5, "another": None}}, []),
        (asking(None, "", mapping(0)), []),
    ],
)
def test_requests_come_by_annotation_and_by_capability(runtime: dict[str, Any], requests: list[str]) -> None:
    assert [named(block) for block in parsed(runtimeConfig=runtime).requests] == requests
    assert keys.are_in(runtime) == bool(requests)


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        (asking("80/xyz"), ["pod-annotations", "hostport/dynamic-ports", "'80/xyz'"]),
        (asking(None, "80/xyz"), ["runtimeConfig.dynamicPorts", "'80/xyz'"]),
        (asking(None, ["80"]), ["runtimeConfig.dynamicPorts", "['80']", "is not a text"]),
        (asking(80), ["hostport/dynamic-ports", "80", "is not a text"]),
        (asking("80-82", "81"), ["the container asks for 81/tcp twice, in 81/tcp and in 80-82/tcp"]),
        (asking("8" * 200000), ["hostport/dynamic-ports", "more than 4096 characters"]),
        ({keys.ANNOTATIONS: "80", keys.CAPABILITY: "80"}, ["pod-annotations '80' is not a JSON object"]),
    ],
)
def test_wrong_requests_are_named_and_not_at_length(runtime: dict[str, Any], words: list[str]) -> None:
    message = refusal(runtimeConfig=runtime)
    assert all(word in message for word in words), message
    assert len(message) < 600
    assert "; " not in message  # one mistake, one sentence


@pytest.mark.parametrize("unspecified", [{"hostPort": 0}, {"hostPort": None}, {}, {"HostPort": 0}])
def test_port_0_asks_for_nothing_in_any_form(unspecified: dict[str, Any]) -> None:
    for runtime in (asking("443", None), asking(None, None), asking(None, "443")):
        config = parsed(
            runtimeConfig={**runtime, "portMappings": [{"containerPort": 80, **unspecified}]},
            dynamicPorts="40000-40999",
        )
        assert config.mappings == ()
        assert all(json.dumps(named(block)) == '"443/tcp"' for block in config.requests)


@pytest.mark.parametrize(
    "runtime", [None, [], "dynamicPorts", 5, {keys.ANNOTATIONS: [keys.REQUEST]}, {"a": {keys.REQUEST: "80"}}]
)
def test_in_doubt_nothing_is_asked_for(runtime: object) -> None:
    assert not keys.are_in(runtime)


def test_the_plugin_tells_the_names_from_all_others_by_a_word_in_them() -> None:
    assert all("dynamic" in name for name in (keys.REQUEST, keys.CAPABILITY))
