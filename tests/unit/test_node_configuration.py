from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni_hostport.operate.node.configuration import MARK, Configuration, derive, parse_options

HOSTPORT = {"type": "hostport", "capabilities": {"portMappings": True, "io.kubernetes.cri.pod-annotations": True}}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
FLANNEL = b"""{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "flannel",
      "delegate": {
        "hairpinMode": true,
        "mtu": 1.450e3
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}
"""
DERIVED_FROM_FLANNEL = b"""{
  "hostportDerivedFrom": "10-flannel.conflist",
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "flannel",
      "delegate": {
        "hairpinMode": true,
        "mtu": 1.450e3
      }
    },
    {"type": "hostport", "capabilities": {"portMappings": true, "io.kubernetes.cri.pod-annotations": true}}
  ]
}
"""
DERIVED_FROM_BRIDGE = b"""{
  "hostportDerivedFrom": "10-bridge.conf",
  "loadOnlyInlinedPlugins": true,
  "name": "pods",
  "cniVersion": "0.4.0",
  "plugins": [{"cniVersion":"0.4.0", "name":"pods", "type":"bridge", "mtu":1e3},
    {"type": "hostport", "capabilities": {"portMappings": true, "io.kubernetes.cri.pod-annotations": true}}]
}
"""


def parsed(data: bytes | dict[str, Any], file: str = "10-pods.conflist") -> Configuration:
    return Configuration.parse(file, data if isinstance(data, bytes) else json.dumps(data).encode())


def conflist(*plugins: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"cniVersion": "1.0.0", "name": "pods", **keys, "plugins": list(plugins)}


def derived(data: bytes | dict[str, Any], file: str = "10-pods.conflist", **options: Any) -> dict[str, Any]:
    document = json.loads(derive(parsed(data, file), options).data)
    assert document.pop(MARK) == file
    return dict(document)


def notes(*plugins: dict[str, Any]) -> tuple[str, ...]:
    return derive(parsed(conflist(*plugins)), {}).notes


def test_portmap_is_replaced_in_its_place_and_all_other_bytes_stay() -> None:
    assert derive(parsed(FLANNEL, "10-flannel.conflist"), {}).data == DERIVED_FROM_FLANNEL


def test_a_single_configuration_becomes_a_list() -> None:
    data = b'{"cniVersion":"0.4.0", "name":"pods", "type":"bridge", "mtu":1e3}\n'
    assert derive(parsed(data, "10-bridge.conf"), {}).data == DERIVED_FROM_BRIDGE


def test_what_is_derived_is_known_as_ours_and_names_its_source() -> None:
    ours = parsed(derive(parsed(FLANNEL, "10-flannel.conflist"), {}).data, "01-hostport.conflist")
    assert (ours.source, ours.has_hostport, ours.name) == ("10-flannel.conflist", True, "cbr0")
    assert parsed(FLANNEL).source is None


def test_without_portmap_this_plugin_comes_last() -> None:
    assert derived(conflist({"type": "calico"}, {"type": "bandwidth"}))["plugins"] == [
        {"type": "calico"},
        {"type": "bandwidth"},
        HOSTPORT,
    ]


def test_plugins_behind_portmap_stay_behind_it() -> None:
    plugins = derived(conflist({"type": "calico"}, PORTMAP, {"type": "bandwidth"}))["plugins"]
    assert [plugin["type"] for plugin in plugins] == ["calico", "hostport", "bandwidth"]


def test_one_plugin_stands_for_several_portmaps() -> None:
    plugins: list[dict[str, Any]] = [{"type": "calico"}, PORTMAP, {"type": "tuning"}, PORTMAP, PORTMAP]
    assert [plugin["type"] for plugin in derived(conflist(*plugins))["plugins"]] == ["calico", "hostport", "tuning"]
    assert notes(*plugins) == ("10-pods.conflist has portmap 3 times: this plugin stands for all of them",)


def test_keys_of_portmap_that_mean_the_same_are_kept_and_options_win() -> None:
    portmap = {**PORTMAP, "snat": False, "masqAll": True, "conditionsV4": ["ip", "saddr", "192.0.2.0/24"]}
    (plugin,) = derived(conflist(portmap), snat=True, hostAddresses=["192.0.2.0/24"])["plugins"]
    assert plugin == {
        **HOSTPORT,
        "snat": True,
        "masqAll": True,
        "conditionsV4": ["ip", "saddr", "192.0.2.0/24"],
        "hostAddresses": ["192.0.2.0/24"],
    }


