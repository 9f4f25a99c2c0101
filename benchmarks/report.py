"""Tables of the benchmarks' results, and progress messages."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.calls import FORWARD

TARGETS = {
    ("float32", 1024): (170, 350),
    ("float32", 2048): (670, 1400),
    ("bfloat16", 1024): (95, 200),
    ("bfloat16", 2048): (350, 750),
}
"""Target microseconds of the fused core on an H200 by pair dtype and residues: forward, and backward alone."""


def refuse(failures: Sequence[str]) -> None:
    """Prints the comparisons that exceed their bounds, instead of a table."""
    print("parity fails, so nothing was measured:", *failures, sep="\n  ", file=sys.stderr)


def say(text: str) -> None:
    """Prints progress to standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def save(report: Mapping[str, Any], path: str | None) -> None:
    """Writes the report to a JSON file; does nothing where `path` is None."""
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")


NUMBER, TEXT = "---:", "---"
CASE = (("residues", NUMBER), ("direction", TEXT))


def markdown_head(*columns: tuple[str, str]) -> list[str]:
    """The two header lines of a Markdown table; each column is NUMBER (aligned to the right) or TEXT."""
    headings, kinds = zip(*columns, strict=True)
    return [markdown_row(headings), f"|{'|'.join(kinds)}|"]


def markdown_row(cells: Iterable[object]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(rows: list[dict], machine: dict[str, float]) -> str:
    """Markdown tables: ratios to published systems, shares of the machine's rates that ours reach, compile times."""
    systems = list(dict.fromkeys(r["system"] for r in rows))
    lines = [
        "Systems in bold: seconds, and MiB above the inputs. All others: time (range) and memory, each as a ratio to"
        " the bold system of the same framework.",
        "",
        *markdown_head(*CASE, *((heading(system, rows), TEXT) for system in systems)),
    ]
    for residues, direction in dict.fromkeys((r["residues"], r["direction"]) for r in rows):
        here = {r["system"]: r for r in rows if (r["residues"], r["direction"]) == (residues, direction)}
        lines.append(markdown_row((residues, direction, *(cell(here[system]) for system in systems))))
    ours = [r for r in rows if "work" in r]
    if ours:
        lines += ["", *shares_of_the_machine(ours, machine)]
    compiled = [r for r in rows if r["framework"] == "jax" and "compiling" in r]
    if compiled:
        lines += ["", *markdown_head(*CASE, ("system", TEXT), ("compiling", NUMBER))]
        lines += [markdown_row((*name_case(r), f"{r['compiling']:.1f} s")) for r in compiled]
    return "\n".join(lines)


def name_case(r: Mapping[str, Any]) -> tuple[Any, ...]:
    """A row's residues, direction and system."""
    return r["residues"], r["direction"], r["system"]


def shares_of_the_machine(rows: Iterable[Mapping[str, Any]], machine: Mapping[str, float]) -> Iterator[str]:
    """Markdown lines of the rates that our attention reaches, and their share of the machine's."""
    flops, bandwidth = machine["flops"], machine["bytes"]
    yield f"This machine: matrix products at {flops / 1e9:.0f} GFLOP/s, memory at {bandwidth / 1e9:.1f} GB/s."
    yield ""
    rates = ("GFLOP/s", "of the machine's", "pair, GB/s", "of the machine's")
    yield from markdown_head(*CASE, ("system", TEXT), *((rate, NUMBER) for rate in rates))
    for r in rows:
        done, moved = (r["work"][key] / r["seconds"] for key in ("flops", "bytes"))
        shares = (f"{done / 1e9:.0f}", f"{done / flops:.0%}", f"{moved / 1e9:.1f}", f"{moved / bandwidth:.0%}")
        yield markdown_row((*name_case(r), *shares))


def heading(system: str, rows: list[dict]) -> str:
    """A system's name, bold if others are compared with it."""
    return f"**{system}**" if any(r["against"] == system for r in rows) else system


def cell(r: dict[str, Any]) -> str:
    """Time and memory of one system."""
    if r.get("out_of_memory"):
        return "does not fit"
    ratios = r.get("time_ratios", [])
    if r["system"] != r["against"] and (ratios or "memory_ratio" in r):
        took = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else ""
        room = f"{r['memory_ratio']:.3f}" if "memory_ratio" in r else ""
    else:
        took = f"{r['seconds']:.3g} s" if "seconds" in r else ""
        room = f"{r['bytes'] / 2**20:.0f} MiB" if "bytes" in r else ""
    return ", ".join(x for x in (took, room) if x) or "–"


def gpu_table(rows: list[dict], machine: dict[str, Any]) -> str:
    """The GPU's rows as a text table of absolute times."""
    lines = [
        f"{machine['name']}, PyTorch {machine['torch']}; a copy moves {machine['bytes'] / 1e12:.2f} TB/s",
        *(f"not measured: {reason}" for reason in machine["absent"]),
        "",
        f"{'system':36} {'kind':7} {'residues':>8}  {'pair':8} {'direction':18} {'time':>11} {'share':>6}     memory",
        "-" * 112,
    ]
    for x in rows:
        took = f"{x['seconds'] * 1e6:8.0f} µs" if x["seconds"] else "no memory"
        share = f"{x['share']:.2f}" if x["share"] else ""
        memory = f"{x['bytes'] / 2**20:.0f} MiB" if x["bytes"] else ""
        case = f"{x['system']:36} {x['kind']:7} {x['residues']:8}  {x['pair']:8} {x['direction']:18}"
        lines.append(f"{case} {took:>11} {share:>6} {memory:>10}")
    lines += ["", *against_targets(rows)]
    return "\n".join(lines)


def against_targets(rows: list[dict]) -> Iterator[str]:
    """One line per target of the fused core: met or missed."""
    for (pair, residues), (forward, backward) in TARGETS.items():
        for x in rows:
            if (
                x["system"].startswith("torch, fused")
                and (x["pair"], x["residues"]) == (pair, residues)
                and x["seconds"]
            ):
                wanted = forward if x["direction"] == FORWARD else forward + backward
                verdict = "met" if x["seconds"] * 1e6 <= wanted else "missed"
                yield (
                    f"target {verdict}: {x['system']}, {residues} residues, {pair} pair, {x['direction']}: "
                    f"{x['seconds'] * 1e6:.0f} of {wanted} µs"
                )
