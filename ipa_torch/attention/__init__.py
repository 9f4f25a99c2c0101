"""The parameter-free core of invariant point attention, and the choice of its implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ipa_bridge.checks import check_logits, check_masks, check_point_attention_inputs
from ipa_bridge.config import DistanceForm, Implementation
from ipa_torch.attention import fused, masks, reference, streamed
from ipa_torch.dtypes import at_least_float32, without_autocast

__all__ = ["IMPLEMENTATIONS", "STREAMED_FROM", "check_implementation", "choose_implementation", "point_attention"]

IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference.point_attention,
    "streamed": streamed.point_attention,
    "fused": fused.point_attention,
}
"""Implementations by name.

Each takes the arguments of `point_attention` except `implementation`, and raises for what it does not support.
"""

STREAMED_FROM = 96
"""Number of residues from which implementation=None streams. Below it, the reference is as fast or faster, in little
memory."""


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
    mask: Shaped[Tensor, "*B N"] | None = None,
    key_mask: Shaped[Tensor, "*B N"] | None = None,
    pair_mask: Shaped[Tensor, "*B N N"] | None = None,
    logit_terms: int | None = None,
    distance_form: DistanceForm = "squared",
    distance_epsilon: float = 0.0,
    implementation: Implementation | None = None,
    block_size: int | None = None,
    return_attention: bool = False,
) -> tuple[Any, ...]:
    """Attention over residues and their points (Jumper et al. 2021, Suppl. Alg. 22, lines 4 and 7–10).

    Computes in the widest of the inputs' dtypes, and in at least float32, also under autocast.

    Args:
        q: scalar queries, not yet scaled by 1/√C.
        k: scalar keys.
        v: scalar values.
        q_points: query points in the global frame, in the unit the point weights were trained for.
        k_points: key points in the global frame.
        v_points: value points in the global frame.
        pair: pair representation, which biases the logits and is averaged into o_pair; None to attend without it.
        pair_bias_weight: weight that projects the pair to one bias per head; None for no bias. The projection's own
            bias would cancel in the softmax.
        point_weights: w_h, in AlphaFold softplus(γ_h), not yet scaled by √(2/9P).
        mask: 1 or True where a residue is valid. A valid query ignores masked keys; a masked query attends to all.
            All masks are constants: the gradient to a float mask is zero.
        key_mask: 1 or True where a residue may be attended to. It holds for masked queries too.
        pair_mask: 1 or True where query i may attend to key j. A key that key_mask or pair_mask hides has a weight of
            exactly zero. A query from which all keys are hidden gets zeros.
        logit_terms: T in the scale √(1/T) of the logits; None for 3 with a pair and 2 without.
        distance_form: "squared" for |q − k|² in the logits, "unsquared" for √(|q − k|² + distance_epsilon).
        distance_epsilon: ε ≥ 0 of unsquared distances. If it is 0, the gradient is zero where two points coincide.
        implementation: one of `IMPLEMENTATIONS`; for None see `choose_implementation`.
        block_size: number of query rows computed at a time, for implementations that work in blocks; None for a size
            that suits N.
        return_attention: also return the attention weights, (*B, H, N, N).

    Returns:
        o (*B, N, H, Cv); o_points (*B, N, H, Pv, 3) in the global frame; o_pair (*B, N, H, c_z), None without a
        pair; and, with return_attention, the attention weights. o and o_pair have the dtype of v, o_points that of
        v_points.

    Raises:
        ValueError: shapes do not fit, the implementation or the distance_form is unknown, distance_epsilon is negative
            or given for squared distances, or block_size or logit_terms is below 1.
        NotImplementedError: the implementation does not support these arguments, this device or this derivative.
    """
    check_point_attention_inputs(q, k, v, q_points, k_points, v_points, pair, pair_bias_weight, point_weights, mask)
    check_masks(tuple(q.shape[:-2]), key_mask, pair_mask)
    if not torch.compiler.is_compiling():  # there a number that differs between layers is symbolic
        check_logits(logit_terms, distance_form, distance_epsilon)
    attend = choose_implementation(implementation, q.shape[-3], block_size=block_size)
    arrays = (q, k, v, q_points, k_points, v_points)
    dtype = at_least_float32(*(x.dtype for x in arrays), *(() if pair is None else (pair.dtype,)))
    mask = None if mask is None else mask.detach().to(dtype)
    allowed = masks.combine(key_mask, pair_mask, dtype)
    with without_autocast(q.device.type):
        o, o_points, o_pair, attention = attend(
            *(x.to(dtype) for x in arrays),
            pair,
            pair_bias_weight=None if pair_bias_weight is None else pair_bias_weight.to(dtype),
            point_weights=point_weights.to(dtype),
            mask=mask,
            allowed=allowed,
            logit_terms=logit_terms or (2 if pair is None else 3),
            distance_epsilon=distance_epsilon if distance_form == "unsquared" else None,
            block_size=block_size,
            return_attention=return_attention,
        )
        if allowed is not None:  # rows without keys hold what is finite and means nothing
            some = masks.sees_any(allowed, mask)[..., None, None]
            o, o_points = some * o, some[..., None] * o_points
            o_pair = None if o_pair is None else some * o_pair
            attention = None if attention is None else some.transpose(-3, -2) * attention
    o_pair = None if o_pair is None else o_pair.to(v.dtype)
    outputs = (o.to(v.dtype), o_points.to(v_points.dtype), o_pair)
    return (*outputs, attention) if return_attention else outputs


def check_implementation(implementation: str | None) -> None:
    """Checks that the argument is the name of an implementation, or None.

    Raises:
        ValueError: no implementation has this name.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")


def choose_implementation(
    implementation: Implementation | None, number: int, *, block_size: int | None = None
) -> Callable:
    """Attention function for an implementation's name and a number of residues.

    None stands for "streamed" if block_size is given or there are at least `STREAMED_FROM` residues, else for
    "reference". Under `torch.compile` and `torch.export` it always stands for "streamed", so that no length needs a
    second compilation.

    Only "reference" has forward-mode derivatives and derivatives of derivatives: name it where you need them. None
    never stands for "fused", whose kernels have not been measured on a GPU yet.

    Raises:
        ValueError: no implementation has this name.
    """
    check_implementation(implementation)
    streams = block_size is not None or torch.compiler.is_compiling() or number >= STREAMED_FROM
    name = implementation or ("streamed" if streams else "reference")
    return IMPLEMENTATIONS[name]