def test_keys_that_only_portmap_has_are_told() -> None:
    assert notes({**PORTMAP, "externalSetMarkChain": "KUBE-MARK-MASQ", "backend": "iptables", "snat": None}) == (
        "10-pods.conflist gives portmap the key 'externalSetMarkChain', which this plugin does without",
        "10-pods.conflist gives portmap the key 'backend', which this plugin does without",
    )


def test_conditions_of_iptables_are_not_left_out_silently() -> None:
    configuration = parsed(conflist({**PORTMAP, "conditionsV4": ["!", "-d", "192.0.2.0/24"]}))
    with pytest.raises(ValueError, match=r"conditionsV4 .* are iptables arguments.*; give conditionsV4 in the options"):
        derive(configuration, {})
    assert json.loads(derive(configuration, {"conditionsV4": []}).data)["plugins"] == [{**HOSTPORT, "conditionsV4": []}]


def test_an_absent_version_stays_absent() -> None:
    assert "cniVersion" not in derived(b'{"name": "pods", "plugins": [{"type": "bridge"}]}')
    assert "cniVersion" not in derived(b'{"name": "pods", "type": "bridge"}', "10-bridge.conf")


@pytest.mark.parametrize(
    "kept",
    [
        b"123456789012345678901234567890",
        b"1.10",
        b"-0",
        b"1E+2",
        b"9" * 5000 + b"e-4990",
        rb'"\u0041\/\ud83d\ude00 \ud800"',
        '"ü☃"'.encode(),
        b'"\xff\xfe"',
        b'{"b": 1, "a": 2, "b": 3}',
        b"[ 1,\r\n\t2 ]",
    ],
)
def test_what_is_hard_to_write_again_stays_byte_for_byte(kept: bytes) -> None:
    data = b'{"name": "pods", "x": ' + kept + b', "plugins": [{"type": "bridge", "y": ' + kept + b"}]}"
    ours = derive(parsed(data), {}).data
    assert (
        ours
        == b'{\n  "hostportDerivedFrom": "10-pods.conflist", '
        + data[1:-2]
        + f",\n    {json.dumps(HOSTPORT)}]}}".encode()
    )


def test_of_keys_that_occur_twice_the_last_counts() -> None:
    data = b'{"name": "a", "plugins": [{}], "name": "pods", "plugins": [{"type": "x", "type": "portmap"}]}'
    assert derived(data)["plugins"] == [HOSTPORT]
    assert parsed(data).name == "pods"
    twice = b'{"hostportDerivedFrom": "x", "hostportDerivedFrom": 1, "name": "pods", "plugins": [{"type": "portmap"}]}'
    assert derived(twice)["plugins"] == [HOSTPORT]


def test_types_count_in_any_case_as_for_go() -> None:
    assert derived(b'{"name": "pods", "plugins": [{"Type": "portmap"}]}')["plugins"] == [HOSTPORT]


