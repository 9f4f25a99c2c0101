"""Operands of the implementations that work in blocks: scaled, with heads first, and points joined to values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ipa_jax.attention.derivatives import in_reverse_mode_only


class Operands(NamedTuple):
    """Operands of one example, or of all examples with batch axes first.

    Logits are queries·keys − ½ weights·|query_points − key_points|² + pair·bias, or have unsquared distances.
    """

    queries: Float[Array, "H N C"]
    keys: Float[Array, "H N C"]
    values: Float[Array, "H N Cv"]
    query_points: Float[Array, "H N 3P"]
    key_points: Float[Array, "H N 3P"]
    weights: Float[Array, " H"]
    pair: Float[Array, "N N c_z"] | None
    """May have another dtype than the other fields."""
    bias: Float[Array, "c_z H"] | None
    mask: Float[Array, " N"]
    allowed: Float[Array, "Q N"] | None = None
    """0 where a key mask or a pair mask hides a key from a query, else 1; see `ipa_jax.attention.masks`."""

    @classmethod
    def from_inputs(
        cls,
        q: Float[Array, "*B N H C"],
        k: Float[Array, "*B N H C"],
        v: Float[Array, "*B N H Cv"],
        q_points: Float[Array, "*B N H P 3"],
        k_points: Float[Array, "*B N H P 3"],
        v_points: Float[Array, "*B N H Pv 3"],
        pair: Float[Array, "*B N N c_z"] | None,
        pair_bias_weight: Float[Array, "c_z H"] | None,
        point_weights: Float[Array, " H"],
        mask: Float[Array, "*B N"] | None,
        allowed: Float[Array, "*B Q N"] | None,
        logit_terms: int,
    ) -> Operands:
        """Converts the arguments of `point_attention`."""
        temperature = math.sqrt(1 / logit_terms)
        return cls(
            queries=_heads_first(q * (temperature / math.sqrt(q.shape[-1]))),
            keys=_heads_first(k),
            values=_heads_first(jnp.concatenate([v, _flat(v_points)], -1)),
            query_points=_heads_first(_flat(q_points)),
            key_points=_heads_first(_flat(k_points)),
            weights=point_weights * (temperature * math.sqrt(2 / (9 * q_points.shape[-2]))),
            pair=pair,
            bias=None if pair is None or pair_bias_weight is None else pair_bias_weight * temperature,
            mask=jnp.ones(q.shape[:-2], q.dtype) if mask is None else jnp.broadcast_to(mask, q.shape[:-2]),
            allowed=allowed,
        )


def unpack(
    o: Float[Array, "*B H N C"], v: Float[Array, "*B N H Cv"], v_points: Float[Array, "*B N H Pv 3"]
) -> tuple[Float[Array, "*B N H Cv"], Float[Array, "*B N H Pv 3"]]:
    """Splits an output into o and o_points, in the shapes of v and v_points."""
    o = jnp.swapaxes(o, -2, -3)
    return o[..., : v.shape[-1]], o[..., v.shape[-1] :].reshape(v_points.shape)


def _heads_first(x: Float[Array, "*B N H D"]) -> Float[Array, "*B H N D"]:
    return jnp.swapaxes(x, -2, -3)


def _flat(points: Float[Array, "*B N H P 3"]) -> Float[Array, "*B N H 3P"]:
    return points.reshape(*points.shape[:-2], 3 * points.shape[-2])


def number_of_examples(batch: Sequence[Any]) -> int:
    """The product of the batch axes, at least 1. An axis of symbolic length in `jax.export` counts as 1."""
    return max(1, math.prod(length for length in batch if isinstance(length, int)))


def over_batch(attend: Callable, operands: Operands, axes: int) -> tuple[Any, Any, Any]:
    """Applies the attention of one example to all examples.

    Raises:
        NotImplementedError: a forward-mode derivative is computed; under `jax.jit` it is raised when JAX compiles.
    """
    batched = jax.tree.map(lambda _: 0, operands)._replace(weights=None, bias=None)
    for _ in range(axes):
        attend = jax.vmap(attend, (batched,))
    return attend(jax.tree.map(in_reverse_mode_only, operands))
