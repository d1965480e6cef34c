"""How long the attacks last.

``HOSTPORT_TESTS_ATTACK=N`` makes them N times as long, with other cases for every N. Without it they take some minutes,
and are the same every time.
"""

from __future__ import annotations

import os
import random

from hypothesis import HealthCheck, settings

FACTOR = max(1, int(os.environ.get("HOSTPORT_TESTS_ATTACK", "1")))


def searching(examples: int, steps: int = 1) -> settings:
    """Return how hypothesis searches: for this many examples, of so many steps."""
    return settings(
        max_examples=examples * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        stateful_step_count=steps,
    )


def chance(name: str) -> random.Random:
    """Return the source of random numbers of the attack of this name."""
    return random.Random(f"{name} {FACTOR}")  # noqa: S311 - no secret
