"""Times side by side: the machines are shared, and only ratios of neighbours mean anything."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.calls import Call, CompiledByJax

AT_LEAST = 0.2
"""Seconds that a turn lasts: short calls are repeated."""


def interleaved(ours: Call, theirs: Call, repeats: int) -> list[float]:
    """Our time over theirs, each pair measured back to back after a warm-up: the machine's moods cancel."""
    ours(), theirs()
    return [seconds(ours) / seconds(theirs) for _ in range(repeats)]


def seconds(call: Call) -> float:
    """Wall-clock time of a call; the median where one is so short that it is repeated."""
    times: list[float] = []
    while sum(times) < AT_LEAST:
        times.append(once(call))
    return statistics.median(times)


def once(call: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def torch_seconds(call: Call, device: str) -> float:
    """Time of PyTorch's call by the GPU's events; on a CPU by the clock."""
    import torch

    if device == "cpu":
        return once(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    del result
    return start.elapsed_time(end) / 1e3


def jax_seconds(call: CompiledByJax, calls: int = 10) -> float:
    """Time of JAX's call by the clock over several, one after the other, for one alone is shorter than its launch."""
    import jax

    call()
    started = time.perf_counter()
    result = None
    for _ in range(calls):
        del result
        result = call.launch()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / calls
