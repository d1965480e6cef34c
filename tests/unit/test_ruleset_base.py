from __future__ import annotations

from cni_hostport import names
from cni_hostport.ruleset import base
from cni_hostport.ruleset.commands import probe_commands


def test_the_base_is_declared_whole_and_put_right() -> None:
    expected = """
add table inet hostport { comment "CNI hostport plugin"; }
add map inet hostport hostports { typeof meta nfproto . meta l4proto . th dport : verdict; counter; }
add map inet hostport hostports_ip4 { typeof ip daddr . meta l4proto . th dport : verdict; counter; }
add map inet hostport hostports_ip6 { typeof ip6 daddr . meta l4proto . th dport : verdict; counter; }
add map inet hostport dynamic_ports { typeof meta nfproto . meta l4proto . th dport : verdict; }
add map inet hostport pods_ip4 { typeof ip daddr : verdict; }
add map inet hostport pods_ip6 { typeof ip6 daddr : verdict; }
add map inet hostport waiting_hostports { typeof ip6 daddr . meta nfproto . meta l4proto . th dport : verdict; }
add map inet hostport waiting_hostports_ip4 { typeof ip6 daddr . ip daddr . meta l4proto . th dport : verdict; }
add map inet hostport waiting_hostports_ip6 { typeof ip6 daddr . ip6 daddr . meta l4proto . th dport : verdict; }
add map inet hostport localnet_needs { typeof ip6 daddr : verdict; }
add set inet hostport ipvs_ip4 { typeof ip daddr; }
add set inet hostport ipvs_ip6 { typeof ip6 daddr; }
add set inet hostport localnet { typeof iif; }
add set inet hostport local_ip4 { typeof ip daddr; flags dynamic,timeout; timeout 1m; }
add set inet hostport local_ip6 { typeof ip6 daddr; flags dynamic,timeout; timeout 1m; }
add set inet hostport deleted { typeof ip6 daddr; flags timeout; timeout 10m; }
add chain inet hostport dispatch
flush chain inet hostport dispatch
add chain inet hostport prerouting { type nat hook prerouting priority dstnat + 1; policy accept; }
flush chain inet hostport prerouting
add chain inet hostport output { type nat hook output priority -99; policy accept; }
flush chain inet hostport output
add chain inet hostport postrouting { type nat hook postrouting priority srcnat; policy accept; }
flush chain inet hostport postrouting
add chain inet hostport loopback { type filter hook prerouting priority raw; policy accept; }
flush chain inet hostport loopback
add rule inet hostport dispatch ip6 daddr ::1 return
add rule inet hostport dispatch ip6 daddr fe80::/10 return
add rule inet hostport dispatch ip daddr != 127.0.0.0/8 update @local_ip4 { ip daddr }
add rule inet hostport dispatch update @local_ip6 { ip6 daddr }
add rule inet hostport dispatch ip daddr . meta l4proto . th dport vmap @hostports_ip4
add rule inet hostport dispatch ip6 daddr . meta l4proto . th dport vmap @hostports_ip6
add rule inet hostport dispatch ip daddr @ipvs_ip4 return
add rule inet hostport dispatch ip6 daddr @ipvs_ip6 return
add rule inet hostport dispatch meta nfproto . meta l4proto . th dport vmap @hostports
add rule inet hostport prerouting iifname != "lo" ip daddr 127.0.0.0/8 return
add rule inet hostport prerouting fib daddr type local goto dispatch
add rule inet hostport output fib daddr type local goto dispatch
add rule inet hostport postrouting ct status dnat ct original ip daddr 127.0.0.0/8 ip daddr vmap @pods_ip4
add rule inet hostport postrouting ct status dnat ct original ip daddr @local_ip4 ip daddr vmap @pods_ip4
add rule inet hostport postrouting ct status dnat ct original ip6 daddr @local_ip6 ip6 daddr vmap @pods_ip6
add rule inet hostport loopback iif @localnet ip daddr 127.0.0.0/8 drop
add rule inet hostport loopback iif @localnet ip saddr 127.0.0.0/8 drop
"""
    assert "\n".join(base.base_commands()) == expected.strip()


def test_a_deleted_attachments_key_is_written_as_an_ipv6_address() -> None:
    key = "664b16ffde93ac1d-02419fd924bed545"
    address = "664b:16ff:de93:ac1d:0241:9fd9:24be:d545"
    for verb in ("add", "create", "delete"):
        assert base.deleted_command(verb, key) == f"{verb} element inet hostport deleted {{ {address} }}"


def test_what_tells_of_a_restore_is_the_unspecified_address() -> None:
    assert base.deleted_command("add", names.RESTORING) == (
        "add element inet hostport deleted { 0000:0000:0000:0000:0000:0000:0000:0000 }"
    )


def test_an_attachment_is_noted_as_deleted_anew_in_a_set_that_need_not_be_there() -> None:
    declaration = "add set inet hostport deleted { typeof ip6 daddr; flags timeout; timeout 10m; }"
    verbs = [base.deleted_command(verb, names.RESTORING) for verb in ("add", "delete", "add")]
    assert base.deletion_note_commands(names.RESTORING) == [declaration, *verbs]
    assert declaration in base.base_commands()


def test_the_probe_uses_the_whole_base_and_ends_in_a_command_that_must_fail() -> None:
    commands = probe_commands()
    assert commands[: len(base.base_commands())] == base.base_commands()
    assert commands[-1] == "delete chain inet hostport dnat-cannot-exist"


def test_sets_are_declared_before_the_first_command_about_their_elements_and_only_once() -> None:
    drop, port = "delete element inet hostport pods_ip4 { 10.0.0.1 }", "ipv4 . tcp . 8080"
    commands = [
        drop,
        "create chain inet hostport dnat-1",
        drop,
        base.base_commands()[1],
        f"create element inet hostport hostports {{ {port} : goto dnat-1 }}",
        "add element inet other pods_ip6 { ::1 }",
        "delete table inet other",
    ]
    assert base.with_declarations(commands) == [
        "add map inet hostport pods_ip4 { typeof ip daddr : verdict; }",
        *commands,
    ]
