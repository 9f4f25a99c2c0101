"""Judge of one function of the structure module, with a formula and the known mistakes in it."""

from __future__ import annotations

import inspect
import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple, cast

import numpy as np

from ipa_bridge.tolerance import DTYPES, epsilon
from ipa_bridge.weights.tensors import numpy_dtype
from ipa_parity.attention.stages import Arrays
from ipa_parity.checking.candidates import Framework, framework_of
from ipa_parity.checking.diagnosis import ALIKE, Diagnosis, relative
from ipa_parity.checking.formula import NUMPY, Array, Backend, jax_backend, torch_backend
from ipa_parity.checking.judging import RANDOM, Finding
from ipa_parity.checking.mistakes import Mistake
from ipa_parity.checking.reporting import Report, Verdict
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.report import Comparison, compare

Options = Mapping[str, Any]
"""Choices of a formula by name; those left out are right."""


class Piece(NamedTuple):
    """A function of the structure module."""

    title: str
    algorithm: str
    """Number of its algorithm in the supplement."""
    arguments: tuple[str, ...]
    """Names and order of its arguments."""
    outputs: tuple[tuple[str, str], ...]
    """Names and order of what it returns, each with its stage in the table of tolerances."""
    draw: Callable[[np.random.Generator], Arrays]
    formula: Callable[[Options, Mapping[str, Array], Backend], dict[str, Array]]
    mistakes: tuple[Mistake, ...]
    differentiable: tuple[str, ...]
    """Arguments with gradients."""


@dataclass
class _Run:
    """One input in one dtype, and what the candidate and the right formula make of it."""

    dtype: str
    inputs: Arrays
    exact: Arrays
    """The inputs in float64, with whole numbers as they are."""
    arrays: Arrays
    truth: Arrays


def check_piece(
    piece: Piece,
    candidate: Callable,
    *,
    framework: Framework | None,
    dtypes: tuple[str, ...],
    gradients: bool,
    seed: int,
    name: str | None,
    progress: Callable[[str], None],
) -> Report:
    """The report on a candidate for a piece; `check_backbone_update` explains the arguments.

    Raises:
        ValueError: the candidate is no function, or a dtype is unknown.
    """
    started = time.perf_counter()
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES[:2]]
    if unknown or not callable(candidate):
        raise ValueError(f"a function and dtypes float32 or float64 were expected; got {unknown or candidate!r}")
    name = name or str(getattr(candidate, "__name__", type(candidate).__name__))
    framework = framework or framework_of(candidate)
    gradients = gradients and framework != "numpy" and bool(installed_frameworks())
    findings: list[Finding] = []
    comparisons: list[Comparison] = []
    runs: list[_Run] = []
    for dtype in dtypes:
        for number in range(2):
            progress(f"{dtype}: input {number + 1}")
            case = f"input {number + 1}"
            run = _run(piece, candidate, framework, np.random.default_rng((seed, number)), dtype, gradients)
            if isinstance(run, str):
                findings.append(Finding(case, dtype, run))
                continue
            runs.append(run)
            comparisons += _compare(piece, run, name, case)
            again = _run(piece, candidate, framework, np.random.default_rng((seed, number)), dtype, False)
            if isinstance(again, _Run) and any(
                not np.array_equal(again.arrays[x], run.arrays[x], equal_nan=True) for x, _ in piece.outputs
            ):
                findings.append(Finding(case, dtype, RANDOM))
    failed = [row for row in comparisons if not row.passed]
    diagnosis = None
    if failed and not any(x.text == RANDOM for x in findings):
        progress(f"tries {len(piece.mistakes)} known mistakes and their pairs")
        widest = min((run.dtype for run in runs), key=epsilon)
        diagnosis = _diagnose(piece, [run for run in runs if run.dtype == widest], failed)
    verdict: Verdict = "right" if comparisons and not failed and not findings else "wrong"
    seconds = time.perf_counter() - started
    return Report(name, verdict, tuple(comparisons), tuple(findings), diagnosis, (), seconds)


