"""Time and peak memory of the attention on a GPU: ours, the textbook (eager or compiled), and published classes.

    python -m benchmarks.gpu [--residues 256 1024 …] [--pair float32 bfloat16] [--json] [--save FILE] [--plot FILE]

All have AlphaFold 2's sizes. Below 4096 residues the systems take turns in one process. A PyTorch call is timed by the
GPU's own events, a JAX call by the wall clock over several calls. "core" is `point_attention`; "module" is the whole
class with its projections. "share" is the time that the necessary passes over the pair would take at the bandwidth of a
plain copy, measured in the same run, over the measured time: one read in the forward pass; a second read and one write
in the backward pass. Calls that need more memory than there is are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share one memory

import numpy as np

from benchmarks import memory
from benchmarks.calls import BACKWARD, DIRECTIONS, FORWARD, Call, Calls, CompiledByJax
from benchmarks.clock import jax_seconds, torch_seconds
from benchmarks.cores import (
    Captured,
    Case,
    compiled_textbook,
    core_inputs,
    in_graphs,
    jax_core,
    module_inputs,
    torch_attend,
    torch_core,
    torch_sdpa,
)
from benchmarks.report import gpu_table, refuse, save
from benchmarks.systems import Inputs, alphafold, esmfold, our_haiku, our_torch
from ipa_bridge.config import Implementation, IPAConfig
from ipa_parity.frameworks import jax_point_attention
from ipa_parity.report import compare

RESIDUES = (256, 512, 1024, 2048, 4096, 8192)
PAIRS = ("float32", "bfloat16", "none")

ALONE_FROM = 4096
"""From this many residues systems are timed one after the other, because several would not fit in memory."""


class System(NamedTuple):
    """One implementation, and the function that prepares its calls on a case."""

    name: str
    framework: str
    """Either "jax" or "torch"."""
    kind: str
    """Either "core" or "module"."""
    prepare: Callable[[Case], Calls]
    pairs: tuple[str, ...] = PAIRS


def main() -> int:
    """Checks parity, then measures. Returns the exit status: 1 if parity fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--residues", type=int, nargs="+", default=RESIDUES)
    parser.add_argument("--pair", choices=PAIRS, nargs="+", default=PAIRS, help="dtypes of the pair (default: all)")
    parser.add_argument("--system", nargs="+", metavar="NAME", help="measure only these systems (default: all)")
    parser.add_argument("--repeats", type=int, default=11, help="number of turns; medians are shown (default: 11)")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu only tries the command out (default: cuda)"
    )
    parser.add_argument("--json", action="store_true", help="print everything that was measured as JSON")
    parser.add_argument("--save", metavar="FILE", help="also write that JSON to this file")
    parser.add_argument(
        "--plot", metavar="FILE", help="plot time and memory over residues for the float32 pair into this image file"
    )
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("a CUDA device was expected, and PyTorch sees none; --device cpu tries the command out")
    systems, absent = available(args.device)
    if args.system and not set(args.system) <= {s.name for s in systems}:
        parser.error(f"--system must be among {[s.name for s in systems]}; got {args.system}")
    systems = [s for s in systems if args.system is None or s.name in args.system]
    failures = list(gate(args.device))
    if failures:
        refuse(failures)
        return 1
    machine = {"device": args.device, "absent": absent, **bandwidth(args.device)}
    rows: list[dict] = []
    for residues in args.residues:
        for pair in args.pair:
            rows += measure(systems, Case(residues, pair, args.device), args.repeats, machine["bytes"])
            save({"machine": machine, "rows": rows}, args.save)  # after each step, because the next may exhaust memory
    if args.plot:
        from benchmarks import plot

        plot.save([row for row in rows if row["pair"] == "float32"], args.plot)
    print(json.dumps({"machine": machine, "rows": rows}, indent=1) if args.json else gpu_table(rows, machine))
    return 0


