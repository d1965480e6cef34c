"""A network configuration list, as operators write it and libcni keeps it: its plugins and their configurations."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PLUGIN = "hostport"  # the type of this plugin


class Conflist(BaseModel):
    """A network configuration list; what stands alone is a list of one plugin."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    cni_version: str = Field("", alias="cniVersion")
    plugins: tuple[dict[str, Any], ...]

    @classmethod
    def parse(cls, data: bytes) -> Conflist:
        """Read a configuration file; raises ``ValueError`` with a sentence."""
        try:
            document = json.loads(data)
            if isinstance(document, dict) and "plugins" not in document:
                document = {"cniVersion": "", **document, "plugins": [document]}
            return cls.model_validate(document)
        except (RecursionError, ValueError) as error:
            raise ValueError(sentence(error)) from error

    @property
    def types(self) -> list[str]:
        """The types of its plugins, in their order."""
        return [str(plugin.get("type", "")) for plugin in self.plugins]

    def plugin(self, kind: str = PLUGIN) -> dict[str, Any] | None:
        """Return the configuration of its first plugin of a type."""
        return next((plugin for plugin in self.plugins if plugin.get("type") == kind), None)


def sentence(error: Exception) -> str:
    """Return why a document is not valid, without what only a programmer needs."""
    if isinstance(error, ValidationError):
        reasons = ((".".join(map(str, item["loc"])), item["msg"]) for item in error.errors())
        return "; ".join(f"{key}: {reason}" if key else reason for key, reason in reasons)
    return str(error)
