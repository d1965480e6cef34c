from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab import CLIENT4, NODE4
from runtimes.containerd import port

if TYPE_CHECKING:
    from runtimes.containerd import Containerd

README = (Path(__file__).parents[2] / "README.md").read_text()
OWN_TO_A_RUN = [
    (r"[0-9a-f]{64}", "<id>"),
    (r"[0-9a-f]{12,64} eth0@[\d:]+ \d+:\d+ ", "<owner> "),
    (r"cni-[0-9a-f-]{36}", "cni-<uuid>"),
    (r"-[0-9a-f]{16}\b", "-<hash>"),
    (r"10\.88\.0\.\d+", "<pod's address>"),
    (r"fd00:88::[0-9a-f]+", "<pod's address>"),
]


def without_what_is_own_to_a_run(text: str) -> str:
    for pattern, name in OWN_TO_A_RUN:
        text = re.sub(pattern, name, text)
    return text


@pytest.mark.parametrize("containerd", ["newest_containerd"], indirect=True)
def test_a_sandbox_run_as_a_kubelet_does_gives_what_the_readme_shows(containerd: Containerd) -> None:
    node = containerd.host.node
    mappings = [port(8080), port(0, 9090)]
    sandbox = containerd.run("web", *mappings)
    (chain,) = set(re.findall(r"dnat-[0-9a-f-]+", node.ruleset()))
    sandbox.namespace.serve("tcp", 80, "web")
    shown = "RunPodSandbox, port_mappings:\n" + "".join(f"    {json.dumps(mapping)}\n" for mapping in mappings)
    shown += f"-> pod_sandbox_id {sandbox.id}\n"
    for listed in ("map inet hostport hostports", f"chain inet hostport {chain}"):
        shown += f"\n$ nft list {listed}\n{node.nft(f'list {listed}')}"
    assert node.client.ask("tcp", NODE4, 8080) == f"web {CLIENT4}"
    found = re.search(r"<!-- RunPodSandbox -->\n```text\n(.*?)```", README, re.DOTALL)
    assert found
    assert without_what_is_own_to_a_run(shown) == without_what_is_own_to_a_run(found.group(1)), shown
