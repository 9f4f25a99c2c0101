"""Times of calls measured side by side: on a shared machine only ratios of such times mean anything."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.calls import Call, CompiledByJax

AT_LEAST = 0.2
"""Minimum seconds of a turn; short calls are repeated until they reach it."""


def interleaved(ours: Call, theirs: Call, repeats: int) -> list[float]:
    """Our time over theirs, each pair measured back to back after a warm-up, so that the machine's load cancels."""
    ours(), theirs()
    return [seconds(ours) / seconds(theirs) for _ in range(repeats)]


def seconds(call: Call) -> float:
    """Wall-clock time of a call; the median if the call is short and so repeated."""
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
    """Time of a PyTorch call, by the GPU's events; on a CPU by the wall clock."""
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
    """Time of a JAX call, by the wall clock over several in a row, because one call may be shorter than its launch."""
    import jax

    call()
    started = time.perf_counter()
    result = None
    for _ in range(calls):
        del result
        result = call.launch()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / calls
