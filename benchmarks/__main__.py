"""Time and peak memory of our attention or structure module beside published ones; parity is checked first.

Times are measured in one process, all systems in turn, and compared turn by turn: on a shared machine only times
measured right after each other are comparable. Memory is each call's peak above its inputs, in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks import memory, roofline
from benchmarks.calls import DIRECTIONS
from benchmarks.clock import seconds
from benchmarks.report import refuse, save, say, table
from benchmarks.systems import MODULES, Inputs, System
from ipa_bridge.config import IPAConfig
from ipa_parity.attention.cases import CATALOGUE
from ipa_parity.attention.judge import judge
from ipa_parity.attention.stages import RUNNERS

HEADROOM = 1.1
"""A call is timed only if this multiple of its measured memory, plus `KEPT`, is available."""

KEPT = 3 << 30
"""Bytes that the allocators of other systems may still hold."""

FEWEST_TURNS, LONG_ENOUGH = 3, 120.0
"""Timing stops after this many turns once this many seconds have passed."""


def main() -> int:
    """Checks parity, then measures. Returns the exit status: 1 if parity fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--module", choices=MODULES, default="ipa")
    parser.add_argument("--residues", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--system", nargs="+", metavar="NAME", help="measure only these systems (default: all)")
    parser.add_argument("--direction", choices=DIRECTIONS, nargs="+", default=DIRECTIONS)
    parser.add_argument("--only", choices=["time", "memory"], help="measure one of the two")
    parser.add_argument("--json", action="store_true", help="print everything that was measured as JSON")
    parser.add_argument("--save", metavar="FILE", help="also write that JSON to this file")
    parser.add_argument("--plot", metavar="FILE", help="plot time and memory over residues into this image file")
    args = parser.parse_args()
    systems = [s for s in MODULES[args.module] if args.system is None or s.name in args.system]
    if args.system and len(systems) < len(set(args.system)):
        parser.error(f"--system must be among {[s.name for s in MODULES[args.module]]}; got {args.system}")
    failures = list(gate())
    if failures:
        refuse(failures)
        return 1
    machine = roofline.machine()
    rows: list[dict] = []
    for residues in args.residues:
        for direction in args.direction:
            rows += measure(args.module, systems, residues, direction, args.repeats, args.only)
            report = {"module": args.module, "machine": machine, "rows": rows}
            save(report, args.save)  # after each step, because the next may exhaust the machine
    if args.plot:
        from benchmarks import plot

        plot.save(rows, args.plot)
    print(json.dumps(report, indent=1) if args.json else table(rows, machine))
    return 0


def gate() -> Iterator[str]:
    """Comparisons, of the streamed and the reference attention, that exceed their bounds."""
    for implementation in ("streamed", "reference"):
        runners = {name: partial(run, implementation=implementation) for name, run in RUNNERS.items()}
        for make in (CATALOGUE["alphafold2"], CATALOGUE["alphafold-multimer"]):
            rows = judge(make(), "float32", runners=runners)
            yield from (f"{implementation}: {row}" for row in rows if not row.passed)


def measure(
    module: str, systems: list[System], residues: int, direction: str, repeats: int, only: str | None
) -> list[dict]:
    """One row per system: bytes, seconds, and the ratios of both to the published system of its framework."""
    rows: list[dict[str, Any]] = [
        {"residues": residues, "direction": direction, "system": s.name, "framework": s.framework, "against": s.against}
        for s in systems
    ]
    if only != "time":
        for row, system in zip(rows, systems, strict=True):
            say(f"{residues} residues, {direction}: memory of {system.name}")
            row.update(memory.peak(module, system.name, residues, direction) or {"out_of_memory": True})
            row["first_seconds"] = row.pop("seconds", None)
    if only != "memory":
        time_all(rows, systems, residues, direction, repeats)
    by_name = {row["system"]: row for row in rows}
    for row in rows:
        base = by_name.get(row["against"], {})
        if base.get("bytes") and row.get("bytes"):
            row["memory_ratio"] = row["bytes"] / base["bytes"]
        if base.get("times") and row.get("times"):
            row["time_ratios"] = [a / b for a, b in zip(row["times"], base["times"], strict=True)]
        if row.get("times"):
            row["seconds"] = statistics.median(row["times"])
            if module == "ipa" and row["system"].startswith("ipa_"):
                row["work"] = roofline.work(IPAConfig.alphafold2(), residues, direction)
    return rows


def time_all(rows: list[dict], systems: list[System], residues: int, direction: str, repeats: int) -> None:
    """Adds the seconds of every turn to the rows of systems that fit in memory."""
    inputs, calls = Inputs.draw(residues), {}
    for row, system in zip(rows, systems, strict=True):
        row["times"] = []
        if row.get("out_of_memory") or HEADROOM * row.get("bytes", 0) + KEPT > memory.available():
            continue
        say(f"{residues} residues, {direction}: preparing {system.name}")
        calls[system.name] = system.prepare(inputs)[direction]()
        calls[system.name]()
    started = time.perf_counter()
    for turn in range(repeats):
        if turn >= FEWEST_TURNS and time.perf_counter() - started > LONG_ENOUGH:
            break
        say(f"{residues} residues, {direction}: turn {turn + 1} of {repeats}")
        for row in rows:
            if row["system"] in calls:
                gc.collect()
                row["times"].append(seconds(calls[row["system"]]))


if __name__ == "__main__":
    sys.exit(main())
