"""Judges one case in both frameworks, against float64 and against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from ipa_bridge import tolerance
from ipa_parity.attention.cases import Case
from ipa_parity.attention.stages import RUNNERS, Arrays, run_oracle
from ipa_parity.report import Comparison, compare

COLLAPSED = 1 / 16
"""Largest ratio of translations' gradients to the terms they sum at which residues count as attending to themselves."""


def judge(
    case: Case,
    dtype: str,
    *,
    frameworks: Iterable[str] = ("jax", "torch"),
    gradients: bool = True,
    runners: Mapping[str, Callable[..., Arrays]] | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Iterator[Comparison]:
    """Compares every stage of a case in one dtype: each framework with float64, and the two with each other.

    A stage's reference is the oracle. The oracle has no gradients: their reference is the torch model in float64 (the
    Haiku model if torch is missing) on the same rounded inputs. In float64 the frameworks' gradients are compared with
    each other, and a single framework's are not computed.

    Args:
        case: the case, in float64.
        dtype: the dtype to round it to and run it in: "float64", "float32", "bfloat16" or "float16".
        frameworks: frameworks to run, of "jax" and "torch".
        gradients: compare gradients too.
        runners: the function that runs each framework, by name; None for `stages.RUNNERS`.
        progress: called with the name of each step before it runs.
    """
    runners = RUNNERS if runners is None else runners
    rounded, frameworks = case.astype(dtype), tuple(frameworks)
    gradients = gradients and (len(frameworks) == 2 or dtype != "float64")
    progress("oracle")
    truth = run_oracle(rounded)
    runs: dict[str, Arrays] = {}
    for name in frameworks:
        progress(f"{name} {dtype}")
        runs[name] = runners[name](rounded, gradients=gradients)
    if gradients and dtype != "float64":
        judge_of_gradients = "torch" if "torch" in runs else "jax"
        progress(f"{judge_of_gradients} float64")
        exact = runners[judge_of_gradients](rounded.astype("float64"))
        truth |= {stage: x for stage, x in exact.items() if stage.startswith("gradient/")}
    pairs = [(name, arrays, "float64", truth) for name, arrays in runs.items()]
    if len(runs) == 2:
        (first, arrays), (second, others) = runs.items()
        pairs.append((first, arrays, second, others))
    for subject, arrays, reference, expected in pairs:
        for stage in expected:
            yield _compare_stage(rounded, dtype, stage, subject, arrays, reference, expected)


def _compare_stage(
    case: Case, dtype: str, stage: str, subject: str, arrays: Arrays, reference: str, expected: Arrays
) -> Comparison:
    actual, wanted, meaningful = arrays[stage], expected[stage], None
    if stage == "logits":
        # A masked key's logit is −1e5 plus the usual terms; the softmax makes it zero whatever these are.
        visible = ~(case.mask[..., :, None] & ~case.mask[..., None, :])[..., None, :, :]
        meaningful = np.broadcast_to(visible, wanted.shape)
        actual, wanted = (without_row_constant(x, visible) for x in (actual, wanted))
    conditioning = 1.0
    if stage in ("points", "norms"):
        conditioning = tolerance.conditioning(
            case.translation / case.config.position_scale, case.mask, expected["points"]
        )
    return compare(
        actual,
        wanted,
        case=case.name,
        stage=stage,
        dtype=dtype,
        subject=subject,
        reference=reference,
        meaningful=meaningful,
        scale=declared_scale(case, stage, expected),
        conditioning=conditioning,
    )


def without_row_constant(logits: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Logits less the largest visible one of each row, since the softmax removes what a row has in common."""
    return logits - np.where(visible, logits, -np.inf).max(-1, keepdims=True)


def declared_scale(case: Case, stage: str, expected: Arrays) -> float | None:
    """The size of the terms in a gradient that is mathematically a sum of (nearly) zero; None for every other stage.

    The bias of `attention_2d` adds one number to a whole row of logits, which the softmax removes. So its gradient
    Σ dL over all pairs is zero, and Σ|dL| is at least max|Σ dL·z| / max|z|. The same holds for the bias of keys that
    are projected by themselves and not rotated. A translation's gradient is the part through the points minus the part
    through the inverse frame; the two are equal where a residue attends to itself alone.
    """
    if stage == "gradient/attention_2d/bias" and case.pair is not None:
        return float(np.abs(expected["gradient/attention_2d/weights"]).max() / np.abs(case.pair).max())
    if stage == "gradient/k_scalar_projection/bias" and not case.config.rotary_embedding:
        return float(np.abs(expected["gradient/k_scalar_projection/weights"]).max() / np.abs(case.single).max())
    if stage == "gradient/translation":
        terms = float(np.linalg.norm(_point_cotangent(case, expected), axis=-1).sum((-1, -2)).max())
        return terms if np.abs(expected[stage]).max() < COLLAPSED * terms else None
    return None


def _point_cotangent(case: Case, expected: Arrays) -> np.ndarray:
    """The gradient of the loss to the local points, (*B, N, H, Pv, 3)."""
    points, norms = expected["points"], expected["norms"]
    weights = np.asarray(case.weights.arrays["output_projection/weights"], np.float64)
    features = np.asarray(case.cotangent, np.float64) @ weights.T
    width = points[..., 0].reshape(*features.shape[:-1], -1).shape[-1]
    first = case.config.num_head * case.config.num_scalar_v
    x, y, z, to_norm = np.split(features[..., first : first + 4 * width], 4, -1)
    direct = np.stack([x, y, z], -1).reshape(points.shape)
    return direct + to_norm.reshape(norms.shape)[..., None] * points / np.where(norms > 0, norms, 1)[..., None]
