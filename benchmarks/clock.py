"""Times side by side: the machines are shared, and only ratios of neighbours mean anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Timed = Callable[[], Any]


def interleaved(ours: Timed, theirs: Timed, repeats: int) -> list[float]:
    """Our time over theirs, each pair measured back to back after a warm-up: the machine's moods cancel."""
    ours(), theirs()
    return [seconds(ours) / seconds(theirs) for _ in range(repeats)]


def seconds(call: Timed) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
