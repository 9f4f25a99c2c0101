"""Algorithm 22, lines 4 and 7–10, as published (Jumper et al. 2021): holds all N×N×… intermediates in memory."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float


def point_attention(
    q: Float[Array, "*B N H C"],
    k: Float[Array, "*B N H C"],
    v: Float[Array, "*B N H Cv"],
    q_points: Float[Array, "*B N H P 3"],
    k_points: Float[Array, "*B N H P 3"],
    v_points: Float[Array, "*B N H Pv 3"],
    pair: Float[Array, "*B N N c_z"] | None,
    *,
    pair_bias_weight: Float[Array, "c_z H"] | None,
    point_weights: Float[Array, " H"],
    mask: Float[Array, "*B N"] | None = None,
    block_size: int | None = None,
    return_attention: bool = False,
) -> tuple[
    Float[Array, "*B N H Cv"],
    Float[Array, "*B N H Pv 3"],
    Float[Array, "*B N H c_z"] | None,
    Float[Array, "*B H N N"] | None,
]:
    """Outputs o, o_points, o_pair, and the attention or None. All arrays but `pair` have one dtype, at least float32.

    Raises:
        NotImplementedError: block_size is given, but this implementation has no blocks.
    """
    if block_size is not None:
        raise NotImplementedError(f"implementation 'reference' has no blocks: leave block_size None, got {block_size}")
    pair = None if pair is None else pair.astype(q.dtype)
    logits = attention_logits(
        q, k, q_points, k_points, pair, pair_bias_weight=pair_bias_weight, point_weights=point_weights, mask=mask
    )
    attention = jax.nn.softmax(logits, axis=-1)
    o = jnp.einsum("...hij,...jhc->...ihc", attention, v, precision=Precision.HIGHEST)  # line 9
    o_points = jnp.einsum("...hij,...jhpx->...ihpx", attention, v_points, precision=Precision.HIGHEST)  # line 10
    o_pair = None
    if pair is not None:
        o_pair = jnp.einsum("...hij,...ijc->...ihc", attention, pair, precision=Precision.HIGHEST)  # line 8
    return o, o_points, o_pair, attention if return_attention else None


def attention_logits(
    q: Float[Array, "*B N H C"],
    k: Float[Array, "*B N H C"],
    q_points: Float[Array, "*B N H P 3"],
    k_points: Float[Array, "*B N H P 3"],
    pair: Float[Array, "*B N N c_z"] | None,
    *,
    pair_bias_weight: Float[Array, "c_z H"] | None,
    point_weights: Float[Array, " H"],
    mask: Float[Array, "*B N"] | None = None,
) -> Float[Array, "*B H N N"]:
    """Line 7 before the softmax: √(1/T)·(q·k/√C + b − ½·w·√(2/9P)·Σ|q⃗ − k⃗|²), with 1e5 subtracted at masked keys.

    T is the number of terms: 3, or 2 without a pair. The logits of a masked query stay as they are: it attends to all
    keys. In exact arithmetic AlphaFold's −1e5·(1 − m_i·m_j) gives the same attention, since it adds a constant to such
    a row; in floating point that constant would cost bits.
    """
    scalar = jnp.einsum("...ihc,...jhc->...hij", q, k, precision=Precision.HIGHEST) / math.sqrt(q.shape[-1])
    q_points, k_points = (jnp.swapaxes(x, -3, -4) for x in (q_points, k_points))
    offset = q_points[..., :, None, :, :] - k_points[..., None, :, :, :]
    distance2 = jnp.sum(offset * offset, (-1, -2))
    scale = point_weights * math.sqrt(2 / (9 * q_points.shape[-2]))
    logits = scalar - 0.5 * scale[:, None, None] * distance2
    if pair is not None and pair_bias_weight is not None:
        logits += jnp.einsum("...ijc,ch->...hij", pair, pair_bias_weight, precision=Precision.HIGHEST)  # line 4
    logits *= math.sqrt(1 / (2 if pair is None else 3))
    if mask is not None:
        logits -= 1e5 * (mask[..., :, None] * (1 - mask[..., None, :]))[..., None, :, :]
    return logits