KEYS = st.text(max_size=5).filter(lambda key: key.lower() not in {"type", "name", "cniversion", "capabilities"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=4)
PLUGINS = st.builds(
    lambda kind, rest: {**rest, "type": kind}, st.sampled_from(["bridge", "tuning", "portmap"]), OBJECTS
)


@settings(deadline=None, max_examples=60)
@given(OBJECTS, st.lists(PLUGINS, min_size=1, max_size=5), st.sampled_from([None, 1, "\t"]), st.booleans())
def test_all_else_is_equal_as_json(
    keys: dict[str, Any], plugins: list[dict[str, Any]], indent: int | str | None, ascii_only: bool
) -> None:
    keys = {key: value for key, value in keys.items() if key != "plugins"}
    document = {**keys, "name": "pods", "plugins": plugins}
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    ours = derived(text.encode(errors="surrogatepass"))
    others = [plugin for plugin in plugins if plugin["type"] != "portmap"]
    assert {key: value for key, value in ours.items() if key != "plugins"} == {**keys, "name": "pods"}
    assert [plugin for plugin in ours["plugins"] if plugin != HOSTPORT] == others
    place = [plugin["type"] for plugin in plugins].index("portmap") if len(others) < len(plugins) else len(plugins)
    assert ours["plugins"].index(HOSTPORT) == place


@settings(deadline=None, max_examples=60)
@given(OBJECTS, st.sampled_from([None, 2]))
def test_a_single_configuration_is_kept_whole(keys: dict[str, Any], indent: int | None) -> None:
    document = {**keys, "name": "pods", "type": "bridge"}
    ours = derived(json.dumps(document, indent=indent).encode(), "10-bridge.conf")
    assert ours == {"loadOnlyInlinedPlugins": True, "name": "pods", "plugins": [document, HOSTPORT]}


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (FLANNEL[:50], "is not JSON: "),
        (FLANNEL + b"}", "is not JSON: something follows its end: '}'"),
        (b"\xef\xbb\xbf" + FLANNEL, "is not JSON: "),
        (b"[]", "is not a JSON object"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"name": "pods", "x": NaN, "plugins": [{"type": "x"}]}', "is not JSON: NaN is not a number"),
        (b'{"name": "pods", "x": 1e999, "plugins": [{"type": "x"}]}', "is not JSON: the number 1e999 is too large"),
        (b'{"name": "pods", "x": "\n", "plugins": [{"type": "x"}]}', "is not JSON: Invalid control character"),
        (b'{"plugins": [{"type": "x"}]}', "has no name"),
        (b'{"name": "../x", "plugins": [{"type": "x"}]}', "has the name '../x', which is not a letter or digit"),
        (
            b'{"name": "pods", "cniVersion": 1, "plugins": [{"type": "x"}]}',
            "has the cniVersion 1.0, which is not a str",
        ),
        (b'{"name": "pods", "plugins": []}', "has no plugins"),
        (b'{"name": "pods", "type": "bridge"}', "has no plugins"),
        (b'{"name": "pods", "plugins": ["x"]}', "has the plugin 'x', which is not a JSON object"),
        (b'{"name": "pods", "plugins": [{}]}', "has a plugin without a type"),
        (
            b'{"name": "pods", "plugins": [{"type": "x", "capabilities": {"a": 1}}]}',
            "has a plugin x whose capabilities",
        ),
        (b'{"name": "pods", "disableCheck": 1, "plugins": [{"type": "x"}]}', "has disableCheck 1.0, which is neither"),
    ],
)
def test_what_no_runtime_would_load_is_refused(data: bytes, fault: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared
        parsed(data)
    assert str(error.value).startswith(fault)


def test_a_list_in_a_file_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^has no type: a list belongs into a \.conflist$"):
        parsed(FLANNEL, "10-flannel.conf")


def test_options_are_checked_together_and_null_is_no_option() -> None:
    assert parse_options(b'{"hostAddresses": ["192.0.2.0/24"], "snat": null, "waitForHolder": 3}') == {
        "hostAddresses": ["192.0.2.0/24"],
        "waitForHolder": 3,
    }


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "is empty"),
        (b"hostAddresses: []", "is not JSON: "),
        (b'{"type": "portmap"}', "has the key 'type', which is not an option"),
        (b'{"runtimeConfig": {}}', "has the key 'runtimeConfig', which is not an option"),
        (
            b'{"hostAdresses": []}',
            "has the key 'hostAdresses', which this version does not know; it knows backend, cond",
        ),
        (b'{"hostAddresses": ["x"]}', "is wrong: hostAddresses[0] 'x' is not a CIDR"),
        (b'{"waitForHolder": 1.0}', "is wrong: waitForHolder 1.0 is invalid"),
        (b'{"snat": "yes", "waitForHolder": 99}', "is wrong: snat 'yes' is invalid"),
        (b'{"waitForHolder": ' + b"9" * 5000 + b"}", "is not JSON: the number"),
    ],
)
def test_wrong_options_are_refused(data: bytes, fault: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared
        parse_options(data)
    assert str(error.value).startswith(fault)


def test_a_configuration_of_multus_tells_where_it_leads() -> None:
    multus = {"name": "multus-cni-network", "type": "multus-shim"}
    within = parsed({**multus, "delegates": [conflist({"type": "bridge"}, HOSTPORT)]}, "00-multus.conf")
    beside = parsed({**multus, "clusterNetwork": "/host/etc/cni/net.d/01-hostport.conflist"}, "00-multus.conf")
    assert (within.is_multus, within.delegates_to_hostport) == (True, True)
    assert (beside.delegates_to_hostport, beside.cluster_network) == (False, "01-hostport.conflist")
