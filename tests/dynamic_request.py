"""What a network configuration and a runtime say where a pod asks for dynamic host ports."""

from __future__ import annotations

from typing import Any

RANGE = range(40000, 40008)
RANGE_TEXT = f"{RANGE[0]}-{RANGE[-1]}"


def asking(request: str, *mappings: dict[str, Any], ranges: str = RANGE_TEXT) -> dict[str, Any]:
    """Return the keys of a configuration by which a pod asks for dynamic ports, as in ``80/tcp``, beside mappings."""
    return {"dynamicPorts": ranges, "runtimeConfig": {"portMappings": list(mappings), "dynamicPorts": request}}