def whole(prepare: Callable[[Inputs], Calls], case: Case) -> Calls:
    """The calls of a whole attention module on a case."""
    return prepare(module_inputs(case))


def available(device: str) -> tuple[list[System], list[str]]:
    """The systems that can be measured here, and reasons for those that lack a package or a GPU."""
    has = {name: importlib.util.find_spec(name) is not None for name in ("jax", "haiku", "alphafold", "transformers")}
    systems, absent = [], []
    for implementation in ("fused", "streamed"):
        if implementation == "streamed" or can_fuse(device):
            systems.append(System(f"torch, {implementation}", "torch", "core", partial(torch_core, implementation)))
            if device == "cuda":
                captured = partial(in_graphs, partial(torch_core, implementation))
                systems.append(System(f"torch, {implementation}, CUDA graph", "torch", "core", captured))
        else:
            absent.append("fused: no GPU")
    systems.append(System("torch, textbook", "torch", "core", partial(torch_core, "reference")))
    systems.append(System("torch, textbook, compiled", "torch", "core", compiled_textbook))
    systems.append(System("torch, scaled_dot_product_attention", "torch", "core", torch_sdpa, ("none",)))
    if has["jax"]:
        names: dict[Implementation, str] = {"fused": "fused", "streamed": "streamed", "reference": "textbook"}
        for in_jax, name in names.items():
            if in_jax != "fused" or can_fuse(device):
                systems.append(System(f"JAX, {name} (jit)", "jax", "core", partial(jax_core, in_jax)))
    else:
        absent.append("JAX: no package jax")
    fastest: Implementation = "fused" if can_fuse(device) else "streamed"
    systems.append(System("ipa_torch", "torch", "module", partial(whole, our_torch(fastest))))
    if has["transformers"]:
        systems.append(System("ESMFold", "torch", "module", partial(whole, esmfold), ("float32",)))
    else:
        absent.append("ESMFold: no package transformers")
    if has["jax"] and has["haiku"]:
        ours = partial(whole, our_haiku(fastest))
        systems.append(System("ipa_jax (jit)", "jax", "module", ours, ("float32", "bfloat16")))
    else:
        absent.append("ipa_jax's module: no packages jax and haiku")
    if has["jax"] and has["haiku"] and has["alphafold"]:
        theirs = partial(whole, alphafold(IPAConfig.alphafold2()))
        systems.append(System("AlphaFold (jit)", "jax", "module", theirs, ("float32",)))
    else:
        absent.append("AlphaFold: no packages alphafold and haiku")
    return systems, absent


def can_fuse(device: str) -> bool:
    """True where the kernels can run: on a GPU, or with TRITON_INTERPRET=1 in the interpreters on a CPU."""
    return device == "cuda" or let_interpreters_run()


def let_interpreters_run() -> bool:
    """Makes ipa_torch and ipa_jax interpret their kernels if TRITON_INTERPRET=1 is set; returns True if it is."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from ipa_torch.attention import fused

    fused.INTERPRETED = True
    if importlib.util.find_spec("jax"):
        jax_point_attention()
        fused_in_jax: Any = importlib.import_module("ipa_jax.attention.fused")
        fused_in_jax.INTERPRETED = True
    return True


def gate(device: str) -> Iterator[str]:
    """Comparisons of the cores' outputs with the textbook in float64 that exceed their bounds."""
    import torch

    for pair in ("float32", "bfloat16"):
        residues = 304 if device == "cuda" else 8
        arrays = core_inputs(Case(residues, pair, device))
        wide = {name: None if x is None else x.detach().double() for name, x in arrays.items()}
        expected = [x.cpu().numpy() for x in torch_attend(wide, "reference")]
        for implementation in ("fused", "streamed") if can_fuse(device) else ("streamed",):
            found = {"torch": [x.detach().double().cpu().numpy() for x in torch_attend(arrays, implementation)]}
            if importlib.util.find_spec("jax"):
                of_jax = jax_core(implementation, Case(residues, pair, device))[FORWARD]()()
                found["JAX"] = [np.asarray(x, np.float64) for x in of_jax if x is not None]
            for framework, outputs in found.items():
                for x, e in zip(outputs, expected, strict=True):
                    row = compare(
                        x,
                        e,
                        case=f"{pair} pair",
                        stage="out",
                        dtype="float32",
                        subject=f"{framework}, {implementation}",
                        reference="textbook in float64",
                    )
                    if not row.passed:
                        yield str(row)
    torch.cuda.empty_cache()


