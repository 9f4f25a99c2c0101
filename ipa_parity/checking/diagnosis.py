"""Says what a wrong candidate computes: the known mistake, or two, that give its very outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ipa_bridge.tolerance import bound, epsilon
from ipa_parity.attention.stages import Arrays
from ipa_parity.checking.formula import Formula
from ipa_parity.checking.judging import STAGES, Judged, compare_with
from ipa_parity.checking.mistakes import STOPS, Mistake, formula_with, pairs, singles
from ipa_parity.checking.probes import Probe
from ipa_parity.checking.rounding import FORMATS

Kind = Literal["mistake", "gradient", "precision", "stage", "unknown"]

ROUNDED = {
    "everything": "every product",
    "projections": "the projections (lines 1–3)",
    "bias": "the pair bias (line 4)",
    "points": "the points and rotations (lines 7 and 10)",
    "products": "the products of queries and keys (line 7)",
    "distances": "the distances (line 7)",
    "logits": "the logits (line 7)",
    "attention": "the attention weights (lines 8–10)",
    "values": "the values (lines 8–10)",
    "inverse": "the output points before the inverse frames (line 10)",
    "output": "the output projection (line 11)",
}
"""Stages whose operands may be rounded, in words."""

CONSTANTS = {
    "points": "the point term of the logits (line 7)",
    "scalars": "q·k (line 7)",
    "bias": "the pair bias (line 7)",
    "γ": "γ (line 7)",
    "norms": "the lengths of output points (line 11)",
    "translations": "translations (lines 7 and 10)",
}
"""Places where a constant may be wrong, in words."""

EXPLAINED = {"float64": 1e-3, "float32": 5e-3}
"""Share of a candidate's error that known mistakes may leave. In float32, −1e5 on a whole row leaves two decimals."""

ALIKE = 1e-9
"""Relative difference below which two formulas compute one function."""


@dataclass(frozen=True)
class Diagnosis:
    """The function that a candidate computes instead of Algorithm 22.

    Attributes:
        kind: "mistake" for outputs that known mistakes give, "gradient" for right outputs with gradients that end
            somewhere, "precision" for the right function in fewer digits, "stage" for the first stage that departs, and
            "unknown".
        mistakes: the known mistakes that are all made, in each of which equivalent names of one function are listed.
        error: distance of the candidate from what they give, in epsilons of its dtype.
        text: one sentence.
        algorithm: number of the algorithm in the supplement.
    """

    kind: Kind
    text: str
    mistakes: tuple[tuple[Mistake, ...], ...] = ()
    error: float = math.nan
    algorithm: str = "22"

    def advice(self) -> list[str]:
        """For each mistake, the lines of the algorithm and what to do."""
        firsts = [names[0] for names in self.mistakes]
        return [f"  line {x.line} of Algorithm {self.algorithm}" + (f": {x.mend}" if x.mend else "") for x in firsts]


def diagnose(
    judged: Sequence[Judged], progress: Callable[[str], None] = lambda step: None, *, thoroughly: bool = True
) -> Diagnosis:
    """Diagnoses a candidate from its results on probes of one dtype; pairs of mistakes are tried if `thoroughly`."""
    with_output = [x for x in judged if x.has_output]
    if not with_output:
        return Diagnosis("unknown", "there is no output to diagnose")
    if all(x.passed for each in with_output for x in each.comparisons if not x.stage.startswith("gradient/")):
        return _of_gradients(with_output, progress)
    config = with_output[0].probe.case.config
    progress(f"tries {len(singles(config))} known mistakes")
    found = _matching([(x,) for x in singles(config)], with_output)
    if not found and (constant := _of_constants(with_output) or _of_precision(with_output, progress)):
        return constant
    if not found and thoroughly:
        found = _matching(_pairs(with_output, progress), with_output)
    if found:
        return _of_mistakes(found, with_output)
    return _of_stages(with_output)


def distance(formula: Formula, judged: Judged) -> float:
    """Distance of a candidate's output from a formula's on one probe, over the bound of a right output."""
    probe, valid = judged.probe, judged.probe.case.mask
    try:
        with np.errstate(all="ignore"):
            computed = probe.compute(formula)["out"][valid]
    except ValueError:  # these widths do not allow the mistake
        return math.inf
    return relative(judged.arrays["out"][valid], computed) / tolerated(probe)


def _allowed(judged: Judged) -> float:
    """Distance that a wrong formula may have from outputs that it explains, over the bound of a right one."""
    return max(1.0, EXPLAINED.get(judged.probe.dtype, 5e-3) * distance(Formula(), judged))


