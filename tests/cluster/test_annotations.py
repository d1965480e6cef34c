"""The account of the annotator: what a real API server lets it do, and what not. There are no nodes but their names."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from go_tools import ROOT, TOOLS
from lab import CLIENT4, Namespace, require
from resident import eventually

from cluster.control import SERVER, Control
from cni_hostport.dynamic_ports import keys

if TYPE_CHECKING:
    from collections.abc import Iterator

ACCOUNT = ROOT / "conf" / "kubernetes" / "annotations" / "account.yaml"
NAME, NAMESPACE = "hostport-annotator", "kube-system"
PODS = "/api/v1/namespaces/default/pods"
STATUS = f"{PODS}/annotated/status"
POLICY = "ValidatingAdmissionPolicy 'hostport-annotator'"


def pod(name: str, node: str, namespace: str = "default", account: str = "default") -> dict[str, Any]:
    spec = {"nodeName": node, "serviceAccountName": account, "automountServiceAccountToken": False,
            "containers": [{"name": "web", "image": "web"}]}  # fmt: skip
    metadata = {"name": name, "namespace": namespace, "labels": {"name": name}, "annotations": {"its": "own"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


class Account:
    """The account, with a token as the annotator of the node ``one`` has it."""

    def __init__(self, namespace: Namespace, control: Control) -> None:
        self._namespace, self._control = namespace, control
        bound = [f"--bound-object-{key}={value}" for key, value in (("kind", "Pod"), ("name", NAME))]
        self._token = control.kubectl("create", "token", NAME, f"--namespace={NAMESPACE}", *bound).strip()

    def ask(self, method: str, path: str, document: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        headers = [f"Authorization: Bearer {self._token}", "Content-Type: application/merge-patch+json"]
        curl = [
            "curl", "--insecure", "--silent", "--request", method, "--write-out", "\n%{http_code}", f"{SERVER}{path}",
            *(part for header in headers for part in ("--header", header)),
            *(["--data", json.dumps(document)] if document else []),
        ]  # fmt: skip
        text, _, status = self._namespace.run(*curl).stdout.rpartition("\n")
        return int(status), json.loads(text)

    def annotate(self, name: str, **metadata: Any) -> tuple[int, dict[str, Any]]:
        document = {"metadata": {"annotations": {keys.STATUS: "{}"}, **metadata}}
        return self.ask("PATCH", f"{PODS}/{name}/status", document)

    def pod(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._control.kubectl("get", "pod", "annotated", "--output=json"))
        return found


@pytest.fixture(scope="module")
def account(_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    for program in ("etcd", "kube-apiserver", "kubectl"):
        require((TOOLS / program).exists(), f"needs {program}, built by tests/build-tools.sh")
    for program in ("curl", "openssl"):
        require(shutil.which(program), f"needs the program {program}")
    with Namespace("control") as namespace:
        namespace.ip("link add lan type bridge", f"addr add {CLIENT4}/24 dev lan", "link set lan up")
        with Control(namespace, (), tmp_path_factory.mktemp("control") / "control") as control:
            control.begin()
            control.wait()
            control.kubectl("apply", f"--filename={ACCOUNT}")
            control.kubectl("create", "serviceaccount", "default")
            node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "one"}}
            pods = [pod(NAME, "one", NAMESPACE, NAME), pod("annotated", "one"), pod("elsewhere", "two")]
            objects = {"apiVersion": "v1", "kind": "List", "items": [node, *pods]}
            control.kubectl("create", "--filename=-", text=json.dumps(objects))
            made = Account(namespace, control)
            # a role and a policy hold a moment after they were made
            assert eventually(lambda: made.annotate("elsewhere")[0] == 422)
            yield made


def test_it_annotates_pods_of_its_own_node_and_nothing_else_of_them_changes(account: Account) -> None:
    before = account.pod()
    assert account.annotate("annotated", uid=before["metadata"]["uid"])[0] == 200
    after = account.pod()
    assert after["metadata"]["annotations"].pop(keys.STATUS) == "{}"
    assert after["metadata"]["annotations"] == {"its": "own"}
    assert (after["spec"], after["status"]) == (before["spec"], before["status"])


def test_what_it_writes_again_changes_no_version(account: Account) -> None:
    assert account.annotate("annotated")[0] == 200
    version = account.pod()["metadata"]["resourceVersion"]
    assert account.annotate("annotated")[0] == 200
    assert account.pod()["metadata"]["resourceVersion"] == version


def test_another_pod_of_the_same_name_is_told_by_the_field(account: Account) -> None:
    status, answer = account.annotate("annotated", uid="another")
    assert (status, {cause["field"] for cause in answer["details"]["causes"]}) == (422, {"metadata.uid"})


def test_a_pod_that_is_gone_is_not_found(account: Account) -> None:
    assert account.annotate("gone", uid="another")[0] == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", PODS),
        ("GET", f"{PODS}/annotated"),
        ("GET", STATUS),
        ("DELETE", f"{PODS}/annotated"),
        ("PATCH", f"{PODS}/annotated"),
        ("GET", "/api/v1/nodes"),
        ("GET", "/api/v1/namespaces/kube-system/secrets"),
    ],
)
def test_it_may_do_nothing_else(account: Account, method: str, path: str) -> None:
    document = {"metadata": {"annotations": {keys.STATUS: "{}"}}} if method == "PATCH" else None
    assert account.ask(method, path, document)[0] == 403


@pytest.mark.parametrize(
    "document",
    [
        {"metadata": {"annotations": {"other": "1"}}},
        {"metadata": {"annotations": {"its": "1"}}},
        {"metadata": {"annotations": {"its": None}}},
        {"metadata": {"labels": {"name": "other"}}},
        {"metadata": {"finalizers": ["example.com/never"]}},
        {"status": {"phase": "Failed"}},
        {"status": {"podIP": "192.0.2.200", "podIPs": [{"ip": "192.0.2.200"}]}},
    ],
)
def test_of_a_pod_it_may_write_one_annotation(account: Account, document: dict[str, Any]) -> None:
    status, answer = account.ask("PATCH", STATUS, document)
    assert (status, POLICY in answer["message"]) == (422, True), answer


def test_it_cannot_change_an_image(account: Account) -> None:
    before = account.pod()
    document = {"spec": {"containers": [before["spec"]["containers"][0] | {"image": "other"}]}}
    assert account.ask("PATCH", f"{PODS}/annotated", document)[0] == 403
    account.ask("PATCH", STATUS, document)
    assert account.pod()["spec"] == before["spec"]


def test_pods_of_other_nodes_are_out_of_its_reach(account: Account) -> None:
    status, answer = account.annotate("elsewhere")
    assert (status, "its own node" in answer["message"]) == (422, True), answer
