"""Functions whose derivatives stay finite."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def safe_sqrt(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """√x of x ≥ 0, whose derivative at 0 is 0 and not infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)
