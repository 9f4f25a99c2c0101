"""The dtypes that arithmetic runs in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def widest_dtype(*dtypes: DTypeLike) -> np.dtype:
    """The dtype that holds all of these, by JAX's standard promotion whatever the user's setting.

    Where JAX has no float64, that of numpy arrays counts as float32.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(jax.dtypes.canonicalize_dtype(dtype) for dtype in dtypes))


def at_least_float32(*dtypes: DTypeLike) -> np.dtype:
    """The dtype of arithmetic that must not lose coordinates: the widest of these, float32 at the least."""
    return widest_dtype(jnp.float32, *dtypes)
