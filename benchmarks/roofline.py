"""The machine's measured speed, and the counted work of the attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.calls import BACKWARD
from ipa_bridge.config import IPAConfig


def machine() -> dict[str, float]:
    """The best rate of a large float32 matrix product, in FLOP/s, and of adding large arrays, in bytes/s."""
    import torch

    a, b, c = (torch.rand(2048, 2048) for _ in range(3))
    x, y, z = (torch.rand(1 << 26) for _ in range(3))
    return {
        "flops": 2 * 2048**3 / shortest(lambda: torch.mm(a, b, out=c)),
        "bytes": 3 * 4 * (1 << 26) / shortest(lambda: torch.add(x, y, out=z)),
    }


def shortest(call: Callable[[], Any], repeats: int = 7) -> float:
    """Seconds of the fastest of several calls."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def work(config: IPAConfig, residues: int, direction: str) -> dict[str, float]:
    """FLOP that streaming computes in the attention core, and bytes of the necessary passes over a float32 pair.

    The forward pass computes, per residue pair and head, the pair bias, the sum over the pair, queries·keys, distances
    and the sums of values. The backward pass computes the logits again, and for each product the gradients of both
    factors. Forward reads the pair once; backward reads it once and writes its gradient.
    """
    pair_channel = config.pair_channel or 0
    scalar, points, values = (
        2 * config.num_scalar_qk,
        9 * config.num_point_qk,
        2 * (config.num_scalar_v + 3 * config.num_point_v),
    )
    forward = config.num_head * (4 * pair_channel + scalar + points + values)
    # bias and dP of the pair; dz of both; the bias weight's gradient. Logits; dq and dk; their points'. dP and dv.
    backward = config.num_head * (10 * pair_channel + 3 * scalar + 3 * points + 2 * values)
    passes = 3 if direction == BACKWARD else 1
    flops = forward + (backward if direction == BACKWARD else 0)
    return {"flops": float(flops) * residues**2, "bytes": passes * 4.0 * pair_channel * residues**2}
