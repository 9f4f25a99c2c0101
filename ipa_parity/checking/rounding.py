"""Rounding to the formats of low-precision arithmetic, in numpy's float64."""

from __future__ import annotations

import numpy as np

from ipa_bridge.weights.tensors import numpy_dtype

FORMATS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "tf32": 2.0**-10, "float32": 2.0**-23}
"""Machine epsilon of each format. TF32 has float16's significand and float32's range."""


def round_to(name: str, x: np.ndarray) -> np.ndarray:
    """The nearest numbers of a format, in float64; beyond float16's range, infinity."""
    if name != "tf32":
        with np.errstate(over="ignore"):
            return x.astype(numpy_dtype(name)).astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return rounded.view(np.float32).astype(np.float64)