def bandwidth(device: str) -> dict[str, Any]:
    """Bytes per second that a plain copy reads and writes, and the names of the device and of PyTorch's version."""
    import torch

    source = torch.empty(1 << (30 if device == "cuda" else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = [torch_seconds(lambda: target.copy_(source), device) for _ in range(9)]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"bytes": 2 * source.numel() / statistics.median(copies[2:]), "name": name, "torch": torch.__version__}


def measure(systems: list[System], case: Case, repeats: int, copied: float) -> list[dict]:
    """One row per system and direction; seconds are medians over turns that call every system once."""
    rows = []
    width = IPAConfig.alphafold2().pair_channel or 0
    size = case.residues**2 * width * {"float32": 4, "bfloat16": 2, "none": 0}[case.pair]
    for direction in DIRECTIONS:
        seconds: dict[str, list[float]] = {}
        found = [s for s in systems if case.pair in s.pairs]
        peaks = {system.name: peak(system, case, direction) for system in found}  # first, each alone
        together = [found] if case.residues < ALONE_FROM else [[system] for system in found]
        for some in together:
            seconds |= in_turn([s for s in some if peaks[s.name] is not None], case, direction, repeats)
        passes = 3 if direction == BACKWARD else 1
        for system in found:
            times = seconds.get(system.name)
            row = {
                "system": system.name,
                "kind": system.kind,
                "residues": case.residues,
                "pair": case.pair,
                "direction": direction,
                "seconds": statistics.median(times) if times else None,
                "times": times,
                "bytes": peaks[system.name],
                "pair_bytes": size,
                "share": passes * size / copied / statistics.median(times) if times and size else None,
            }
            rows.append(row)
    return rows


def in_turn(systems: list[System], case: Case, direction: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of every turn, by system; systems that do not fit in memory beside the others are left out."""
    ready = {system.name: memory.attempt(partial(prepared, system, case, direction)) for system in systems}
    seconds: dict[str, list[float]] = {name: [] for name, call in ready.items() if call is not None}
    clocks: dict[str, Callable[[Any], float]] = {
        system.name: jax_seconds if system.framework == "jax" else partial(torch_seconds, device=case.device)
        for system in systems
    }
    for _ in range(repeats):
        for name in list(seconds):
            took = memory.attempt(partial(clocks[name], ready[name]))
            if took is None:
                del seconds[name]
            else:
                seconds[name].append(took)
    ready.clear()
    memory.release()
    return seconds


def prepared(system: System, case: Case, direction: str) -> Call:
    """A call that has run once, so that compiling and capturing are done."""
    call = system.prepare(case)[direction]()
    call()
    return call


def peak(system: System, case: Case, direction: str) -> int | None:
    """Bytes above the inputs, by PyTorch's allocator or XLA's plan; None where there is not enough memory."""
    call = memory.attempt(partial(prepared, system, case, direction))
    if call is None:
        return None
    if isinstance(call, CompiledByJax):
        return call.planned_bytes
    if (
        isinstance(call, Captured) or case.device == "cpu"
    ):  # a graph keeps its memory; the row of the plain call shows how much
        return 0
    found = memory.peak_on_gpu(call)
    del call
    memory.release()
    return found


if __name__ == "__main__":
    sys.exit(main())
