"""Times side by side: the machines are shared, and only ratios of neighbours mean anything."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

Timed = Callable[[], Any]

AT_LEAST = 0.2
"""Seconds that a turn lasts: short calls are repeated."""


def interleaved(ours: Timed, theirs: Timed, repeats: int) -> list[float]:
    """Our time over theirs, each pair measured back to back after a warm-up: the machine's moods cancel."""
    ours(), theirs()
    return [seconds(ours) / seconds(theirs) for _ in range(repeats)]


def seconds(call: Timed) -> float:
    """Wall-clock time of a call; the median where one is so short that it is repeated."""
    times: list[float] = []
    while sum(times) < AT_LEAST:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