def _run(
    piece: Piece, candidate: Callable, framework: Framework, rng: np.random.Generator, dtype: str, gradients: bool
) -> _Run | str:
    """The candidate and the formula on one input, or the reason why there is no result."""
    drawn = piece.draw(rng)
    inputs = {name: x.astype(numpy_dtype(dtype)) if x.dtype == np.float64 else x for name, x in drawn.items()}
    exact = {name: x.astype(np.float64) if x.dtype.kind == "f" else x for name, x in inputs.items()}
    cotangents = {name: rng.standard_normal(x.shape) for name, x in piece.formula({}, exact, NUMPY).items()}

    def call(*given: Any) -> dict[str, Any]:
        result = _called(candidate, piece, given)
        if not isinstance(result, Mapping):
            parts = result if isinstance(result, tuple | list) else (result,)
            result = {name: x for (name, _), x in zip(piece.outputs, parts, strict=False)}
        missing = [name for name, _ in piece.outputs if name not in result]
        if missing:
            raise ValueError(f"{', '.join(x for x, _ in piece.outputs)} were expected; {', '.join(missing)} is missing")
        return {name: result[name] for name, _ in piece.outputs}

    try:
        arrays = _evaluated(call, inputs, piece, framework, cotangents if gradients else None)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).strip().splitlines() or [""])[0]
        return f"raises {type(error).__name__}: {first} ({frame.filename}:{frame.lineno})"
    truth = piece.formula({}, exact, NUMPY)
    if gradients:
        through: Framework = "torch" if "torch" in installed_frameworks() else "jax"
        backend = torch_backend() if through == "torch" else jax_backend()
        right = lambda *given: piece.formula({}, dict(zip(piece.arguments, given, strict=True)), backend)  # noqa: E731
        truth = _evaluated(right, exact, piece, through, cotangents)
    return _Run(dtype, inputs, exact, arrays, {name: np.asarray(x) for name, x in truth.items()})


def _called(candidate: Callable, piece: Piece, given: tuple) -> Any:
    """The candidate, called by the names of its arguments if it has ours, else in our order."""
    try:
        names = set(inspect.signature(candidate).parameters)
    except (TypeError, ValueError):
        names = set()
    if names.issuperset(piece.arguments):
        return candidate(**dict(zip(piece.arguments, given, strict=True)))
    return candidate(*given)


def _evaluated(call: Callable, inputs: Arrays, piece: Piece, framework: Framework, cotangents: Arrays | None) -> Arrays:
    """Outputs of a call in a framework, and gradients of Σ cotangent·output where cotangents are given."""
    evaluate = {"numpy": _in_numpy, "torch": _in_torch, "jax": _in_jax}[framework]
    return evaluate(call, inputs, piece, cotangents)


def _in_numpy(call: Callable, inputs: Arrays, piece: Piece, cotangents: Arrays | None) -> Arrays:
    return {name: np.asarray(x) for name, x in call(*(np.array(inputs[x]) for x in piece.arguments)).items()}


def _in_torch(call: Callable, inputs: Arrays, piece: Piece, cotangents: Arrays | None) -> Arrays:
    import torch

    tensors = {name: torch.from_numpy(np.array(inputs[name])) for name in piece.arguments}
    leaves = [tensors[name].requires_grad_(cotangents is not None) for name in piece.differentiable]
    outputs = call(*tensors.values())
    arrays = {name: x.detach().numpy() for name, x in outputs.items()}
    if cotangents is not None:
        loss = sum((x * torch.from_numpy(np.array(cotangents[name])).to(x.dtype)).sum() for name, x in outputs.items())
        found = torch.autograd.grad(cast(Any, loss), leaves, allow_unused=True, materialize_grads=True)
        arrays |= {f"gradient/{name}": x.numpy() for name, x in zip(piece.differentiable, found, strict=True)}
    return arrays


