"""The table that `make trained` prints, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from licences import LICENCES

SUBJECTS = ("before", "swapped", "PyTorch", "Haiku")
HEADINGS = (
    *("model", "licence", "weights", "layers", "float32: outputs", "gradients", "float64: outputs", "gradients"),
    *("float32: before–after", "noise", "before–exact", "after–exact", "float64: before–after", "noise", "unit"),
)


def table(models: Mapping[str, Any], attentions: Sequence[Any], wholes: Sequence[Any]) -> str:
    """One row for each model that was run.

    Errors of its attentions, in eps, are the largest of all layers: before the swap (float32 alone), after it, in
    PyTorch and in Haiku. Then come distances between predictions of the whole model.
    """
    rows = [HEADINGS, ["---"] * 4 + ["---:"] * (len(HEADINGS) - 5) + ["---"]]
    for name, trained in models.items():
        errors = [x for x in attentions if x.case.partition(": ")[0] == name]
        distances = {x.dtype: x for x in wholes if x.name == name}
        if not errors and not distances:
            continue
        cells = [name, LICENCES[trained.package].partition(" (")[0], f"`{trained.path.name}`"]
        cells.append(str(len({x.case for x in errors})))
        cells += [_worst(errors, dtype, stage) for dtype in ("float32", "float64") for stage in ("out", "gradient")]
        single, double = (distances.get(dtype) for dtype in ("float32", "float64"))
        cells += [f"{getattr(single, x):.1e}" if single else "" for x in ("apart", "noise", "before", "after")]
        cells += [f"{getattr(double, x):.1e}" if double else "" for x in ("apart", "noise")]
        rows.append([*cells, trained.unit])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _worst(errors: Sequence[Any], dtype: str, stage: str) -> str:
    found = [x for x in errors if x.dtype == dtype and x.stage.partition("/")[0] == stage]
    by_subject = [[x.error for x in found if x.subject == subject] for subject in SUBJECTS]
    return " / ".join(f"{max(x):.1f}" for x in by_subject if x) or "–"
