from __future__ import annotations

import io
import json
import re
from ipaddress import ip_address, ip_network

import pytest

from cni_hostport import skel
from cni_hostport.attachment import Attachment, pod_name
from cni_hostport.config import NetworkConfig
from cni_hostport.errors import CNIError
from cni_hostport.ruleset import plan
from cni_hostport.ruleset.commands import attach_commands

POD = ip_address("10.1.0.2")
PLAN = plan.Plan((plan.Forward("tcp", None, 8080, POD, 80),), {POD: (ip_network("10.1.0.0/24"),)})
HOSTILE = [
    '"', '""', '"' * 20, "\\", '\\"', '"; flush ruleset; "', '\\"; flush ruleset #', "; flush ruleset", '" : drop } #',
    "\nflush ruleset\n", "\r\nflush ruleset", "}", "{ }", "#", "$x", "@x", "'", "`id`", "\t", "\0", "\x1b[31m", "\x7f",
    "\u00e9", "\u201c", "\u2028flush ruleset", "\U0001f600", "\udcff",
]  # fmt: skip
everywhere = pytest.mark.parametrize("text", HOSTILE, ids=ascii)


def refusal(**keys: object) -> str:
    with pytest.raises(CNIError) as caught:
        NetworkConfig.parse({"prevResult": {}, **keys})
    assert caught.value.code == 7
    return caught.value.msg


@everywhere
@pytest.mark.parametrize("field", ["ifname", "netns", "pod name", "pod namespace"])
def test_text_in_a_comment_stays_within_its_quotes(field: str, text: str) -> None:
    values = dict.fromkeys(["ifname", "netns", "pod name", "pod namespace"], "tame") | {field: f"x{text}"}
    cni_args = f"K8S_POD_NAMESPACE={values['pod namespace']};K8S_POD_NAME={values['pod name']}"
    hostile = Attachment("pods", "c1", values["ifname"], values["netns"], pod_name(cni_args))
    tame = Attachment("pods", "c1", "tame", "tame", "tame/tame")
    commands = attach_commands(hostile, PLAN)
    quotes = re.compile('"([^"]*)"')
    assert [quotes.sub('""', command).replace(hostile.key, "") for command in commands] == [
        quotes.sub('""', command).replace(tame.key, "") for command in attach_commands(tame, PLAN)
    ]
    for comment in quotes.findall("\n".join(commands)):
        assert re.fullmatch(r"[ -~]{1,128}", comment)
        assert "\\" not in comment


def test_a_network_of_200_characters_is_named_on_a_pods_address_by_the_first_128() -> None:
    attachment = Attachment("n" * 200, "c1", "eth0")
    assert [command for command in attach_commands(attachment, PLAN) if " pods_ip4 " in command] == [
        f'create element inet hostport pods_ip4 {{ 10.1.0.2 comment "{"n" * 128}" : goto masq-{attachment.key} }}'
    ]


@everywhere
def test_a_host_address_is_nothing_but_an_address(text: str) -> None:
    for host_ip in (text, f"192.0.2.1{text}", f"2001:db8::1%{text}", f"fe80::1%eth0{text}"):
        mapping = {"hostPort": 1, "containerPort": 1, "hostIP": host_ip}
        assert refusal(runtimeConfig={"portMappings": [mapping]}).endswith(f"{host_ip!r} is not an IP address")


@everywhere
def test_a_protocol_is_nothing_but_a_protocol(text: str) -> None:
    for protocol in (text, f"tcp{text}"):
        mapping = {"hostPort": 1, "containerPort": 1, "protocol": protocol}
        assert refusal(runtimeConfig={"portMappings": [mapping]}).endswith(f"{protocol!r} is not tcp, udp or sctp")


@everywhere
def test_an_address_of_the_pod_is_nothing_but_an_address(text: str) -> None:
    for address in (text, f"10.1.0.2{text}/24", f"10.1.0.2/24{text}", f"fe80::1%eth0{text}/64"):
        assert "prevResult.ips[0].address" in refusal(prevResult={"ips": [{"address": address}]})


@everywhere
@pytest.mark.parametrize("key", ["conditionsV4", "conditionsV6"])
def test_a_condition_is_refused_or_stays_within_its_command_and_quotes(key: str, text: str) -> None:
    try:
        config = NetworkConfig.parse({"prevResult": {}, key: ["iifname", text]})
    except CNIError:
        return
    match = " ".join(config.conditions_v4 + config.conditions_v6)
    assert match.isprintable()
    assert not set(match) & set(";#\\$")
    assert match.count('"') % 2 == 0


@everywhere
@pytest.mark.parametrize(("name", "code"), [("CNI_CONTAINERID", 4), ("network", 7)])
def test_the_names_of_an_attachment_are_refused_at_the_edge(name: str, code: int, text: str) -> None:
    environ = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": "/x", "CNI_IFNAME": "eth0", "CNI_PATH": "/x"}
    config = {"name": f"x{text}" if name == "network" else "pods"}
    stdout = io.StringIO()
    changed = environ | ({} if name == "network" else {name: f"x{text}"})
    assert skel.run(changed, io.BytesIO(json.dumps(config).encode()), stdout, io.StringIO()) == 1
    error = json.loads(stdout.getvalue())
    assert error["code"] == code
    assert repr(f"x{text}") in error["msg"]
