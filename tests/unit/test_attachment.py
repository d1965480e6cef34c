from __future__ import annotations

import hashlib
import re
from itertools import product

import pytest

from cni_hostport.attachment import Attachment, pod_name, printable, short_id
from cni_hostport.blake2_fallback import blake2b
from cni_hostport.ruleset.comment import Owner

LONG = "c0ffee" * 34
NAMESPACE = "/var/run/netns/cni-5f8a1b2c-0001-0002-0003-000000000004"


def test_an_attachment_is_told_apart_by_network_container_and_interface() -> None:
    parts = product(["pods", "other", LONG], ["c1", "c2", LONG], ["eth0", "net1"])
    assert len({Attachment(*part).key for part in parts}) == 18


def test_neither_namespace_nor_pod_identify_an_attachment() -> None:
    known = Attachment("pods", "c1", "eth0", NAMESPACE, "default/web")
    assert known.key == Attachment("pods", "c1", "eth0").key


def test_text_cannot_move_from_the_container_to_the_interface() -> None:
    assert Attachment("pods", "c1", "eth0").key != Attachment("pods", "c", "1eth0").key


@pytest.mark.parametrize(
    "attachment",
    [
        Attachment("pods", "c1", "eth0"),
        Attachment(LONG[:200], LONG[:200], "eth0"),
        Attachment("pods", "c1", "\u00e9th0"),
        Attachment("pods", "c1", "eth\udcff"),
    ],
)
def test_chain_names_are_short_whatever_the_names(attachment: Attachment) -> None:
    assert re.fullmatch("[0-9a-f]{16}-[0-9a-f]{16}", attachment.key)
    assert attachment.key.startswith(f"{Attachment.network_key(attachment.network)}-")


def test_keys_stay_what_they_are_from_one_release_to_the_next() -> None:
    assert Attachment("pods", "c1", "eth0").key == "664b16ffde93ac1d-02419fd924bed545"


@pytest.mark.parametrize(
    ("container_id", "shown"),
    [
        (LONG, "c0ffeec0ffee"),
        ("c1", "c1"),
        (f"default-{LONG}", "default-c0ffeec0ffee"),
        (f"k8s.io-of-a-team-{LONG[:40]}", "k8s.io-of-a-team-c0ffeec0ffee"),
        ("a-container-of-somebody", "a-container-"),
        ("", ""),
        ("container-", "container-"),
    ],
)
def test_an_id_is_shown_as_its_runtime_shows_it(container_id: str, shown: str) -> None:
    assert short_id(container_id) == shown


@pytest.mark.parametrize(
    ("owner", "comment"),
    [
        (Owner("c1", "eth0", NAMESPACE), f"c1 eth0 {NAMESPACE}"),
        (Owner("c1", "eth0"), "c1 eth0"),
        (Owner("c1", "eth0", NAMESPACE, "4:4026532281"), f"c1 eth0 4:4026532281 {NAMESPACE}"),
        (Owner("c1", "eth0", NAMESPACE, "4:4026532281", "25:3"), f"c1 eth0@25:3 4:4026532281 {NAMESPACE}"),
        (Owner("c1", "eth0", NAMESPACE, "4:5", "25:3:811"), f"c1 eth0@25:3:811 4:5 {NAMESPACE}"),
        (Owner("c1", "a@b", "/x", "4:5", "25:3"), "c1 a@b@25:3 4:5 /x"),
        (Owner("c1", "a@b", "/x", "4:5"), "c1 a@b 4:5 /x"),
        (Owner("c1", "eth0", "/run/my pods/c1 "), "c1 eth0 /run/my pods/c1 "),
        (Owner(LONG[:64], "eth0", NAMESPACE), f"{LONG[:64]} eth0 {NAMESPACE}"),
    ],
)
def test_an_owner_is_read_back_from_its_comment(owner: Owner, comment: str) -> None:
    assert owner.comment() == comment
    assert Owner.parse(comment) == owner


@pytest.mark.parametrize("length", [1, 11, 12, 13, 64, 114, 115, 116, 117, 200])
@pytest.mark.parametrize("path", [0, 1, 60, 109, 110, 111, 112, 121, 122, 123, 200])
@pytest.mark.parametrize("ifname", ["e", "eth0", "a" * 15])
def test_a_comment_fits_and_holds_at_least_what_runtimes_show_of_an_id(length: int, path: int, ifname: str) -> None:
    owner = Owner(LONG[:length], ifname, "/" * path)
    comment = owner.comment()
    read = Owner.parse(comment)
    assert len(comment.encode()) <= 128
    assert len(read.container_id) >= min(length, 12)
    assert owner.container_id.startswith(read.container_id)
    assert read.ifname == ifname
    assert read.netns in {owner.netns, ""}


