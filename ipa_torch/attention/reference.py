"""Algorithm 22, lines 4 and 7–10, as published (Jumper et al. 2021): holds all N×N×… intermediates in memory."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def point_attention(
    q: Float[Tensor, "*B N H C"],
    k: Float[Tensor, "*B N H C"],
    v: Float[Tensor, "*B N H Cv"],
    q_points: Float[Tensor, "*B N H P 3"],
    k_points: Float[Tensor, "*B N H P 3"],
    v_points: Float[Tensor, "*B N H Pv 3"],
    pair: Float[Tensor, "*B N N c_z"] | None,
    *,
    pair_bias_weight: Float[Tensor, "c_z H"] | None,
    point_weights: Float[Tensor, " H"],
    mask: Float[Tensor, "*B N"] | None = None,
    block_size: int | None = None,
    return_attention: bool = False,
) -> tuple[
    Float[Tensor, "*B N H Cv"],
    Float[Tensor, "*B N H Pv 3"],
    Float[Tensor, "*B N H c_z"] | None,
    Float[Tensor, "*B H N N"] | None,
]:
    """Outputs o, o_points, o_pair, and the attention or None. All tensors but `pair` have one dtype, at least float32.

    Raises:
        NotImplementedError: block_size is given, but this implementation has no blocks.
    """
    if block_size is not None:
        raise NotImplementedError(f"implementation 'reference' has no blocks: leave block_size None, got {block_size}")
    pair = None if pair is None else pair.to(q.dtype)
    logits = attention_logits(
        q, k, q_points, k_points, pair, pair_bias_weight=pair_bias_weight, point_weights=point_weights, mask=mask
    )
    attention = torch.softmax(logits, dim=-1)
    o = torch.einsum("...hij,...jhc->...ihc", attention, v)  # line 9
    o_points = torch.einsum("...hij,...jhpx->...ihpx", attention, v_points)  # line 10
    o_pair = None
    if pair is not None:
        o_pair = torch.einsum("...hij,...ijc->...ihc", attention, pair)  # line 8
    return o, o_points, o_pair, attention if return_attention else None


def attention_logits(
    q: Float[Tensor, "*B N H C"],
    k: Float[Tensor, "*B N H C"],
    q_points: Float[Tensor, "*B N H P 3"],
    k_points: Float[Tensor, "*B N H P 3"],
    pair: Float[Tensor, "*B N N c_z"] | None,
    *,
    pair_bias_weight: Float[Tensor, "c_z H"] | None,
    point_weights: Float[Tensor, " H"],
    mask: Float[Tensor, "*B N"] | None = None,
) -> Float[Tensor, "*B H N N"]:
    """Line 7 before the softmax: √(1/T)·(q·k/√C + b − ½·w·√(2/9P)·Σ|q⃗ − k⃗|²), with 1e5 subtracted at masked keys.

    T is the number of terms: 3, or 2 without a pair. The logits of a masked query stay as they are: it attends to all
    keys. In exact arithmetic AlphaFold's −1e5·(1 − m_i·m_j) gives the same attention, since it adds a constant to such
    a row; in floating point that constant would cost bits.
    """
    scalar = torch.einsum("...ihc,...jhc->...hij", q, k) / math.sqrt(q.shape[-1])
    q_points, k_points = (x.transpose(-3, -4) for x in (q_points, k_points))
    offset = q_points[..., :, None, :, :] - k_points[..., None, :, :, :]
    distance2 = torch.sum(offset * offset, (-1, -2))
    scale = point_weights * math.sqrt(2 / (9 * q_points.shape[-2]))
    logits = scalar - 0.5 * scale[:, None, None] * distance2
    if pair is not None and pair_bias_weight is not None:
        # One product per query row: the weight's gradient is then a sum of N sums of N terms. A single sum of N²
        # loses hundreds of eps in float64.
        weight_per_row = pair_bias_weight.expand(*pair.shape[:-2], *pair_bias_weight.shape)
        logits = logits + torch.einsum("...ijc,...ich->...hij", pair, weight_per_row)  # line 4
    logits = logits * math.sqrt(1 / (2 if pair is None else 3))
    if mask is not None:
        logits = logits - 1e5 * (mask[..., :, None] * (1 - mask[..., None, :]))[..., None, :, :]
    return logits
