"""All error bounds of the project: the largest error K of each stage, in machine epsilons.

An error is max|x − ref64| / scale over the entries that the mask keeps, divided by the epsilon of the narrowest
arithmetic used. The scale is max|ref64| unless a stage states a better one. K is the same in float32 and float64, so
that a hidden cast in one of them shows. Half precision has its own K: its error comes from a few roundings of the
activations, not from sums.
"""

from __future__ import annotations

import numpy as np

from ipa_bridge.weights.tensors import numpy_dtype

BOUNDS = {
    "logits": 16,
    "attention": 16,
    "o": 32,
    "points": 16,
    "norms": 16,
    "o_pair": 32,
    "out": 32,
    "rotation": 128,
    "translation": 32,
    "group_rotation": 128,
    "group_translation": 32,
    "unnormalized_angles": 32,
    "angles": 32,
    "atom14": 32,
    "act": 32,
    "loss": 32,
    "gradient": 256,
}
"""K per stage in float32 and float64; K of points and norms is multiplied by `conditioning`. Gradients are one stage.

Worst errors measured, in eps, over the suite's cases and 1,248 residues of 5NMU in both layouts: logits 3.8,
attention 11, o 11.6, points 29, norms 25, o_pair 13.4, out 26, gradients 116 (γ, frames spread over ±50). In the
structure module on 2RBG, eight layers: rotation 59, translation 12.4, angles 7.4, atom14 9.6, act 12.7, losses 1.7.
"""

HALF_BOUNDS = {**dict.fromkeys(BOUNDS, 1), "gradient": 2}
"""K per stage in bfloat16 and float16; worst errors measured: outputs 1.0, gradients 1.8."""

KINKED = 2048.0
"""Factor on the bound of a float32 gradient through millions of ReLUs, which allows 1/16 in the Euclidean norm.

A fraction of about eps of the ReLUs has inputs within rounding of zero; their gradients may flip, which adds up to
√eps. The worst error measured, in the structure module on 2RBG, is an eighteenth of this bound. The bound finds only
gross errors; the comparison in float64, where no ReLU flips, finds the others.
"""

WHOLE_MODEL = 8.0
"""Factor on what half an ulp of noise at a trained model's inputs does to its prediction: bound of what a swap does.

Noise enters once; rounding errors of a swapped attention enter in every layer. Most measured in `make trained`: 2.0.
"""

HALF_DTYPES = ("bfloat16", "float16")
DTYPES = ("float64", "float32", *HALF_DTYPES)
"""The dtypes that have bounds, by name."""


def epsilon(dtype: str) -> float:
    """Machine epsilon of a dtype by name: "float64", "float32", "bfloat16" or "float16"."""
    import ml_dtypes

    return float(ml_dtypes.finfo(numpy_dtype(dtype)).eps)


def bound(stage: str, dtype: str) -> int:
    """K for a stage ("gradient/…" for any gradient) in a dtype."""
    table = HALF_BOUNDS if dtype in HALF_DTYPES else BOUNDS
    return table[stage.partition("/")[0]]


def conditioning(translation: np.ndarray, mask: np.ndarray, local_points: np.ndarray) -> float:
    """Factor on the bounds of the point stages for frames far apart: 1 + max|t − mean t| / max|local points|.

    Local points are global points minus translations; the larger the translations, the more bits this subtraction
    loses. Only the spread of the frames counts, not their common position, because the implementations centre them.
    """
    valid = mask.astype(bool)
    if not valid.any() or not local_points.size:
        return 1.0
    weight = valid[..., None].astype(float)
    mean = (weight * translation).sum(-2, keepdims=True) / np.maximum(weight.sum(-2, keepdims=True), 1)
    return 1.0 + float(np.abs(translation - mean).max() / np.abs(local_points).max())
