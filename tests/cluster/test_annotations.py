"""The account of the annotator: what an API server lets it do, and what not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from go_tools import ROOT
from resident import eventually

from cluster.cluster import pod
from cluster.control import SERVER
from cni_hostport.dynamic_ports import keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.cluster import Cluster

ACCOUNT = ROOT / "conf" / "kubernetes" / "annotations" / "account.yaml"
NAME, NAMESPACE = "hostport-annotator", "kube-system"
PODS = "/api/v1/namespaces/default/pods"
STATUS = f"{PODS}/annotated/status"
POLICY = "ValidatingAdmissionPolicy 'hostport-annotator'"


class Account:
    """The account, with a token as the annotator of the first node has it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        bound = [f"--bound-object-{key}={value}" for key, value in (("kind", "Pod"), ("name", NAME))]
        self._token = cluster.kubectl("create", "token", NAME, f"--namespace={NAMESPACE}", *bound).strip()

    def ask(self, method: str, path: str, document: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        headers = [f"Authorization: Bearer {self._token}", "Content-Type: application/merge-patch+json"]
        curl = [
            "curl", "--insecure", "--silent", "--request", method, "--write-out", "\n%{http_code}", f"{SERVER}{path}",
            *(part for header in headers for part in ("--header", header)),
            *(["--data", json.dumps(document)] if document else []),
        ]  # fmt: skip
        text, _, status = self.cluster.client.run(*curl).stdout.rpartition("\n")
        return int(status), json.loads(text)

    def annotate(self, name: str, **metadata: Any) -> tuple[int, dict[str, Any]]:
        document = {"metadata": {"annotations": {keys.STATUS: "{}"}, **metadata}}
        return self.ask("PATCH", f"{PODS}/{name}/status", document)

    def pod(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.cluster.kubectl("get", "pod", "annotated", "--output=json"))
        return found


@pytest.fixture(scope="module")
def account(cluster: Cluster) -> Iterator[Account]:
    cluster.kubectl("apply", f"--filename={ACCOUNT}")
    one, two = cluster.nodes
    own = pod(NAME, node=one, serviceAccountName=NAME, automountServiceAccountToken=False, nodeName=one.name)
    own["metadata"]["namespace"] = NAMESPACE
    cluster.apply(own)
    with cluster.running(pod("annotated", node=one), pod("elsewhere", node=two)):
        made = Account(cluster)
        # a role and a policy hold a moment after they were made
        assert eventually(lambda: made.annotate("elsewhere")[0] == 422)
        yield made
    cluster.delete(own)
    cluster.kubectl("delete", f"--filename={ACCOUNT}")


def test_it_annotates_pods_of_its_own_node_and_nothing_else_of_them_changes(account: Account) -> None:
    before = account.pod()
    assert account.annotate("annotated", uid=before["metadata"]["uid"])[0] == 200
    after = account.pod()
    assert after["metadata"]["annotations"].pop(keys.STATUS) == "{}"
    assert (after["metadata"]["annotations"] or None) == before["metadata"].get("annotations")
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
