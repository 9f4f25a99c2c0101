"""Measures a model before and after its attention is swapped, for the examples: outputs, seconds and MiB.

Times are measured in turn in one process, because on a shared machine only times measured right after each other are
comparable. Peak memory is measured in a process of its own, and on Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from ipa_parity.report import compare

Prepare = Callable[[int, bool, bool], Callable[[], object]]
"""Prepares a call: (number of residues, with gradients, with the layer swapped) → call."""

SHORTEST_TURN = 0.2
"""Minimum seconds of a turn; short calls are repeated until they reach it."""

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Linux's files that show a process's memory and that reset its peak."""


def arguments(description: str | None) -> argparse.Namespace:
    """Parses the command line that all examples of swapping share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--residues", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=3, help="number of turns; medians are shown (default: 3)")
    parser.add_argument("--backward", action="store_true", help="measure gradients too, as in training")
    return parser.parse_args()


def same(before: np.ndarray, after: np.ndarray, stage: str, what: str) -> str:
    """A sentence that says how far apart two float32 outputs are.

    Args:
        before: the output before the swap.
        after: the output after the swap.
        stage: the output's name in the tolerance table.
        what: the output's name in the sentence.

    Raises:
        SystemExit: the outputs differ more than the tolerance table allows.
    """
    found = compare(after, before, case=what, stage=stage, dtype="float32", subject="after", reference="before")
    if not found.passed:
        raise SystemExit(f"{found}: the outputs differ, so nothing was measured")
    return (
        f"{what}: before and after differ by {found.error:.1f} eps of float32 (at most {found.bound:.0f} are allowed)"
    )


def table(prepare: Prepare, residues: list[int], repeats: int, *, backward: bool) -> str:
    """Text table of seconds and MiB before and after, one row per length and direction."""
    lines = [
        "residues  direction           time before    after  ratio   memory before    after  ratio",
        "-" * 90,
    ]
    cases = [(number, gradients) for number in residues for gradients in ((False, True) if backward else (False,))]
    for number, gradients in tqdm(cases, desc="measuring", leave=False):
        calls = {name: prepare(number, gradients, name == "after") for name in ("before", "after")}
        turns = [{name: _seconds(call) for name, call in calls.items()} for _ in range(repeats + 1)][1:]
        seconds = {name: median(turn[name] for turn in turns) for name in calls}
        ratio = median(turn["after"] / turn["before"] for turn in turns)
        del calls
        line = (
            f"{number:8}  {'forward + backward' if gradients else 'forward':18} {seconds['before']:10.2f} s "
            f"{seconds['after']:6.2f} s {ratio:6.2f} "
        )
        if PEAK.exists():
            mib = {name: _in_a_process(prepare, number, gradients, name == "after") for name in ("before", "after")}
            line += f"{mib['before']:11.0f} MiB {mib['after']:4.0f} MiB {mib['after'] / mib['before']:6.3f}"
        lines.append(line)
    return "\n".join(lines)


def _seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of a call; the median if the call is short and so repeated."""
    times: list[float] = []
    while sum(times) < SHORTEST_TURN:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return median(times)


def _in_a_process(prepare: Prepare, number: int, gradients: bool, swapped: bool) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, (prepare, number, gradients, swapped))


def peak(prepare: Prepare, number: int, gradients: bool, swapped: bool) -> float:
    """Peak MiB above the memory resident before the call, which includes the inputs.

    A first call on 16 residues makes the libraries load everything that they load at first use.
    """
    prepare(16, gradients, swapped)()
    call = prepare(number, gradients, swapped)
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # the call would reuse memory that is free in the heap, and that would not be counted
        trim(0)
    PEAK.write_text("5")
    before = _resident("VmRSS")
    result = call()
    after = _resident("VmHWM")
    del result
    return (after - before) / 1024


def _resident(field: str) -> int:
    """KiB from one line of the process's status file."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
