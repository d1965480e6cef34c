"""What ``kubectl apply -k`` sends to a cluster, for each distribution."""

from __future__ import annotations

import re
import subprocess

import pytest
from go_tools import ROOT, TOOLS
from lab import require

from cni_hostport import __version__
from cni_hostport.config import NetworkConfig

MANIFESTS = ROOT / "conf" / "kubernetes"
DISTRIBUTIONS = sorted(path.parent.name for path in MANIFESTS.glob("*/directories"))


def rendered(directory: str) -> str:
    require((TOOLS / "kubectl").exists(), "needs kubectl, built by tests/build-tools.sh")
    command = [str(TOOLS / "kubectl"), "kustomize", str(MANIFESTS / directory)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_distribution_has_its_directories_in_both_manifests(distribution: str) -> None:
    directories = [re.findall(r"HOSTPORT_(?:BIN|CONF|CACHE)_DIR: (/.*)", rendered(f"{distribution}{suffix}"))
                   for suffix in ("", "/uninstall")]  # fmt: skip
    assert directories[0] == directories[1]
    assert len(directories[0]) == 3


@pytest.mark.parametrize("directory", ["kubeadm", "kubeadm/uninstall"])
def test_what_uninstalls_takes_the_place_of_what_installs(directory: str) -> None:
    text = rendered(directory)
    assert "kind: DaemonSet\nmetadata:\n  labels:" in text
    assert text.count("name: hostport\n") == text.count("app.kubernetes.io/name: hostport\n") + 1
    assert f"image: localhost/hostport:{__version__}\n" in text


@pytest.mark.parametrize("directory", ["kubeadm", "kubeadm/uninstall"])
def test_the_api_server_is_out_of_its_reach(directory: str) -> None:
    text = rendered(directory)
    assert "automountServiceAccountToken: false\n" in text
    assert not re.findall(r"kind: (?:\w*Role\w*|ServiceAccount)$", text, re.MULTILINE)


@pytest.mark.parametrize("distribution", sorted(path.parent.name for path in MANIFESTS.glob("*/annotations")))
def test_annotations_are_added_to_what_a_distribution_has(distribution: str) -> None:
    without, added = rendered(distribution), rendered(f"{distribution}/annotations")
    for directory in re.findall(r"HOSTPORT_.*", without):
        assert directory in added
    assert added.count(f"image: localhost/hostport:{__version__}\n") == 3
    # one container has the account
    assert (
        "automountServiceAccountToken: false\n      containers:\n      - args:\n        - node\n        - annotate\n"
        in added
    )
    assert "kubectl.kubernetes.io/default-container: agent\n" in added


def test_who_has_no_annotations_has_another_account() -> None:
    for directory in ("kubeadm", "kubeadm/uninstall"):
        assert "serviceAccountName: default\n" in rendered(directory)


def test_the_options_that_are_shipped_are_none() -> None:
    assert (MANIFESTS / "base" / "options.json").read_text() == "{}\n"
    NetworkConfig.parse({})
