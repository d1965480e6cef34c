"""What ``hostport explain`` says on a node."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import node_process
from click.testing import CliRunner
from lab import config, mapping

from cni_hostport.operate.cli import main

if TYPE_CHECKING:
    from lab import Node, Pod

ANSWER = "the pod's answer"


@dataclass(frozen=True)
class Explanation:
    """The exit status, and the statements."""

    status: int
    statements: list[dict[str, Any]]

    def texts(self, status: str) -> list[str]:
        return [statement["text"] for statement in self.statements if statement["status"] == status]

    @property
    def problems(self) -> list[str]:
        return self.texts("problem")

    @property
    def notes(self) -> list[str]:
        return self.texts("note")

    @property
    def last(self) -> dict[str, Any]:
        """The last statement but for those of the pod's answer: the path of a connection, where it was traced."""
        return [statement for statement in self.statements if not statement["text"].startswith(ANSWER)][-1]

    @property
    def answer(self) -> str:
        """Where the pod's answer goes, or why it goes nowhere."""
        return str(self.statement(ANSWER)["text"]).removeprefix(f"{ANSWER} ")

    @property
    def rules(self) -> list[str]:
        """The rules that it met, without the table ``inet hostport`` and with attachments' keys cut off."""
        lines = (line.removeprefix("inet hostport ") for line in self.last.get("details", ()))
        return [line if " " in chain else f"{chain.partition('-')[0]}:{rule}" for line in lines
                for chain, _, rule in [line.partition(":")]]  # fmt: skip

    def statement(self, text: str) -> dict[str, Any]:
        """Return the one statement that has this in its text."""
        [found] = [statement for statement in self.statements if text in statement["text"]]
        return found


def explain(node: Node, *arguments: str, cache: object = "/nonexistent") -> Explanation:
    """Run it, see that no error is written, and that the status is 1 if there is a problem."""
    with node_process.on(node):
        ran = CliRunner().invoke(main, ["explain", *arguments, "--json", "--cache-dir", str(cache)])
    if ran.stderr:
        raise AssertionError(ran.stderr)
    explanation = Explanation(ran.exit_code, json.loads(ran.stdout))
    if explanation.status != bool(explanation.problems):
        raise AssertionError(explanation)
    return explanation


def silent_pod(node: Node) -> Pod:
    """Return a pod with host port 8080, in which nothing listens."""
    pod = node.pod(4)
    node.cni("ADD", pod, config(pod, mapping(8080)), ARGS="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web")
    return pod


def serving_pod(node: Node, *mappings: dict[str, Any]) -> Pod:
    """Return a pod with a server, and with these mappings if there are any."""
    pod = node.pod(4)
    pod.serve("tcp", 80, "web")
    if mappings:
        node.add(pod, *mappings)
    return pod
