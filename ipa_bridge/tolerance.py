"""The only place where bounds live: how many machine epsilons a stage may be off.

An error is max|x − ref64| / scale over what the mask makes meaningful, and scale is max|ref64| unless a stage
states a better one. It is divided by the epsilon of the narrowest arithmetic used. K is the same in float32 and
float64, so that a cast hidden in one of them shows; half precision, whose error is a few roundings of the
activations and not a sum's, has its own.
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
"""K per stage in float32 and float64, that of points and norms times their `conditioning`; gradients are one stage.

Measured worst, in eps, over the suite's cases and 1,248 residues of 5NMU in both layouts: logits 3.8, attention 11,
o 11.6, points 29, norms 25, o_pair 13.4, out 26, gradients 116 (γ, frames spread over ±50). In the structure module
on 2RBG, eight layers: rotation 59, translation 12.4, angles 7.4, atom14 9.6, act 12.7, losses 1.7.
"""

HALF_BOUNDS = {**dict.fromkeys(BOUNDS, 1), "gradient": 2}
"""K per stage in bfloat16 and float16; measured worst: outputs 1.0, gradients 1.8."""

KINKED = 2048.0
"""How much more a float32 gradient through millions of ReLUs may err, in the Euclidean norm: a sixteenth.

A fraction of about eps of them is within rounding of zero, and what jumps there adds up to √eps. Measured worst, in
the structure module on 2RBG: an eighteenth of this. It sees what is grossly wrong; float64, where none flips, the rest.
"""

HALF_DTYPES = ("bfloat16", "float16")
DTYPES = ("float64", "float32", *HALF_DTYPES)
"""The dtypes that have bounds, by name."""


def epsilon(dtype: str) -> float:
    """Machine epsilon of a dtype by name: "float64", "float32", "bfloat16" or "float16"."""
    import ml_dtypes

    return float(ml_dtypes.finfo(numpy_dtype(dtype)).eps)


def bound(stage: str, dtype: str) -> int:
    """K for a stage ("gradient/…" for any gradient) in that dtype."""
    table = HALF_BOUNDS if dtype in HALF_DTYPES else BOUNDS
    return table[stage.partition("/")[0]]


def conditioning(translation: np.ndarray, mask: np.ndarray, local_points: np.ndarray) -> float:
    """How much more the point stages may err when frames lie far apart: 1 + max|t − mean t| / max|local points|.

    Local points come from global ones by subtracting translations, which loses the bits by which these are larger.
    Where all frames lie does not count, only how far apart: the implementations centre them.
    """
    valid = mask.astype(bool)
    if not valid.any() or not local_points.size:
        return 1.0
    weight = valid[..., None].astype(float)
    mean = (weight * translation).sum(-2, keepdims=True) / np.maximum(weight.sum(-2, keepdims=True), 1)
    return 1.0 + float(np.abs(translation - mean).max() / np.abs(local_points).max())
