"""Where our attention's time goes, operation by operation: `python -m benchmarks.profile --residues 1024`.

For PyTorch the operations are those of its profiler; for JAX, the parts of the compiled program, named by what they
compute.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calls import BACKWARD, DIRECTIONS
from benchmarks.report import NUMBER, TEXT, markdown_head, markdown_row
from benchmarks.systems import Inputs, our_torch
from ipa_bridge.config import IPAConfig
from ipa_bridge.weights import Weights


def main() -> int:
    """Prints a table for each framework and direction."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--residues", type=int, default=1024)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--rows", type=int, default=14)
    args = parser.parse_args()
    inputs = Inputs.draw(args.residues)
    for framework, profile in (("torch", profile_torch), ("jax", profile_jax)):
        for direction in DIRECTIONS:
            spent = profile(inputs, direction, args.calls)
            total = sum(spent.values())
            print(f"\n{framework}, {direction}, {args.residues} residues: {1e3 * total:.0f} ms in operations\n")
            print(*markdown_head(("share", NUMBER), ("ms", NUMBER), ("operation", TEXT)), sep="\n")
            for name, seconds in spent.most_common(args.rows):
                print(markdown_row((f"{seconds / total:.0%}", f"{1e3 * seconds:.0f}", name)))
    return 0


def profile_torch(inputs: Inputs, direction: str, calls: int) -> collections.Counter[str]:
    """Seconds of one call by operator."""
    import torch

    call = our_torch("streamed")(inputs)[direction]()
    call()
    with torch.profiler.profile(record_shapes=True) as profiler:
        for _ in range(calls):
            call()
    spent: collections.Counter[str] = collections.Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        shapes = " · ".join("×".join(map(str, shape)) for shape in event.input_shapes if len(shape) == 3)
        spent[f"{event.key} {shapes}" if "mm" in event.key else event.key] += event.self_cpu_time_total / 1e6 / calls
    return spent


def profile_jax(inputs: Inputs, direction: str, calls: int) -> collections.Counter[str]:
    """Seconds of one call by part of the program."""
    import jax

    import ipa_jax

    config = IPAConfig.alphafold2()
    apply = ipa_jax.transform_ipa(config, implementation="streamed").apply
    arrays = (inputs.single, inputs.pair, inputs.rotation, inputs.translation, inputs.mask)

    def forward(params: Any, single: Any, pair: Any, rotation: Any, translation: Any, mask: Any) -> Any:
        return apply(params, single, pair, ipa_jax.Rigid(rotation, translation), mask)

    backward = jax.grad(lambda *xs: (forward(*xs) ** 2).sum(), (0, 1, 2))
    operands = jax.device_put((Weights.random(config, dtype=np.float32).to_haiku(), *arrays))
    compiled = jax.jit(backward if direction == BACKWARD else forward).lower(*operands).compile()
    jax.block_until_ready(compiled(*operands))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(compiled(*operands))
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = parts(compiled.as_text() or "")
    spent: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and event["name"] in named:
            spent[named[event["name"]]] += event["dur"] / 1e6 / calls
    return spent


def parts(program: str) -> dict[str, str]:
    """For each instruction of a compiled program, its pass (forward or backward) and its name in the source."""
    found = {}
    for name, rest in re.findall(r"^\s*(?:ROOT )?%([\w.-]+) = (.*)$", program, re.MULTILINE):
        kind = re.search(r"\b(fusion|dot|dynamic-slice|dynamic-update-slice|broadcast|copy|convert|reduce)\(", rest)
        if not kind:
            continue
        label = re.search(r'op_name="([^"]*)"', rest)
        path = label.group(1) if label else ""
        step = "backward" if "transpose(jvp" in path else "forward"
        where = "blocks" if "while/body" in path else "around"
        last = "/".join(path.split("/")[-2:]) if path.endswith("dot_general") else path.split("/")[-1]
        last = last.replace("/dot_general", "") or re.sub(r"[.\d]+$", "", name)
        found[name] = f"{step}, {where}: {last}"
    return found


if __name__ == "__main__":
    sys.exit(main())
