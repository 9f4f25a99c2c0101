"""Compile time and run time of the structure module's layers under `hk.scan`, against the same layers unrolled.

`python -m benchmarks.layer_loop --residues 128 384`
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

import ipa_jax
from benchmarks.calls import Call
from benchmarks.clock import interleaved
from ipa_bridge.config import StructureModuleConfig
from ipa_bridge.weights import Weights


def main() -> int:
    """Prints a line for each size and direction."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_loop", description=__doc__)
    parser.add_argument("--residues", type=int, nargs="+", default=[128, 384])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print("residues  direction            compile scanned  unrolled   run scanned/unrolled (range)")
    for residues in args.residues:
        for direction in ("forward", "forward + backward"):
            print(f"{residues} residues, {direction}", file=sys.stderr, flush=True)
            compiled, seconds = {}, {}
            for name, scan in (("scanned", hk.scan), ("unrolled", unrolled)):
                compiled[name], seconds[name] = compile_with(scan, residues, direction)
            ratios = interleaved(compiled["scanned"], compiled["unrolled"], args.repeats)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            print(
                f"{residues:8d}  {direction:19s}  {seconds['scanned']:13.1f} s  {seconds['unrolled']:6.1f} s   {spread}"
            )
    return 0


def compile_with(scan: Callable, residues: int, direction: str) -> tuple[Call, float]:
    """A call of AlphaFold 2's structure module with `scan` as its loop, and the seconds that compiling it took."""
    config = StructureModuleConfig.alphafold2()
    rng = np.random.default_rng(0)
    single = jnp.asarray(rng.standard_normal((residues, config.num_channel)), jnp.float32)
    pair = jnp.asarray(rng.standard_normal((residues, residues, config.pair_channel)), jnp.float32)
    params = jax.tree.map(jnp.asarray, Weights.random(config).to_haiku())
    aatype = jnp.arange(residues) % 20
    honest, hk.scan = hk.scan, scan
    try:
        apply = ipa_jax.transform_structure_module(config).apply

        def forward(params: Any, single: Any, pair: Any) -> Any:
            return apply(params, None, single, pair, aatype).atom14

        def scalar(*arrays: Any) -> Any:
            return jnp.sum(forward(*arrays))

        function = jax.jit(forward if direction == "forward" else jax.grad(scalar, (0, 1, 2)))
        started = time.perf_counter()
        compiled = function.lower(params, single, pair).compile()
        seconds = time.perf_counter() - started
    finally:
        hk.scan = honest
    return lambda: jax.block_until_ready(compiled(params, single, pair)), seconds


def unrolled(function: Callable, carry: Any, xs: Any, length: int) -> tuple[Any, Any]:
    """`hk.scan` written as a Python loop."""
    outputs = []
    for i in range(length):
        carry, output = function(carry, None if xs is None else xs[i])
        outputs.append(output)
    return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)


if __name__ == "__main__":
    sys.exit(main())
