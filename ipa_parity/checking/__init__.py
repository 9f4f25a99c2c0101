"""Judge of anyone's invariant point attention, which names the mistake that it finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins import Structure
from ipa_bridge.tolerance import DTYPES, epsilon
from ipa_bridge.weights import Weights
from ipa_parity.attention.cases import PRESETS
from ipa_parity.checking.candidates import Candidate, Framework
from ipa_parity.checking.diagnosis import Diagnosis, diagnose
from ipa_parity.checking.judging import RANDOM, Finding, Judged, judge_all
from ipa_parity.checking.mistakes import MISTAKES, Mistake
from ipa_parity.checking.probes import Probe, make_probes
from ipa_parity.checking.reporting import Report, Verdict
from ipa_parity.checking.seeing import see
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.report import Comparison

__all__ = ["MISTAKES", "Diagnosis", "Finding", "Mistake", "Report", "check"]


def check(
    candidate: Any,
    config: IPAConfig | str | None = None,
    *,
    parameters: str | Mapping[str, str] | None = None,
    call: Callable | None = None,
    framework: Framework | None = None,
    weights: Weights | None = None,
    structure: Structure | None = None,
    dtypes: Sequence[str] = ("float32", "float64"),
    gradients: bool = True,
    seed: int = 0,
    name: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """Checks an invariant point attention against Algorithm 22 in float64, and says what it computes if it is wrong.

    The candidate runs on random frames, on points near zero, far from the origin, on a batch, and on a structure if one
    is given. Some residues are masked; their own outputs do not count, since systems differ in them. Exceptions, wrong
    shapes, random results and changed inputs are findings of the report. Nothing that the candidate does raises here.

    Args:
        candidate: a `torch.nn.Module`, a Haiku function from `hk.transform`, a Flax NNX or Equinox module, or a
            function of (parameters, single, pair, rotation, translation, mask). It may return a dictionary of stages,
            "logits", "attention", "o", "points", "norms", "o_pair" and "out", and of "gradient/…" that it computes.
        config: the attention's config, or the name of a preset. None to read it from the parameters' shapes, where the
            candidate has parameters.
        parameters: name of the dialect whose names and layouts its parameters have (`ipa_bridge.weights.dialects`), or
            a table of its names to ours, with ".T" behind a name whose array is the transpose. None to recognise them;
            for functions: our names.
        call: function of (candidate, single, pair, rotation, translation, mask) that calls it. None where the names of
            its arguments tell how. Rotations act on column vectors; the mask has 1 or True for valid residues, in
            PyTorch whichever the candidate takes.
        framework: "numpy", "torch" or "jax", the arrays that a function takes; None to see which it uses.
        weights: weights to give it; None for seeded ones.
        structure: a protein to run on too.
        dtypes: dtypes to run in, of "float32", "float64", "bfloat16" and "float16".
        gradients: compare gradients to inputs and parameters too, in PyTorch and JAX.
        seed: seed of all random numbers.
        name: name of the candidate in the report; None for its own.
        progress: called with a few words before each step.

    Returns:
        A report, with `passed`, `verdict`, `diagnosis` and `comparisons`.

    Raises:
        ValueError: the candidate is none of these, its config is unknown, or an argument is wrong.
    """
    started = time.perf_counter()
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown or not dtypes:
        raise ValueError(f"dtypes of {', '.join(DTYPES)} were expected; got {', '.join(unknown) or 'none'}")
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"a preset of {', '.join(PRESETS)} was expected, or a config; got {config!r}")
        config = PRESETS[config]()
    if weights is not None:
        config = config or cast(IPAConfig, weights.config)
    seen = see(candidate, config, parameters=parameters, call=call, framework=framework, name=name)
    gradients = gradients and (seen.framework != "numpy" or bool(installed_frameworks()))
    cases = list(make_probes(seen.config, seed=seed, weights=weights, structure=structure, masked=seen.takes_mask))
    judged = {
        dtype: judge_all(seen, [Probe(case, dtype) for case in cases], gradients=gradients, progress=progress)
        for dtype in dtypes
    }
    return conclude(seen, judged, time.perf_counter() - started, progress)


def conclude(
    candidate: Candidate,
    judged: Mapping[str, list[Judged]],
    seconds: float = 0.0,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """The report on a candidate from its results by dtype."""
    started, notes = time.perf_counter(), []
    judged = dict(judged)
    if not candidate.takes_mask:
        notes.append("it takes no mask: nothing is masked")
    ran = [dtype for dtype, each in judged.items() if any(x.arrays for x in each)]
    for dtype in [x for x in judged if x not in ran] if ran else []:
        reason = next((x.text for each in judged.pop(dtype) for x in each.findings), "")
        notes.append(f"it does not run in {dtype}: {reason}")
    passes_float32 = all(row.passed for x in judged.get("float32", ()) for row in x.comparisons)
    if "float64" in judged and "float32" in judged and passes_float32 and _float32_inside(judged["float64"]):
        notes.append("it computes in float32 when its inputs are float64")
        del judged["float64"]
    comparisons = tuple(row for each in judged.values() for x in each for row in x.comparisons)
    findings = tuple(finding for each in judged.values() for x in each for finding in x.findings)
    verdict, diagnosis = _verdict(judged, comparisons, findings, progress)
    if verdict != "right" and candidate.assumed:
        notes.append(candidate.assumed)
    seconds += time.perf_counter() - started
    return Report(candidate.name, verdict, comparisons, findings, diagnosis, tuple(notes), seconds)


def _verdict(
    judged: Mapping[str, list[Judged]],
    comparisons: Iterable[Comparison],
    findings: Sequence[Finding],
    progress: Callable[[str], None],
) -> tuple[Verdict, Diagnosis | None]:
    failed = [dtype for dtype, each in judged.items() if any(not row.passed for x in each for row in x.comparisons)]
    if not failed and not findings and any(True for _ in comparisons):
        return "right", None
    if not failed:
        return "wrong", None
    if any(RANDOM in finding.text for finding in findings):
        return "wrong", None
    narrowest = max(failed, key=epsilon)
    widest = min(failed, key=epsilon)
    diagnosis = diagnose(judged[widest], progress)
    if diagnosis.kind not in ("mistake", "gradient") and narrowest != widest:
        other = diagnose(judged[narrowest], progress, thoroughly=False)
        diagnosis = other if other.kind in ("mistake", "gradient", "precision") else diagnosis
    return ("imprecise" if diagnosis.kind == "precision" and not findings else "wrong"), diagnosis


def _float32_inside(judged: Sequence[Judged]) -> bool:
    """True if float64 results fail their bounds, and would pass those of float32."""
    rows = [row for x in judged for row in x.comparisons]
    ratio = epsilon("float32") / epsilon("float64")
    failed = any(not row.passed for row in rows)
    return failed and all(not row.problem and row.error <= row.bound * ratio for row in rows)
