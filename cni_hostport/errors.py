"""The one error type that crosses the plugin's edge, and its codes.

Codes 1 to 99 are the CNI specification's (SPEC.md, section 5 "Error"); 100 and above belong to this plugin.
"""

from enum import IntEnum


class Code(IntEnum):
    """What went wrong, as the number a runtime sees.

    The specification's code 3 (unknown container) makes a runtime skip its clean-up and is never used here.
    """

    INCOMPATIBLE_VERSION = 1
    INVALID_ENVIRONMENT = 4
    IO_FAILURE = 5
    DECODING_FAILURE = 6
    INVALID_CONFIG = 7
    PLUGIN_NETNS = 8
    TRY_AGAIN = 11
    NOT_AVAILABLE = 50
    PORT_TAKEN = 100
    RULESET_REFUSED = 101
    HOST_SETTING = 102
    CHECK_FAILED = 103
    UNEXPECTED = 999


class CNIError(Exception):
    """An operation failed; ``skel`` prints it as the error JSON.

    ``msg`` is a sentence for the person who reads ``kubectl describe pod``; ``details`` is optional and longer.
    """

    def __init__(self, code: Code, msg: str, details: str = "") -> None:
        """Keep code, sentence and details apart: each is a key of the error JSON."""
        super().__init__(msg)
        self.code = code
        self.msg = msg
        self.details = details