def tolerated(probe: Probe) -> float:
    """Relative error that a right output may have."""
    return bound("out", probe.dtype) * epsilon(probe.dtype) * probe.conditioning


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest expected magnitude; infinite if something is not finite."""
    scale = np.abs(expected).max(initial=0)
    error = np.abs(actual - expected).max(initial=0) / scale if scale else math.inf
    return float(error) if np.isfinite(error) else math.inf


Tried = tuple[Mistake, ...]


def _matching(tries: Iterable[Tried], judged: Sequence[Judged]) -> list[tuple[float, Tried]]:
    """The mistakes that explain a candidate's outputs on all probes, the nearest first, with their distances.

    Rounding in a wrong formula may be larger than in the right one, so a small share of the error may be left.
    """
    allowed = [_allowed(each) for each in judged]
    found = []
    for tried in tries:
        formula, far = formula_with(*tried), 0.0
        for each, limit in zip(judged, allowed, strict=True):
            there = distance(formula, each)
            if there > limit:
                break
            far = max(far, there)
        else:
            found.append((far, tried))
    return sorted(found, key=lambda x: x[0])


def _pairs(judged: Sequence[Judged], progress: Callable[[str], None]) -> Iterable[Tried]:
    """Pairs of mistakes that come near a candidate on the smallest probe."""
    config = judged[0].probe.case.config
    smallest = min(judged, key=lambda x: x.probe.case.mask.size)
    limit = _allowed(smallest)
    every = list(pairs(config))
    near: list[tuple[float, Tried]] = []
    for n, pair in enumerate(every):
        if n % 500 == 0:
            progress(f"tries pairs of known mistakes: {n} of {len(every)}")
        far = distance(formula_with(*pair), smallest)
        if far <= limit:
            near.append((far, pair))
    return [pair for _, pair in sorted(near, key=lambda x: x[0])]


def _of_mistakes(found: list[tuple[float, Tried]], judged: Sequence[Judged]) -> Diagnosis:
    """The nearest mistakes, each with all names of the same function."""
    nearest = found[0][1]
    groups = tuple(_synonyms(nearest, n, judged) for n in range(len(nearest)))
    first = judged[0].probe
    eps = distance(formula_with(*nearest), judged[0]) * tolerated(first) / epsilon(first.dtype)
    said = " and ".join(_with_synonyms(group) for group in groups)
    text = f"its outputs equal Algorithm 22 with {said}, within {max(eps, 0.1):.2g} eps of {first.dtype}"
    named = {x.name for group in groups for x in group}
    others = [tried for _, tried in found if not named.issuperset(x.name for x in tried)][:3]
    if others and len(nearest) == 1:
        text += "; nearly as well: " + ", ".join(" and ".join(x.name for x in tried) for tried in others)
    return Diagnosis("mistake", text, groups, eps)


def _synonyms(made: Tried, which: int, judged: Sequence[Judged]) -> Tried:
    """One of the mistakes made, then all others that would give the same outputs in its place."""
    rest = made[:which] + made[which + 1 :]
    taken = {field for mistake in rest for field in mistake.changes}
    valid = [each.probe.case.mask for each in judged]
    outputs = [each.probe.compute(formula_with(*made))["out"] for each in judged]

    def is_the_same(mistake: Mistake) -> bool:
        if taken & mistake.changes.keys() or mistake.name == made[which].name:
            return False
        formula = formula_with(mistake, *rest)
        try:
            with np.errstate(all="ignore"):
                return all(
                    relative(each.probe.compute(formula)["out"][m], out[m]) < ALIKE
                    for each, out, m in zip(judged, outputs, valid, strict=True)
                )
        except ValueError:  # these widths do not allow the mistake
            return False

    return made[which], *(x for x in singles(judged[0].probe.case.config) if is_the_same(x))


def _with_synonyms(group: Sequence[Mistake]) -> str:
    first, *others = (x.name for x in group)
    return first + (f" (the same function as {'; '.join(others)})" if others else "")


def _of_gradients(judged: Sequence[Judged], progress: Callable[[str], None]) -> Diagnosis:
    """The diagnosis of right outputs with wrong gradients: the place where they end."""
    wrong = [each for each in judged if any(not x.passed for x in each.comparisons if x.stage.startswith("gradient/"))]
    if not wrong:
        return Diagnosis("unknown", "outputs and gradients are right")
    probe, arrays = wrong[0].probe, wrong[0].arrays
    progress(f"tries {len(STOPS)} places where gradients may end")
    found: list[tuple[float, Mistake]] = []
    for stop in (x for x in STOPS if x.applies(probe.case.config)):
        truth = probe.truth | probe.gradients(formula_with(stop))
        rows = [
            x for x in compare_with("", probe, arrays, truth, prefix="gradient/") if _counts(x.stage, arrays, truth)
        ]
        far = max((x.error / x.bound for x in rows), default=math.inf)
        if far <= 1:
            found.append((far, stop))
    names = [x.stage.removeprefix("gradient/") for x in wrong[0].comparisons if not x.passed and "gradient" in x.stage]
    if found:
        far, stop = min(found, key=lambda x: x[0])
        return Diagnosis("gradient", f"its outputs are right, with {stop.name}", ((stop,),), far)
    return Diagnosis("gradient", f"its outputs are right; these gradients are not: {', '.join(names)}")


def _counts(stage: str, arrays: Arrays, truth: Arrays) -> bool:
    """False for a gradient that is zero in both, which cannot be compared by its size."""
    return bool(np.abs(truth[stage]).max() or np.abs(arrays.get(stage, np.zeros(1))).max())


def _of_constants(judged: Sequence[Judged]) -> Diagnosis | None:
    """A wrong constant in one place, found by Newton's method; None if no constant explains the outputs."""
    first = judged[0]
    valid, error = first.probe.case.mask, distance(Formula(), first)
    if error <= 1:
        return None

    def out(factor: float, name: str) -> np.ndarray:
        with np.errstate(all="ignore"):
            return first.probe.compute(_scaled(name, factor))["out"][valid]

    for name, words in CONSTANTS.items():
        factor = 1.0
        for _ in range(12):
            left = first.arrays["out"][valid] - out(factor, name)
            slope = (out(factor + 1e-5, name) - out(factor - 1e-5, name)) / 2e-5
            size = float((slope * slope).sum())
            if not size or not np.isfinite(left).all():
                break
            step = float((left * slope).sum()) / size
            factor += max(-0.5, min(0.5, step))
        fits = [distance(_scaled(name, factor), x) <= max(1, 0.02 * distance(Formula(), x)) for x in judged]
        if all(fits):
            text = f"its outputs equal Algorithm 22 with {words} multiplied by {factor:.6g}"
            return Diagnosis("mistake", text, (), distance(_scaled(name, factor), first))
    return None