def test_the_directory_is_left_out_before_the_path() -> None:
    place, path = "25:1234567:99", "/" * 99
    assert Owner("c1", "eth0", "/" * 99, "4:5", place).comment() == f"c1 eth0@{place} 4:5 {path}"
    assert Owner(LONG[:64], "eth0", "/" * 99, "4:5", place).comment() == f"{LONG[:19]} eth0 4:5 {path}"


def test_an_older_version_goes_by_the_path_and_its_identity() -> None:
    comment = Owner("c1", "eth0", NAMESPACE, "4:5", "25:3:811").comment()
    container_id, ifname, identity, path = comment.split(" ")
    assert (container_id, ifname.partition("@")[0], identity, path) == ("c1", "eth0", "4:5", NAMESPACE)


def test_a_container_id_is_shortened_before_the_path_is_left_out() -> None:
    assert Owner(LONG[:200], "eth0", "/" * 110).comment() == f"{LONG[:12]} eth0 {'/' * 110}"
    assert Owner(LONG[:200], "eth0", "/" * 111).comment() == f"{LONG[:123]} eth0"
    assert Owner("c1", "eth0", "/" * 120).comment() == f"c1 eth0 {'/' * 120}"


@pytest.mark.parametrize("netns", ['/run/"x"', "/run/x\n", "/run/\\x", "/run/\u00e9", "/run/\udcff", "/run/x\0"])
def test_a_path_that_would_have_to_be_changed_is_left_out(netns: str) -> None:
    assert Owner("c1", "eth0", netns).comment() == "c1 eth0"


@pytest.mark.parametrize(
    ("comment", "owner"),
    [
        ("", Owner("", "")),
        ("c1", Owner("c1", "")),
        (" ", Owner("", "")),
        ("  x", Owner("", "", "x")),
        ("a b c d", Owner("a", "b", "c d")),
        ("a b 4:5 c", Owner("a", "b", "4:5 c")),
        ("a b 4:5", Owner("a", "b", "", "4:5")),
        ("a b 4:5 /c d", Owner("a", "b", "/c d", "4:5")),
        ("a b /4:5 /c d", Owner("a", "b", "/4:5 /c d")),
        ("a b@1:2", Owner("a", "b", "", "", "1:2")),
        ("a b@1", Owner("a", "b@1")),
        ("a @1:2:3:4 x", Owner("a", "@1:2:3:4", "x")),
    ],
)
def test_a_comment_of_somebody_else_is_read_without_failing(comment: str, owner: Owner) -> None:
    assert Owner.parse(comment) == owner


def test_printable_text_has_no_quotes_backslashes_or_other_alphabets() -> None:
    everything = "".join(map(chr, range(0x180))) + "\u2028\ud800\U0001f600"
    kept = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) not in '"\\')
    assert printable(everything).replace("?", "") == kept.replace("?", "")
    assert len(printable(everything)) == len(everything)


@pytest.mark.parametrize(
    ("cni_args", "name"),
    [
        ("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=1", "default/web"),
        ("K8S_POD_NAME=web;IgnoreUnknown=1;K8S_POD_NAMESPACE=default", "default/web"),
        ("K8S_POD_NAME=web", "web"),
        ("K8S_POD_NAMESPACE=default", ""),
        ("K8S_POD_NAMESPACE=;K8S_POD_NAME=web", "web"),
        ("K8S_POD_NAMESPACE=a=b;K8S_POD_NAME=web=", "a=b/web="),
        ("K8S_POD_NAME=old;K8S_POD_NAME=new", "new"),
        ('K8S_POD_NAME=we"b\n\\', "we?b??"),
        (f"K8S_POD_NAME={LONG}", LONG[:128]),
        ("", ""),
        (";;=;K8S_POD_NAME", ""),
        ("no equals sign", ""),
    ],
)
def test_a_pods_name_is_taken_from_whatever_arguments_there_are(cni_args: str, name: str) -> None:
    assert pod_name(cni_args) == name


@pytest.mark.parametrize("length", [0, 1, 63, 127, 128, 129, 255, 256, 257, 1000])
def test_a_key_is_the_same_where_python_refuses_blake2(length: int) -> None:
    data = bytes(range(256)) * 4
    for size in (1, 8, 32, 64):
        digest = hashlib.blake2b(data[:length], digest_size=size).hexdigest()
        assert blake2b(data[:length], digest_size=size).hexdigest() == digest
