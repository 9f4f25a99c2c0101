"""Runs a candidate on the probes, and compares everything that it returns with the oracle."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ipa_bridge.tolerance import HALF_DTYPES
from ipa_parity.attention.judge import declared_scale, without_row_constant
from ipa_parity.attention.stages import Arrays
from ipa_parity.checking.candidates import Candidate, Run
from ipa_parity.checking.formula import Formula
from ipa_parity.checking.probes import Probe
from ipa_parity.report import Comparison, compare

STAGES = ("logits", "attention", "o", "points", "norms", "o_pair", "out")
"""Stages that a candidate may return beside its output, in the order of Algorithm 22's lines."""


class Finding(NamedTuple):
    """Something wrong with a candidate that is not an error of its numbers."""

    probe: str
    dtype: str
    text: str

    def __str__(self) -> str:
        return f"{self.text} ({self.probe}, {self.dtype})"


class Judged(NamedTuple):
    """One probe, what the candidate made of it, and how that compares."""

    probe: Probe
    arrays: Arrays
    comparisons: tuple[Comparison, ...]
    findings: tuple[Finding, ...]

    @property
    def has_output(self) -> bool:
        """True if there is an output that can be compared: finite, in the right shape."""
        out = self.arrays.get("out")
        valid = self.probe.case.mask
        return out is not None and out.shape == self.probe.truth["out"].shape and bool(np.isfinite(out[valid]).all())


def judge(candidate: Candidate, probe: Probe, *, gradients: bool, twice: bool = False) -> Judged:
    """Runs the candidate on one probe. Whatever it raises is a finding.

    Args:
        candidate: the candidate.
        probe: the input.
        gradients: compare gradients too.
        twice: run it a second time, to see if results are random.
    """

    def found(text: str) -> Finding:
        return Finding(probe.name, probe.dtype, text)

    run, problem = _attempt(candidate, probe, gradients)
    findings = []
    if run is None and gradients:
        run, without = _attempt(candidate, probe, False)
        problem = f"gradients: {problem}" if run is not None else without
    if problem:
        findings.append(found(problem))
    if run is None:
        return Judged(probe, {}, (), tuple(findings))
    findings += [found(f"writes into its input {name}") for name in run.changed]
    expected = probe.dtype
    if run.dtype != expected and candidate.framework != "numpy":
        findings.append(found(f"the output is {run.dtype}; {expected}, the dtype of the inputs, was expected"))
    if twice and (again := _attempt(candidate, probe, False)[0]) is not None and not _same(run, again):
        findings.append(found("two calls with the same inputs give different outputs"))
    comparisons = tuple(compare_with(candidate.name, probe, run.arrays, probe.truth))
    if gradients and any(name.startswith("gradient/") for name in run.arrays):
        truth = probe.truth | probe.gradients(Formula())
        comparisons += tuple(compare_with(candidate.name, probe, run.arrays, truth, prefix="gradient/"))
    return Judged(probe, run.arrays, comparisons, tuple(findings))


def _attempt(candidate: Candidate, probe: Probe, gradients: bool) -> tuple[Run | None, str]:
    """The candidate's results, or the reason why there are none."""
    try:
        run = candidate.run(probe.rounded, gradients=gradients)
        if "out" not in run.arrays:
            return None, f'an output was expected under "out"; got {", ".join(run.arrays) or "nothing"}'
        return run, ""
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = next((x for x in reversed(frames) if "ipa_parity" not in x.filename), frames[-1])
        message = str(error).strip().splitlines()
        return None, f"raises {type(error).__name__}: {message[0] if message else ''} ({where.filename}:{where.lineno})"


def _same(one: Run, other: Run) -> bool:
    return np.array_equal(one.arrays["out"], other.arrays["out"], equal_nan=True)


def compare_with(
    subject: str, probe: Probe, arrays: Arrays, truth: Arrays, *, prefix: str = ""
) -> Iterable[Comparison]:
    """Compares the stages whose names start with the prefix; without one, all but gradients. Only valid rows count."""
    stages = [x for x in truth if (x in STAGES if not prefix else x.startswith(prefix))]
    for stage in stages:
        if stage not in arrays:
            continue
        actual, wanted = arrays[stage], truth[stage]
        meaningful, scale = None, None
        if prefix:
            scale = declared_scale(probe.rounded, stage, truth)
        elif actual.shape == wanted.shape:
            meaningful = _valid(probe, stage, wanted)
            if stage == "logits":
                actual, wanted = (without_row_constant(x, meaningful) for x in (actual, wanted))
        yield compare(
            actual,
            wanted,
            case=probe.name,
            stage=stage,
            dtype=probe.dtype,
            subject=subject,
            reference="float64",
            meaningful=meaningful,
            scale=scale,
            conditioning=1.0 if probe.dtype in HALF_DTYPES else probe.conditioning,
        )


def _valid(probe: Probe, stage: str, like: np.ndarray) -> np.ndarray:
    """True where a stage says something: rows of valid residues, and their logits of valid keys."""
    mask = probe.case.mask
    if stage in ("logits", "attention"):
        valid = mask[..., None, :, None] & (mask[..., None, None, :] | (stage == "attention"))
    else:
        valid = mask.reshape((*mask.shape, *(1,) * (like.ndim - mask.ndim)))
    return np.broadcast_to(valid, like.shape)


def judge_all(
    candidate: Candidate,
    probes: Iterable[Probe],
    *,
    gradients: bool,
    progress: Callable[[str], None] = lambda step: None,
) -> list[Judged]:
    """Judges a candidate on every probe; gradients on the first two, and on a structure."""
    judged: list[Judged] = []
    for probe in probes:
        progress(f"{probe.dtype}: {probe.name}")
        wanted = gradients and probe.name in ("random frames", "points near zero", "the structure")
        judged.append(judge(candidate, probe, gradients=wanted, twice=not judged))
        if not judged[0].arrays:
            break  # it does not run at all
    return judged
