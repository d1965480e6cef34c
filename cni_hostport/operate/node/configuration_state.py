"""What is to be said of the network configuration, to the operator and to whoever asks for this node's health."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

POLL = 30  # seconds; for file systems that tell of no changes, and for links on the way to the directory


class Condition(StrEnum):
    """How a directory of network configurations is."""

    IN_STEP = "in step"
    WAITING = "waiting"
    NOT_IN_STEP = "not in step"


@dataclass(frozen=True)
class State:
    """What an update found and did.

    ``sentence`` is for a person. ``has_hostport`` tells whether the file that a runtime takes now leads to this plugin,
    even where it is not the newest. ``again`` is the number of seconds until another update is due without a change.
    ``is_passing`` tells that another program seems to be in the middle of its work.
    """

    condition: Condition
    sentence: str
    has_hostport: bool = False
    again: float = POLL
    is_passing: bool = False

    @property
    def is_ready(self) -> bool:
        """Tell whether the next pod gets its host ports, with the options that were given."""
        return self.condition is Condition.IN_STEP and self.has_hostport


class PostponedError(Exception):
    """An update cannot get further now."""

    def __init__(
        self,
        sentence: str,
        condition: Condition = Condition.NOT_IN_STEP,
        *,
        again: float = POLL,
        is_passing: bool = False,
    ) -> None:
        """Keep what there is to say."""
        super().__init__(sentence)
        self.state = State(condition, sentence, again=again, is_passing=is_passing)
