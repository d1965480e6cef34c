"""Pods that have dynamic host ports, as a client of the API server finds them: by their annotations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cni_hostport.dynamic_ports import keys

if TYPE_CHECKING:
    from cluster.cluster import Cluster

NAME = "dynamic-ports"  # of the Deployment in the example


@dataclass(frozen=True)
class Replica:
    """A pod, and where clients reach it."""

    name: str
    uid: str
    node: str
    address: str
    port: int

    @property
    def answer(self) -> str:
        """What it answers: its name, and the port that it itself knows."""
        return f"{self.name} {self.port}\n"


def assigned(pod: dict[str, Any], request: str = "80/tcp") -> dict[str, Any]:
    """Return what a pod's annotation tells of a container port, nothing if there is none."""
    told = json.loads(pod["metadata"]["annotations"].get(keys.STATUS, "{}"))
    return dict(told.get(request, {}))


def replicas(cluster: Cluster) -> list[Replica]:
    """Return the replicas that are ready, and whose annotation tells their port."""
    pods = [pod for pod in cluster.get("pods", f"--selector=app={NAME}") if _is_ready(pod) and assigned(pod)]
    return [
        Replica(
            pod["metadata"]["name"], pod["metadata"]["uid"], pod["spec"]["nodeName"],
            assigned(pod)["hostIP"], assigned(pod)["hostPort"],
        )
        for pod in pods
    ]  # fmt: skip


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = {item["type"]: item["status"] for item in pod["status"].get("conditions", ())}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]
