"""What a call answered, and what of the protocol that breaks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cni_hostport.errors import Code

CODES = {int(code) for code in Code} - {int(Code.UNEXPECTED)}
WITH_RESULT = {"ADD", "VERSION"}
KEYS = {"cniVersion", "code", "msg"}


@dataclass(frozen=True)
class Answer:
    """Exit status, negative for a signal, and what was written."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def document(self) -> Any:
        """The JSON document of stdout; raises ``ValueError`` if it is not exactly one."""
        return json.loads(self.stdout.decode())

    @property
    def code(self) -> int:
        """The code of the error JSON, 0 for a success."""
        return int(self.document["code"]) if self.status else 0

    def breach(self, command: str) -> str:
        """Tell what of the protocol it breaks, empty if nothing: the text alone, not the ruleset."""
        if self.status not in {0, 1}:
            return f"it ended with {self.status}"
        if b"Traceback" in self.stdout + self.stderr:
            return "it shows a traceback"
        if not self.status and command not in WITH_RESULT:
            return "it succeeded and printed something" if self.stdout else ""
        try:
            document = self.document
        except ValueError:
            return "what it printed is not one JSON document"
        if self.status and not (isinstance(document, dict) and KEYS <= set(document) <= {*KEYS, "details"}):
            return "what it printed is not an error"
        is_expected = not self.status or (document["code"] in CODES and document["msg"])
        return "" if is_expected else f"code {document['code']} is none to expect"
