"""Whether a model computes the same after a layer was swapped, in how much less time and memory: for the examples.

Times are taken in turn in one process, for only neighbours in time are comparable on a machine with other users; peak
memory in a process of its own, which Linux tells.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from statistics import median

import numpy as np
from tqdm import tqdm

from benchmarks.clock import seconds as seconds_of
from benchmarks.resident import forget_peak, status
from ipa_parity.report import compare

Prepare = Callable[[int, bool, bool], Callable[[], object]]
"""Of so many residues, with gradients or not, with the layer swapped or not: a call that is ready."""


def arguments(description: str | None) -> argparse.Namespace:
    """Those of every example that swaps."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--residues", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each; medians are shown (default: 3)")
    parser.add_argument("--backward", action="store_true", help="measure gradients too, as in training")
    return parser.parse_args()


def same(before: np.ndarray, after: np.ndarray, stage: str, what: str) -> str:
    """How far apart two outputs in float32 are, in words.

    Raises:
        SystemExit: further than the tolerance table allows; there is no speed to speak of then.
    """
    found = compare(after, before, case=what, stage=stage, dtype="float32", subject="after", reference="before")
    if not found.passed:
        raise SystemExit(f"{found}: there is no speed to speak of")
    return f"{what}: after is {found.error:.1f} eps of float32 from before, {found.bound:.0f} are allowed"


def table(prepare: Prepare, residues: list[int], repeats: int, *, backward: bool) -> str:
    """Rows by length and direction, seconds and MiB before and after."""
    lines = [
        "residues  direction           time before    after  ratio   memory before    after  ratio",
        "-" * 90,
    ]
    cases = [(number, gradients) for number in residues for gradients in ((False, True) if backward else (False,))]
    for number, gradients in tqdm(cases, desc="measuring", leave=False):
        calls = {name: prepare(number, gradients, name == "after") for name in ("before", "after")}
        turns = [{name: seconds_of(call) for name, call in calls.items()} for _ in range(repeats + 1)][1:]
        seconds = {name: median(turn[name] for turn in turns) for name in calls}
        ratio = median(turn["after"] / turn["before"] for turn in turns)
        del calls
        mib = {name: _in_a_process(prepare, number, gradients, name == "after") for name in ("before", "after")}
        direction = "forward + backward" if gradients else "forward"
        lines.append(
            f"{number:8}  {direction:18} {seconds['before']:10.2f} s {seconds['after']:6.2f} s {ratio:6.2f} "
            f"{mib['before']:11.0f} MiB {mib['after']:4.0f} MiB {mib['after'] / mib['before']:6.3f}"
        )
    return "\n".join(lines)


def _in_a_process(prepare: Prepare, number: int, gradients: bool, swapped: bool) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, (prepare, number, gradients, swapped))


def peak(prepare: Prepare, number: int, gradients: bool, swapped: bool) -> float:
    """MiB above what is resident before the call, inputs included; a small one has loaded what libraries load."""
    prepare(16, gradients, swapped)()
    call = prepare(number, gradients, swapped)
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # what lies free in the heap would be used again, and not be seen
        trim(0)
    forget_peak()
    before = status("VmRSS")
    result = call()
    after = status("VmHWM")
    del result
    return (after - before) / 2**20
