"""What a caller may send: any bytes, any JSON, and configurations that are right but for one thing or two."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from lab import config, mapping

from cni_hostport.dynamic_ports import keys

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy
    from lab import Pod

COMMANDS = ["ADD", "ADD", "ADD", "CHECK", "DEL", "GC", "STATUS", "VERSION"]
VERSIONS = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
NUMBERS = [0, -0.0, 1, -1, 0.5, 80.0, 80, 8080, 65535, 65536, 70000, 2**31, 2**63, 2**64, 10**400, 1e308, -(2**64)]
TEXTS = [
    "", " ", "0", "80", "tcp", "UDP", "sctp", "icmp", "tcp; flush ruleset", '"', "\\", "\n", "\0", "é", "\ud800",
    "x" * 300, "127.0.0.1", "0.0.0.0", "::", "::1", "fe80::1", "fe80::1%eth0", "::ffff:192.0.2.1", "192.0.2.1",
    "2001:db8::1", "192.0.2.1/24", "192.0.2.1/33", "10.88.0.77/24", "fd00:88::77/64", "255.255.255.255/0",
    "224.0.0.1/4", "::/0", "example.com", "localhost", "$x", "@deleted", "{ 1 }", "#", "..", "/", "eth0", "pods",
    "1.0.0", "9.9.9", "nftables",
]  # fmt: skip
# words of nftables' matches, some that are none, and a name that only a name server knows
CONDITIONS = [
    "ip", "ip6", "saddr", "daddr", "tcp", "dport", "meta", "l4proto", "iifname", "oif", "ct", "state", "new",
    "mark", "limit", "rate", "10/second", "1.1.1.1", "!=", "==", "{", "}", ",", ":", "map", "vmap", "set",
    "@deleted", "@hostports", "192.0.2.0/24", "2001:db8::/32", "example.com", "0x10", "and", "or", "drop",
    "accept", "goto", "jump", "dispatch", "counter", "log", "return", "fib", "type", "local", "numgen",
    "random", "mod", "2", "0-1", "jhash", "offset", "socket", "osf", "name", '"x"', "99999999999",
]  # fmt: skip
DEADLY = ["ip", "saddr", "map", "{", "1.1.1.1", ":", "2.2.2.2", "}", "1.1.1.1"]

scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.floats(), st.text(max_size=8)
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
conditions = st.one_of(
    st.lists(st.sampled_from(CONDITIONS), max_size=8),
    st.just(DEADLY),
    st.sampled_from(CONDITIONS).map(lambda word: ["ip", "saddr", "!=", word]),
    anything,
)
ports = st.one_of(st.integers(-1, 65536), st.sampled_from([0, 1, 80, 8080, 65535]), scalars)
mappings = st.one_of(
    st.fixed_dictionaries(
        {"hostPort": ports, "containerPort": ports},
        optional={"protocol": st.sampled_from(["tcp", "UDP", "sctp", ""]) | scalars, "hostIP": scalars},
    ),
    st.builds(mapping, st.integers(1, 65535), st.integers(1, 65535), st.sampled_from(["tcp", "udp", "sctp"])),
    anything,
)
requests = st.one_of(
    st.sampled_from(["80", "80/tcp, 9000-9002/udp", "192.0.2.1:80, [::]:81", "1-65535", "1-4096", "80," * 2000]),
    st.text("0123456789-/,:.[] tcpudsctpTCP", max_size=12),
    scalars,
)
runtime_configs = st.fixed_dictionaries(
    {},
    optional={
        "portMappings": st.lists(mappings, max_size=4) | anything,
        keys.CAPABILITY: requests,
        keys.ANNOTATIONS: st.fixed_dictionaries({"other": scalars}, optional={keys.REQUEST: requests}) | anything,
    },
)
ranges = st.sampled_from(["40000-40003", "8080", "8080-8081, 1-65535", "40003-40000", ["40000", "40002"]]) | scalars
addresses = st.sampled_from(["10.88.0.77/24", "fd00:88::77/64", "10.9.9.9/32"]) | scalars
results = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "cniVersion": st.sampled_from(VERSIONS) | scalars,
            "ips": st.lists(
                st.fixed_dictionaries({"address": addresses}, optional={"interface": scalars}) | anything, max_size=3
            ),
            "interfaces": st.lists(
                st.fixed_dictionaries({}, optional={"name": scalars, "sandbox": scalars}) | anything, max_size=3
            ),
            "ip4": anything,
            "code": scalars,
        },
    ),
    anything,
)
KEYS: dict[str, SearchStrategy[Any]] = {
    "cniVersion": st.sampled_from(VERSIONS) | scalars,
    "name": st.sampled_from(["pods", "a" * 200, "a.b-c_d"]) | scalars,
    "type": scalars,
    "snat": scalars,
    "masqAll": scalars,
    "conditionsV4": conditions,
    "conditionsV6": conditions,
    "waitForHolder": st.sampled_from([0, -1, 21, "0", None, 0.0, True]),
    "hostAddresses": st.lists(scalars, max_size=3) | scalars,
    "backend": st.sampled_from(["nftables", "iptables"]) | scalars,
    "markMasqBit": scalars,
    "externalSetMarkChain": scalars,
    "capabilities": anything,
    "prevResult": results,
    "runtimeConfig": runtime_configs | anything,
    "dynamicPorts": ranges,
    "dynamicPortsPerPod": st.sampled_from([0, 1, 4096, -1, 4097, True, "16"]) | scalars,
    "cni.dev/valid-attachments": st.lists(
        st.fixed_dictionaries({}, optional={"containerID": scalars, "ifname": scalars}) | anything, max_size=3
    )
    | anything,
    "cni.dev/attachments": anything,
    "args": anything,
}
VARIABLES: dict[str, SearchStrategy[str]] = {
    "CNI_COMMAND": st.sampled_from(["add", "NOTHING", "", " ADD"]),
    "CNI_CONTAINERID": st.sampled_from(
        ["", "c", "a" * 3000, "../c", "c c", "-c", "é", "c\n", "\udcff"]
    ) | st.text(max_size=8),
    "CNI_NETNS": st.sampled_from(
        ["", "/nowhere", "relative", "/dev/null", "/dev/zero", "/etc", "/etc/passwd", "/proc/self/ns/net",
         "/proc/1/ns/mnt", "/" * 5000, "/run/netns/" + "x" * 300, "/run/netns/a b", "/run/\n", "/run/\udcff",
         "//proc/self/fd/0"]
    ),
    "CNI_IFNAME": st.sampled_from(
        ["", "lo", ".", "..", "a/b", "a:b", "a b", "x" * 16, "éééééééé", "\x1b[2J", "$(id)", "e\udcff"]
    ) | st.text(max_size=8),
    "CNI_PATH": st.sampled_from(["", ":", "/nowhere"]),
    "CNI_ARGS": st.sampled_from(
        ["", ";;;", "=", "K8S_POD_NAME=\n\x1b", 'K8S_POD_NAMESPACE=a";K8S_POD_NAME=b\\',
         "K8S_POD_NAME=" + "x" * 500]
    ) | st.text(max_size=20),
    "CNI_NETNS_OVERRIDE": st.sampled_from(["1", "TRUE", "no"]),
}  # fmt: skip


def right(pod: Pod) -> dict[str, Any]:
    """Return a configuration with nothing wrong."""
    return config(pod, mapping(8081), mapping(5353, 53, "udp"))


@st.composite
def stdins(draw: DrawFn, pod: Pod) -> bytes:
    """Return what comes on stdin: any bytes, any JSON, and what is almost a configuration."""
    kind = draw(st.sampled_from(["bytes", "json", "torn", *["config"] * 12]))
    if kind == "bytes":
        deep = st.sampled_from([b"[" * 9000, b'{"a":' * 9000, b"\xef\xbb\xbf{}", b"{}{}", b" "])
        return draw(st.binary(max_size=60) | deep)
    if kind == "json":
        return json.dumps(draw(anything)).encode(draw(st.sampled_from(["utf-8", "utf-16", "utf-8-sig"])))
    sent = right(pod)
    for name in draw(st.lists(st.sampled_from(sorted(KEYS)), max_size=3)):
        sent[name] = draw(KEYS[name])
        if draw(st.integers(0, 9)) == 0:
            del sent[name]
    text = json.dumps(sent, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if kind == "torn":
        place = draw(st.integers(0, len(text) - 1))
        return text[:place] + draw(st.binary(max_size=3)) + text[place + draw(st.integers(0, 3)) :]
    return text


@st.composite
def stdins_with(draw: DrawFn, pod: Pod, *names: str) -> bytes:
    """Return a configuration that is right, but for keys that all have some value."""
    return json.dumps(right(pod) | {name: draw(KEYS[name]) for name in names}).encode()


def environment(pod: Pod, command: str) -> dict[str, str]:
    """Return the variables of a call with nothing wrong."""
    return {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "attacked",
        "CNI_NETNS": pod.path,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
    }


@st.composite
def environments(draw: DrawFn, pod: Pod) -> dict[str, str]:
    """Return the variables of a call, most of them right."""
    environ = environment(pod, draw(st.sampled_from(COMMANDS)))
    for name in draw(st.lists(st.sampled_from(sorted(VARIABLES)), max_size=2)) if draw(st.integers(0, 3)) == 0 else ():
        environ[name] = draw(VARIABLES[name]).replace("\0", "")
    return environ
