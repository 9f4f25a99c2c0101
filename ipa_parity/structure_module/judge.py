"""Judges one structure module in both frameworks, against float64 and against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ipa_bridge import tolerance
from ipa_parity.attention.stages import Arrays
from ipa_parity.report import Comparison, Norm, compare
from ipa_parity.structure_module.cases import StructureModuleCase
from ipa_parity.structure_module.stages import RUNNERS

LONGEST_LEVER = 8.0
"""Maximum distance in Å of a side chain's atom from the axis of a torsion that rotates it."""


def judge(
    case: StructureModuleCase,
    dtype: str,
    *,
    frameworks: Iterable[str] = ("jax", "torch"),
    gradients: bool = True,
    progress: Callable[[str], None] = lambda step: None,
) -> Iterator[Comparison]:
    """Compares every stage of a case in one dtype: each framework with float64, and the two with each other.

    The float64 reference is the torch model (the Haiku model if torch is missing). In float64 itself the frameworks
    are compared with each other only.

    Args:
        case: the case, in float64.
        dtype: the dtype to round it to and run it in: "float64" or "float32".
        frameworks: frameworks to run, of "jax" and "torch".
        gradients: compare gradients too.
        progress: called with the name of each step before it runs.
    """
    rounded, frameworks = case.astype(dtype), tuple(frameworks)
    runs: dict[str, Arrays] = {}
    for name in frameworks:
        progress(f"{name} {dtype}")
        runs[name] = RUNNERS[name](rounded, gradients=gradients)
    pairs = []
    if dtype != "float64":
        truth = "torch" if "torch" in runs else "jax"
        progress(f"{truth} float64")
        exact = RUNNERS[truth](rounded.astype("float64"), gradients=gradients)
        pairs += [(name, arrays, "float64", exact) for name, arrays in runs.items()]
    if len(runs) == 2:
        (first, arrays), (second, others) = runs.items()
        pairs.append((first, arrays, second, others))
    for subject, arrays, reference, expected in pairs:
        for stage in expected:
            yield compare_stage(rounded, dtype, stage, subject, arrays, reference, expected)


def compare_stage(
    case: StructureModuleCase,
    dtype: str,
    stage: str,
    subject: str,
    arrays: Arrays,
    reference: str,
    expected: Arrays,
    *,
    valid_only: bool = False,
    norm: Norm = "max",
) -> Comparison:
    """Judges one stage by the tolerance table.

    A torsion angle is the direction of a predicted vector, and rounding turns a short vector further. So errors of
    angles are multiplied by the length of their vector, errors of groups and atoms are divided by a factor that grows
    as the residue's shortest vector shrinks, and the bound of gradients grows as the shortest vector of all shrinks.

    In float32 about one ReLU in a million, with an input within rounding of zero, is open in one run and shut in the
    other, and gradients jump there. They have a much wider bound, in the Euclidean norm.

    Args:
        case: the case that was run.
        dtype: the dtype it was run in.
        stage: name of the stage.
        subject: name of the run that gave `arrays`.
        arrays: stages to judge.
        reference: name of the run that gave `expected`.
        expected: stages of the reference.
        valid_only: judge only the residues that the mask keeps.
        norm: norm of the error and of the values.
    """
    actual, wanted = arrays[stage].astype(np.float64), expected[stage].astype(np.float64)
    field, _, layer = stage.partition("/")
    scale, conditioning = None, 1.0
    if field == "angles":
        lengths = _lengths(expected, layer)[..., None]
        actual, wanted = actual * lengths, wanted * lengths
    if field in ("atom14", "group_rotation", "group_translation"):
        lengths = _lengths(expected, layer)
        lever = 1.0 if field == "group_rotation" else LONGEST_LEVER / np.abs(wanted).max()
        forgiven = 1 + lever * lengths.mean() / lengths.min(-1)
        actual = wanted + (actual - wanted) / np.expand_dims(forgiven, tuple(range(1, wanted.ndim)))
    if field == "gradient":
        norm = "euclidean" if dtype == "float32" else norm
        each = (_lengths(expected, f"layer {i + 1}") for i in range(case.config.num_layer))
        shortness = max(x.mean() / x.min() for x in each)
        conditioning = tolerance.KINKED if dtype == "float32" else 1 + shortness / 8
    if stage.endswith("attention_2d/bias"):
        # Zero in exact arithmetic: a sum of gradients over whole rows of logits.
        scale = float(np.abs(expected[stage.replace("/bias", "/weights")]).max())
    return compare(
        actual[case.mask] if valid_only else actual,
        wanted[case.mask] if valid_only else wanted,
        case=case.name,
        stage=stage,
        dtype=dtype,
        subject=subject,
        reference=reference,
        scale=scale,
        conditioning=conditioning,
        norm=norm,
    )


def _lengths(expected: Arrays, layer: str) -> np.ndarray:
    """Lengths of the predicted vectors whose directions are the torsions, (N, 7)."""
    return np.linalg.norm(expected[f"unnormalized_angles/{layer}"].astype(np.float64), axis=-1)
