"""GC: attachments of which the runtime no longer knows are removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_hostport.attachment import Attachment
from cni_hostport.errors import CNIError, Code, NFTError

if TYPE_CHECKING:
    from cni_hostport.log import Log
    from cni_hostport.skel import Call

VALID_ATTACHMENTS = "cni.dev/valid-attachments"


def collect(call: Call, log: Log) -> None:
    """Remove the attachments of a call's network that its runtime does not list as valid.

    Raises ``CNIError``: ``Code.INVALID_CONFIG`` if that is not a list of attachments, ``Code.RULESET_REFUSED`` if some
    could not be removed; and ``NFTError`` if nftables cannot be used.
    """
    if VALID_ATTACHMENTS not in call.config:
        return
    from cni_hostport import ownership
    from cni_hostport.kernel import nft

    valid = _valid_keys(call)
    context = nft.Nft()
    failures = []
    installed = context.installed()
    for key in sorted(installed.holders - valid):
        if key.startswith(f"{Attachment.network_key(call.network)}-"):
            try:
                ownership.release(context, key, log, installed)
            except (CNIError, NFTError) as error:
                failures.append(f"{key}: {error}")
    if failures:
        raise CNIError(Code.RULESET_REFUSED, f"{len(failures)} attachments could not be removed", "\n".join(failures))


def _valid_keys(call: Call) -> set[str]:
    listed = call.config[VALID_ATTACHMENTS]
    if listed is None:
        return set()
    try:
        if not isinstance(listed, list):
            raise TypeError  # noqa: TRY301 - as wrong as an item that is not an object
        return {Attachment(call.network, item["containerID"], item["ifname"]).key for item in listed}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CNIError(
            Code.INVALID_CONFIG, f"{VALID_ATTACHMENTS} {listed!r} is not a list of containerID and ifname"
        ) from error
