"""What nftables refuses, as the errors that a runtime sees. Imported only where an operation has failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport.errors import LONGEST_QUOTE, CNIError, Code, NFTError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping


def refused(error: NFTError, config: Mapping[str, object] | None = None) -> CNIError:
    """Translate an error of nftables in a call with this network configuration.

    nftables did not take the rules, or it cannot be used at all.
    """
    if isinstance(error, UnavailableError):
        from cni_hostport.kernel import crashes

        return CNIError(Code.RULESET_REFUSED, crashes.explained(error, config or {}))
    first = ": ".join(error.refusals[0])
    return CNIError(Code.RULESET_REFUSED, f"nftables refused the host port rules: {first[:LONGEST_QUOTE]}", str(error))


def lost_races(error: NFTError, attempts: int) -> CNIError:
    """Translate the last error of a transaction whose attempts all were lost, each against a change of others."""
    return CNIError(
        Code.TRY_AGAIN, f"the host port rules were changed by others {attempts} times in a row; try again", str(error)
    )
