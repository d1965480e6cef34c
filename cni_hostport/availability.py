"""STATUS: whether nftables on this node accepts every expression of a network's rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport.config import NetworkConfig
from cni_hostport.errors import CNIError, Code, NFTError
from cni_hostport.kernel import nft
from cni_hostport.ruleset.commands import probe_commands

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def probe(config: Mapping[str, Any]) -> None:
    """Ask the kernel whether it accepts every expression of a network's rules, leaving nothing behind.

    Raises ``CNIError``: ``Code.NOT_AVAILABLE`` if it does not, ``Code.INVALID_CONFIG`` for what is no configuration.
    """
    commands = probe_commands(NetworkConfig.parse(config).conditions)
    try:
        nft.Nft().run(commands)
    except NFTError as error:
        from cni_hostport import failures
        from cni_hostport.kernel import refusals

        # the probe's last command is there to fail, so that the kernel takes everything back; and ADD puts declarations
        # of other versions right
        if not refusals.is_only_missing(error, commands[-1]):
            msg = "host ports are not available: nftables cannot be used on this node"
            reason = failures.refused(error, config)
            raise CNIError(Code.NOT_AVAILABLE, msg, reason.details or reason.msg) from error
