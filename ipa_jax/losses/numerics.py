"""Lengths, distances and means whose gradients are finite everywhere."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ipa_bridge.config import LossConfig


def norm(vectors: Float[Array, "*B D"], epsilon: float) -> Float[Array, "*B"]:
    """√(|x|² + ε), whose gradient at zero is zero."""
    return jnp.sqrt(jnp.sum(vectors * vectors, -1) + epsilon)


def distances(ones: Float[Array, "*B A 3"], others: Float[Array, "*B C 3"]) -> Float[Array, "*B A C"]:
    """All distances between the two sets of points."""
    return norm(ones[..., :, None, :] - others[..., None, :, :], LossConfig.distance_epsilon)


def masked_mean(
    value: Float[Array, "*B *N"], weight: Float[Array, "*B *N"], axes: int | tuple[int, ...], *, repeats: int = 1
) -> Float[Array, "*B"]:
    """Weighted mean of values that are each a sum of `repeats` terms."""
    return jnp.sum(weight * value, axes) / (repeats * jnp.sum(weight, axes) + LossConfig.mean_epsilon)


def merge_axes(x: Shaped[Array, "*B N A *C"], axis: int) -> Shaped[Array, "*B N*A *C"]:
    """Merges an axis, counted from the end, with the next one."""
    shape, first = x.shape, x.ndim + axis
    return x.reshape(*shape[:first], shape[first] * shape[first + 1], *shape[first + 2 :])
