"""Tests of your own attention with pytest, one for each input, dtype and property: `@ipa_conformance("alphafold2")`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins import Structure
from ipa_bridge.proteins.frames import random_rotations
from ipa_bridge.tolerance import DTYPES
from ipa_bridge.weights import Weights
from ipa_parity.attention.cases import PRESETS, Case
from ipa_parity.checking import conclude
from ipa_parity.checking.candidates import Candidate, Framework
from ipa_parity.checking.judging import STAGES, Judged, judge, judge_all
from ipa_parity.checking.probes import Probe, make_probes
from ipa_parity.checking.seeing import see
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.report import Comparison, compare

if TYPE_CHECKING:
    import pytest

__all__ = ["Conformance", "ipa_conformance"]

Aspect = Literal["output", "gradients", "dtype", "same twice"]

ORDINARY = "random frames"
MASKED = "other values in masked residues"
MOVED = "all frames moved together"

PLAN: Mapping[str, tuple[Aspect, ...]] = {
    ORDINARY: ("output", "gradients", "dtype", "same twice"),
    "points near zero": ("output", "gradients"),
    "far from the origin": ("output",),
    "a batch": ("output",),
    MASKED: ("output",),
    MOVED: ("output",),
    "the structure": ("output", "gradients"),
}
"""Inputs, and what is tested on each."""


def ipa_conformance(
    config: IPAConfig | str | None = None,
    *,
    dtypes: Sequence[str] = ("float32", "float64"),
    gradients: bool = True,
    batch: bool = True,
    stages: Sequence[str] = (),
    parameters: str | Mapping[str, str] | None = None,
    call: Callable | None = None,
    framework: Framework | None = None,
    weights: Weights | None = None,
    structure: Structure | None = None,
    seed: int = 0,
) -> pytest.MarkDecorator:
    """Parametrises a test over what a right invariant point attention does; its argument is named `conformance`.

    Each test calls `conformance.check(candidate)`. The tests' ids name dtype, input and property, as
    `test_mine[float32-far from the origin-output]`. A failing one says what the candidate computes instead.

    Args:
        config: the attention's config, or the name of a preset. None to read it from the parameters' shapes, where the
            candidate has parameters.
        dtypes: dtypes to run in, of "float32", "float64", "bfloat16" and "float16".
        gradients: test gradients to inputs and parameters too, in PyTorch and JAX.
        batch: test a batch of two proteins too.
        stages: names of stages that the candidate returns beside its output, of "logits", "attention", "o", "points",
            "norms" and "o_pair".
        parameters: its names of parameters, as in `ipa_parity.check`.
        call: how to call it, as in `ipa_parity.check`.
        framework: the arrays that a function takes, as in `ipa_parity.check`.
        weights: weights to give it; None for seeded ones.
        structure: a protein to run on too.
        seed: seed of all random numbers.

    Raises:
        ValueError: a dtype, a stage or a preset is unknown.
    """
    import pytest

    _check_names("dtypes", dtypes, DTYPES)
    _check_names("stages", stages, STAGES[:-1])
    if isinstance(config, str):
        _check_names("config", [config], tuple(PRESETS))
        config = PRESETS[config]()
    how = {"parameters": parameters, "call": call, "framework": framework}
    suite = _Suite(config if weights is None else weights.config, how, weights, structure, seed)
    left_out = {*(() if batch else ["a batch"]), *(() if structure else ["the structure"])}
    tests = [
        Conformance(suite, dtype, probe, aspect)
        for dtype in dict.fromkeys(dtypes)
        for probe, aspects in PLAN.items()
        for aspect in [*aspects[:1], *(stages if probe == ORDINARY else ()), *aspects[1:]]
        if probe not in left_out and (gradients or aspect != "gradients")
    ]
    return pytest.mark.parametrize("conformance", [pytest.param(x, id=str(x)) for x in tests])


def _check_names(argument: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = [x for x in given if x not in known]
    if unknown or isinstance(given, str):
        raise ValueError(f"{argument} of {', '.join(known)} were expected; got {given!r}")


@dataclass
class _Suite:
    """State that the tests of one decorator share."""

    config: IPAConfig | None
    how: Mapping[str, Any]
    weights: Weights | None
    structure: Structure | None
    seed: int
    diagnoses: dict[tuple[str, str], str] = field(default_factory=dict)
    """Diagnoses by dtype and a digest of the outputs."""
    last: tuple[Any, Candidate, dict[str, Case]] | None = None
    """The last candidate as it came and behind one call, and its inputs; one that all tests share compiles once."""

    def prepare(self, candidate: Any) -> tuple[Candidate, dict[str, Case]]:
        """The candidate behind one call, and its inputs by name."""
        if self.last is None or self.last[0] is not candidate:
            seen = see(candidate, self.config, name=None, **self.how)
            cases = make_probes(
                seen.config, seed=self.seed, weights=self.weights, structure=self.structure, masked=seen.takes_mask
            )
            self.last = candidate, seen, {case.name: case for case in cases}
        return self.last[1:]

    def diagnose(self, seen: Candidate, cases: Mapping[str, Case], dtype: str, *, gradients: bool) -> str:
        """A few lines on what the candidate computes in one dtype."""
        judged = judge_all(seen, [Probe(case, dtype) for case in cases.values()], gradients=gradients)
        digest = hashlib.sha256()
        for each in judged:
            for name, x in each.arrays.items():
                digest.update(name.encode() + np.ascontiguousarray(x).tobytes())
        key = dtype, digest.hexdigest() + "".join(str(x) for each in judged for x in each.findings)
        if key not in self.diagnoses:
            report = conclude(seen, {dtype: judged})
            lines = report.summary()
            lines += [f"  {x}" for x in dict.fromkeys(x.text for x in report.findings)]
            lines += [f"  note: {x}" for x in report.notes]
            if report.passed:
                lines = [f"{seen.name} is right on all inputs that are not changed."]
            self.diagnoses[key] = "\n".join(lines)
        return self.diagnoses[key]


@dataclass(frozen=True, eq=False)
class Conformance:
    """One property of a right attention on one input, which `check` tests."""

    _suite: _Suite = field(repr=False)
    dtype: str
    probe: str
    """Name of the input."""
    aspect: str
    """The property tested: "output", "gradients", "dtype", "same twice", or a stage."""

    def __str__(self) -> str:
        return f"{self.dtype}-{self.probe}-{self.aspect}"

    def check(self, candidate: Any) -> None:
        """Tests a candidate: anything that `ipa_parity.check` takes.

        It skips the test if the candidate has no gradients or takes no mask.

        Raises:
            AssertionError: the candidate is wrong here. The message says by how much, and what it computes instead.
            ValueError: it is nothing that can be checked, or its config is unknown.
        """
        __tracebackhide__ = True
        seen, cases = self._suite.prepare(candidate)
        gradients = self.aspect == "gradients"
        if gradients and seen.framework == "numpy" and not installed_frameworks():
            _skip("gradients need PyTorch or JAX")
        if self.probe == MASKED and not seen.takes_mask:
            _skip(f"{seen.name} takes no mask")
        problems = list(self._problems(seen, cases))
        if problems:
            said = self._suite.diagnose(seen, cases, self.dtype, gradients=gradients)
            raise AssertionError("\n".join([f"{self.aspect} on {self.probe} in {self.dtype}:", *problems, "", said]))

    def _problems(self, seen: Candidate, cases: Mapping[str, Case]) -> Iterator[str]:
        """Problems with this property, a line each."""
        if self.probe in (MASKED, MOVED):
            first = judge(seen, Probe(cases[ORDINARY], self.dtype), gradients=False)
            change = _with_other_masked_values if self.probe == MASKED else _moved
            second = judge(seen, Probe(change(cases[ORDINARY]), self.dtype), gradients=False)
            yield from _exceptions(first) or _exceptions(second) or _changes(seen.name, first, second)
            return
        probe = Probe(cases[self.probe], self.dtype)
        judged = judge(seen, probe, gradients=self.aspect == "gradients", twice=self.aspect == "same twice")
        if texts := _exceptions(judged):
            yield from texts
        elif self.aspect == "dtype":
            yield from (x.text for x in judged.findings if x.text.startswith("the output is"))
        elif self.aspect == "same twice":
            yield from (x.text for x in judged.findings if x.text.startswith(("writes into", "two calls")))
        else:
            yield from self._comparisons(judged)

    def _comparisons(self, judged: Judged) -> Iterator[str]:
        stage = {"output": "out", "gradients": "gradient"}.get(self.aspect, self.aspect)
        rows = [x for x in judged.comparisons if x.stage.partition("/")[0] == stage]
        yield from (x.text for x in judged.findings if self.aspect == "gradients" and x.text.startswith("gradients:"))
        yield from (str(x) for x in rows if not x.passed)
        if not rows and self.aspect == "gradients" and not judged.findings:
            _skip("it has no gradients")
        elif not rows and not judged.findings:
            yield f"it does not return {self.aspect}"


def _skip(reason: str) -> None:
    import pytest

    pytest.skip(reason)


def _exceptions(judged: Judged) -> list[str]:
    """Why there are no outputs."""
    return [] if judged.arrays else [x.text for x in judged.findings]


def _changes(name: str, first: Judged, second: Judged) -> list[str]:
    """Changes of outputs that should be the same."""
    valid = first.probe.case.mask
    outputs = [each.arrays["out"] for each in (first, second)]
    if not (first.has_output and second.has_output):
        return ["outputs are not finite, or not in the shape of the single representation"]
    row: Comparison = compare(
        outputs[1][valid],
        outputs[0][valid],
        case=second.probe.name,
        stage="out",
        dtype=first.probe.dtype,
        subject=name,
        reference="the same without the change",
        conditioning=2 * max(first.probe.conditioning, second.probe.conditioning),
    )
    return [] if row.passed else [str(row)]


def _with_other_masked_values(case: Case) -> Case:
    """The case with other values wherever a residue is masked."""
    rng = np.random.default_rng(7)
    hidden = ~case.mask
    single, translation, rotation = case.single.copy(), case.translation.copy(), case.rotation.copy()
    single[hidden] = rng.standard_normal(single[hidden].shape)
    translation[hidden] = translation[hidden][..., ::-1]
    rotation[hidden] = random_rotations(rng, (int(hidden.sum()),))
    pair = case.pair
    if pair is not None:
        either = hidden[..., :, None] | hidden[..., None, :]
        pair = np.where(either[..., None], rng.standard_normal(pair.shape), pair)
    return replace(case, name=MASKED, single=single, translation=translation, rotation=rotation, pair=pair)


def _moved(case: Case) -> Case:
    """The case after one rotation and translation of all frames."""
    rng = np.random.default_rng(8)
    turn = random_rotations(rng, ())
    shift = 3 * case.config.position_scale * rng.standard_normal(3)
    translation = case.translation @ turn.T + shift
    return replace(case, name=MOVED, rotation=turn @ case.rotation, translation=translation)
