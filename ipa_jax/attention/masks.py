"""Masks of keys and of pairs: they restrict, beside the residue mask, which keys a query may read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

HIDDEN = -1e30
"""Logit of a key that a query may not read: finite, and its attention weight is exactly zero beside any other."""


def combine(
    key_mask: Shaped[Array, "*B N"] | None, pair_mask: Shaped[Array, "*B N N"] | None, dtype: Any
) -> Float[Array, "*B Q N"] | None:
    """1 where a query may read a key, else 0; one row serves all queries if there is no pair mask."""
    masks = [x for x in (None if key_mask is None else key_mask[..., None, :], pair_mask) if x is not None]
    if not masks:
        return None
    allowed = masks[0].astype(bool)
    for mask in masks[1:]:
        allowed = allowed & mask.astype(bool)
    return jax.lax.stop_gradient(allowed.astype(dtype))


def hides(
    allowed: Float[Array, "*B Q N"], valid: Float[Array, "*B N"] | None, keys: Float[Array, "*B M"] | None
) -> Bool[Array, "*B Q M"]:
    """True where a query may not read a key: `allowed` is 0 there, or the query is valid and the key is masked.

    Args:
        allowed: as `combine` gives it.
        valid: residue mask of the queries.
        keys: residue mask of the keys.
    """
    hidden = allowed == 0
    if valid is None or keys is None:
        return hidden
    return hidden | (valid[..., :, None] * (1 - keys[..., None, :]) != 0)


def sees_any(allowed: Float[Array, "*B Q N"], mask: Float[Array, "*B N"] | None) -> Float[Array, "*B N"]:
    """1 for a query that may read at least one key, else 0."""
    number = allowed.shape[-1]
    if allowed.shape[-2] == number or mask is None:
        seen = ~hides(allowed, mask, mask)
        return jnp.broadcast_to(seen.any(-1), (*seen.shape[:-2], number)).astype(allowed.dtype)
    keys = allowed[..., 0, :] != 0
    if_valid, if_masked = ((keys & x).any(-1, keepdims=True) for x in (mask == 1, jnp.ones_like(mask, bool)))
    return jnp.where(mask == 0, if_masked, if_valid).astype(allowed.dtype)


def zero_where_blind(
    points: Float[Array, "*B N H Pv 3"],
    mask: Shaped[Array, "*B N"] | None,
    key_mask: Shaped[Array, "*B N"] | None,
    pair_mask: Shaped[Array, "*B N N"] | None,
) -> Float[Array, "*B N H Pv 3"]:
    """Local points, set to zero for queries that may read no key: their global points are not those of any frame."""
    allowed = combine(key_mask, pair_mask, points.dtype)
    if allowed is None:
        return points
    some = sees_any(allowed, None if mask is None else jax.lax.stop_gradient(mask.astype(points.dtype)))
    return some[..., None, None, None] * points
