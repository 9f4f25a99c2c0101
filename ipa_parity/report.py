"""Results of a comparison: one row per stage, printed as a text table or as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from ipa_bridge.tolerance import bound, epsilon

Norm = Literal["max", "euclidean"]


@dataclass(frozen=True)
class Comparison:
    """One stage of one run against one reference."""

    case: str
    stage: str
    dtype: str
    subject: str
    reference: str
    error: float  # in epsilons of dtype; infinite where there is nothing to measure
    bound: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """True if the error is within the bound and nothing else is wrong."""
        return not self.problem and self.error <= self.bound

    def __str__(self) -> str:
        verdict = self.problem or f"{self.error:.3g} eps, bound {self.bound:.3g}"
        return f"{self.case} {self.dtype} {self.stage}: {self.subject} against {self.reference}: {verdict}"


def compare(
    actual: np.ndarray,
    expected: np.ndarray,
    *,
    case: str,
    stage: str,
    dtype: str,
    subject: str,
    reference: str,
    meaningful: np.ndarray | None = None,
    scale: float | None = None,
    conditioning: float = 1.0,
    norm: Norm = "max",
) -> Comparison:
    """Judges one array by the tolerance table.

    Args:
        actual: the array to judge.
        expected: the reference.
        case: name of the case.
        stage: the stage's name in the tolerance table; "gradient/…" for any gradient.
        dtype: name of the narrowest dtype used.
        subject: name of the run that gave `actual`.
        reference: name of the run that gave `expected`.
        meaningful: True for the entries that count; None for all of them.
        scale: size that the error is divided by; None for the norm of `expected`. Needed where the stage is a sum
            whose terms cancel.
        conditioning: factor on the bound, computed from the inputs alone.
        norm: norm of the error and of the scale.
    """
    limit = bound(stage, dtype) * conditioning

    def result(error: float, problem: str = "") -> Comparison:
        return Comparison(case, stage, dtype, subject, reference, error, limit, problem)

    if actual.shape != expected.shape:
        return result(np.inf, f"shape {actual.shape} where {expected.shape} was expected")
    if meaningful is not None:
        actual, expected = actual[meaningful], expected[meaningful]
    if not actual.size:
        return result(np.inf, "nothing to compare")
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return result(np.inf, "not finite")
    scale = _size(expected, norm) if scale is None else scale
    if scale == 0:
        return result(np.inf, "the reference is all zero")
    return result(_size(np.subtract(actual, expected, dtype=np.float64), norm) / scale / epsilon(dtype))


def _size(x: np.ndarray, norm: Norm) -> float:
    return float(np.abs(x).max() if norm == "max" else np.linalg.norm(x))


def summarise(comparisons: Iterable[Comparison]) -> dict[tuple[str, str, str], Comparison]:
    """The comparison closest to, or furthest beyond, its bound for each (stage, dtype, subject and reference).

    Stages that differ only below `gradient/…/…` count as one.
    """
    worst: dict[tuple[str, str, str], Comparison] = {}
    for row in comparisons:
        key = ("/".join(row.stage.split("/")[:3]), row.dtype, _who(row))
        if key not in worst or _badness(row) > _badness(worst[key]):
            worst[key] = row
    return worst


def table(comparisons: Iterable[Comparison]) -> str:
    """Table of stages by dtype and pair of runs: the worst error over all cases, in epsilons of that dtype."""
    worst = summarise(comparisons)
    stages = list(dict.fromkeys(stage for stage, _, _ in worst))
    columns = list(dict.fromkeys((dtype, who) for _, dtype, who in worst))
    dtypes = [dtype if i == 0 or columns[i - 1][0] != dtype else "" for i, (dtype, _) in enumerate(columns)]
    rows = [["", *dtypes, "", ""], ["stage", *(who for _, who in columns), "bound", ""]]
    for stage in stages:
        found = [worst.get((stage, *column)) for column in columns]
        limits = sorted({f"{row.bound:.0f}" for row in found if row}, key=float)
        rows.append(
            [
                stage,
                *("" if row is None else "!" if row.problem else f"{row.error:.1f}" for row in found),
                "–".join(dict.fromkeys((limits[0], limits[-1]))),
                "pass" if all(row.passed for row in found if row) else "FAIL",
            ]
        )
    return _aligned(rows, headings=2)


def worst_by_case(comparisons: Iterable[Comparison]) -> str:
    """Table of cases by dtype and reference: the worst error of outputs and of gradients, in epsilons of that dtype."""
    worst: dict[tuple[str, str, str], dict[str, Comparison]] = {}
    for row in comparisons:
        cells = worst.setdefault((row.case, row.dtype, row.reference), {})
        kind = row.stage.partition("/")[0]
        if kind not in cells or _badness(row) > _badness(cells[kind]):
            cells[kind] = row
    kinds = list(dict.fromkeys(kind for cells in worst.values() for kind in cells))
    rows = [["case", "dtype", "against", *kinds, ""]]
    for key, cells in worst.items():
        found = [cells.get(kind) for kind in kinds]
        passed = "pass" if all(row.passed for row in cells.values()) else "FAIL"
        rows.append([*key, *("" if row is None else f"{row.error:.1f}" for row in found), passed])
    return _aligned(rows, headings=1)


def as_json(comparisons: Iterable[Comparison]) -> list[dict]:
    """Every comparison as plain data."""
    rows = [asdict(row) | {"passed": row.passed} for row in comparisons]
    return [row | {"error": row["error"] if np.isfinite(row["error"]) else None} for row in rows]


def _aligned(rows: list[list[str]], headings: int) -> str:
    """Cells in columns with a line below the headings; the first column is aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0]) + "".join(cell.rjust(w + 2) for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    rule = "-" * len(lines[headings - 1])
    return "\n".join(line.rstrip() for line in (*lines[:headings], rule, *lines[headings:]))


def _who(row: Comparison) -> str:
    return row.subject if row.reference == "float64" else f"{row.subject}–{row.reference}"


def _badness(row: Comparison) -> float:
    return np.inf if row.problem else row.error / row.bound