def _scaled(name: str, factor: float) -> Formula:
    return Formula(unit=factor) if name == "translations" else Formula(factors={name: factor})


def _of_precision(judged: Sequence[Judged], progress: Callable[[str], None]) -> Diagnosis | None:
    """The right function in fewer digits; None if the errors are too large for that, or not of that kind."""
    first, dtype = judged[0], judged[0].probe.dtype
    valid = first.probe.case.mask
    out, truth = first.arrays["out"][valid], first.probe.truth["out"][valid]
    error = relative(out, truth)
    if error <= tolerated(first.probe):
        return _far_from_origin(judged)
    progress("tries roundings")
    tried = []
    for to in ("tf32", "float16", "bfloat16", *(["float32"] if dtype == "float64" else [])):
        for stage, words in ROUNDED.items():
            with np.errstate(all="ignore"):
                rounded = first.probe.compute(Formula(rounded={stage: to}))["out"][valid]
            tried.append((relative(out, rounded) / error, to, words))
    left, to, words = min(tried)
    if left < 0.5:
        return Diagnosis("precision", f"the right function, with {words} in {to}", error=error / epsilon(dtype))
    if dtype in FORMATS and error < 8 * FORMATS["float32"]:
        return None
    for to in ("float32", "tf32", "bfloat16"):
        if FORMATS[to] / 16 < error < 2 * FORMATS[to] and FORMATS[to] > epsilon(dtype) and _is_noise(judged, to):
            text = f"the right function as far as {to} can tell: errors are as large as its roundings"
            return Diagnosis("precision", text, error=error / epsilon(dtype))
    return None


def _is_noise(judged: Sequence[Judged], to: str) -> bool:
    """True if errors on all probes are those of a format's roundings: as large everywhere, and without a pattern."""
    errors = [
        relative(x.arrays["out"][x.probe.case.mask], x.probe.truth["out"][x.probe.case.mask]) / x.probe.conditioning
        for x in judged
    ]
    return max(errors) < 4 * FORMATS[to]


def _far_from_origin(judged: Sequence[Judged]) -> Diagnosis | None:
    """Errors that only coordinates far from the origin show."""
    far = next((x for x in judged if x.probe.name == "far from the origin"), None)
    failed = [x.probe.name for x in judged if distance(Formula(), x) > 1]
    if far is None or failed != ["far from the origin"]:
        return None
    valid = far.probe.case.mask
    out, truth = far.arrays["out"][valid], far.probe.truth["out"][valid]
    format_ = far.probe.dtype if far.probe.dtype != "float64" else "float32"
    expanded = far.probe.compute(Formula(rounded={"expanded": format_}))["out"][valid]
    error, expected = relative(out, truth), relative(expanded, truth)
    text = "the right function, but it loses digits far from the origin"
    if expected / 30 < error < expected * 30:
        text += ", as distances do that are expanded to |q|² + |k|² − 2q·k: subtract first, then square"
    return Diagnosis("precision", text, error=error / epsilon(far.probe.dtype))


def _of_stages(judged: Sequence[Judged]) -> Diagnosis:
    """The first stage that departs, if the candidate gave any but its output."""
    rows = [x for each in judged for x in each.comparisons]
    given = [stage for stage in STAGES if any(x.stage == stage for x in rows)]
    for stage in given:
        wrong = [x for x in rows if x.stage == stage and not x.passed]
        if wrong and len(given) > 1:
            return Diagnosis("stage", f"no known mistake gives its outputs; the first stage that departs is {stage}")
    return Diagnosis(
        "unknown",
        "no known mistake, alone or with another one, gives its outputs; return a dictionary of stages "
        f"({', '.join(STAGES)}) to see which is the first that departs",
    )