def _in_jax(call: Callable, inputs: Arrays, piece: Piece, cotangents: Arrays | None) -> Arrays:
    import jax

    wide = any(x.dtype == np.float64 for x in inputs.values())
    with jax.enable_x64(wide), jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        given = {name: jax.numpy.asarray(inputs[name]) for name in piece.arguments}

        def loss(leaves: Mapping[str, Any]) -> Any:
            outputs = call(*({**given, **leaves}[name] for name in piece.arguments))
            return sum((x * cotangents[name].astype(x.dtype)).sum() for name, x in outputs.items())  # type: ignore[index]

        arrays = {name: np.asarray(x) for name, x in call(*given.values()).items()}
        if cotangents is not None:
            found = jax.grad(loss)({name: given[name] for name in piece.differentiable})
            arrays |= {f"gradient/{name}": np.asarray(x) for name, x in found.items()}
        return arrays


def _compare(piece: Piece, run: _Run, name: str, case: str) -> list[Comparison]:
    stages = {output: stage for output, stage in piece.outputs} | {x: x for x in run.truth if x.startswith("gradient/")}
    return [
        compare(
            run.arrays[x],
            run.truth[x],
            case=case,
            stage=stage,
            dtype=run.dtype,
            subject=name,
            reference="float64",
        )
        for x, stage in stages.items()
        if x in run.arrays
    ]


def _diagnose(piece: Piece, runs: list[_Run], failed: list[Comparison]) -> Diagnosis:
    """The known mistakes, one or two, that give a candidate's outputs."""
    if not any(not row.stage.startswith("gradient/") for row in failed):
        names = ", ".join(dict.fromkeys(row.stage.removeprefix("gradient/") for row in failed))
        return Diagnosis("gradient", f"its outputs are right; these gradients are not: {names}")
    distinct = list({tuple(sorted(x.changes.items())): x for x in reversed(piece.mistakes)}.values())
    pairs = [x for x in combinations(distinct, 2) if not x[0].changes.keys() & x[1].changes.keys()]
    for tries in ([(x,) for x in piece.mistakes], pairs):
        found = sorted((far, tried) for tried in tries if (far := _distance(piece, runs, tried)) <= 1)[:1]
        if found:
            far, tried = found[0]
            groups = tuple(_synonyms(piece, runs, tried, n) for n in range(len(tried)))
            said = " and ".join(_with_synonyms(group) for group in groups)
            eps = max(far * 32, 0.1)
            text = f"its outputs equal Algorithm {piece.algorithm} with {said}, within {eps:.2g} eps of {runs[0].dtype}"
            return Diagnosis("mistake", text, groups, eps, piece.algorithm)
    return Diagnosis("unknown", "no known mistake, alone or with another one, gives its outputs")


def _distance(piece: Piece, runs: list[_Run], tried: tuple[Mistake, ...]) -> float:
    """Distance of a candidate's outputs from a wrong formula's, over 32 eps; or over a thousandth of its error."""
    largest = 0.0
    for run in runs:
        with np.errstate(all="ignore"):
            wrong = piece.formula(_options(tried), run.exact, NUMPY)
        for name, _ in piece.outputs:
            if run.arrays[name].shape != run.truth[name].shape:
                return math.inf
            allowed = max(32 * epsilon(run.dtype), 1e-3 * relative(run.arrays[name], run.truth[name]))
            largest = max(largest, relative(run.arrays[name], wrong[name]) / allowed)
    return largest


def _options(tried: tuple[Mistake, ...]) -> dict[str, Any]:
    return {field: value for mistake in tried for field, value in mistake.changes.items()}


def _synonyms(piece: Piece, runs: list[_Run], made: tuple[Mistake, ...], which: int) -> tuple[Mistake, ...]:
    """One of the mistakes made, then all others that would give the same outputs in its place."""
    rest = made[:which] + made[which + 1 :]

    def is_the_same(mistake: Mistake) -> bool:
        if mistake.name == made[which].name:
            return False
        one, other = (_options((*rest, x)) for x in (mistake, made[which]))
        for run in runs:
            with np.errstate(all="ignore"):
                outputs = [piece.formula(x, run.exact, NUMPY) for x in (one, other)]
            if any(relative(outputs[0][name], outputs[1][name]) > ALIKE for name, _ in piece.outputs):
                return False
        return True

    return made[which], *(x for x in piece.mistakes if is_the_same(x))


def _with_synonyms(group: tuple[Mistake, ...]) -> str:
    first, *others = (x.name for x in group)
    return first + (f" (the same function as {'; '.join(others)})" if others else "")
