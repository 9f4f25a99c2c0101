"""Plot of time and memory over residues: one line per system, both axes logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.calls import DIRECTIONS

STYLES: dict[str, dict[str, Any]] = {
    "ipa_jax": {"color": "#1565c0", "marker": "o", "linewidth": 2.4},
    "ipa_jax, reference": {"color": "#1565c0", "marker": "o", "linestyle": ":"},
    "AlphaFold (jit)": {"color": "#64a8e8", "marker": "s", "linestyle": "--"},
    "AlphaFold-Multimer (jit)": {"color": "#8d99ae", "marker": "^", "linestyle": "--"},
    "ipa_torch": {"color": "#c62828", "marker": "o", "linewidth": 2.4},
    "ipa_torch, reference": {"color": "#c62828", "marker": "o", "linestyle": ":"},
    "ESMFold": {"color": "#f08a5d", "marker": "s", "linestyle": "--"},
    "invariant-point-attention": {"color": "#6a4c93", "marker": "v", "linestyle": "--"},
}


def save(rows: list[dict], path: str | Path) -> None:
    """Plots the rows of `measure` into an image file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    quantities = (("seconds", 1.0, "seconds"), ("bytes", 2.0**30, "peak memory above inputs, GiB"))
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharex=True, layout="constrained")
    for column, direction in enumerate(DIRECTIONS):
        for row, (field, unit, label) in enumerate(quantities):
            axis = axes[row][column]
            for system in dict.fromkeys(r["system"] for r in rows):
                found = [
                    (r["residues"], r[field] / unit)
                    for r in rows
                    if r["system"] == system and r["direction"] == direction and r.get(field)
                ]
                if found:
                    axis.plot(
                        *zip(*found, strict=True), label=system, markersize=5, **STYLES.get(system, {"marker": "."})
                    )
            axis.set(xscale="log", yscale="log", ylabel=label)
            axis.grid(alpha=0.3, which="both", linewidth=0.5)
            sizes = sorted({r["residues"] for r in rows})
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
        axes[0][column].set_title(direction)
        axes[1][column].set_xlabel("residues")
        if column == 0:
            sizes_of_pair = [(r["residues"], r["pair_bytes"] / 2.0**30) for r in rows if r.get("pair_bytes")]
            axes[1][column].plot(
                *zip(*sorted(set(sizes_of_pair)), strict=True), color="#aaaaaa", label="the pair itself"
            )
    handles, labels = axes[1][0].get_legend_handles_labels()
    axes[0][0].legend(handles, labels, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
