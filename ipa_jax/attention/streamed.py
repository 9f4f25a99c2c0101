"""The same attention as the reference, computed one block of query rows at a time.

Apart from the pair and its gradient, no N×N array is held. Softmax runs over whole rows, so nothing is approximated.
Backward computes each block's attention again.

Squared distances do not suffer from cancellation: they are sums of squared differences.

Forward mode raises an error: use the reference. Derivatives of derivatives work in reverse mode, but take as much
memory as with the reference.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ipa_bridge.tiling import default_block_size
from ipa_jax.attention.derivatives import in_reverse_mode_only, instantiate
from ipa_jax.attention.operands import Operands, number_of_examples, over_batch, unpack
from ipa_jax.attention.rows import BLOCK_BYTES, Blocks, RowGradients, Rows, einsum, gradients_by_rows
from ipa_jax.dtypes import varying_alike


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
    allowed: Float[Array, "*B Q N"] | None = None,
    logit_terms: int,
    distance_epsilon: float | None = None,
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
        ValueError: block_size is below 1.
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, or None for a size that suits N; got {block_size}")
    arrays = (q, k, v, q_points, k_points, v_points, pair, pair_bias_weight, point_weights, mask, allowed)
    operands = Operands.from_inputs(*arrays, logit_terms)
    *batch, number, heads, _ = q.shape
    size = block_size
    if size is None:
        width, on_gpu = 0 if pair is None else pair.shape[-1], jax.default_backend() == "gpu"
        size = default_block_size(number, heads, width, block_bytes=BLOCK_BYTES, on_gpu=on_gpu)
        size //= number_of_examples(batch)
    size = max(1, min(size, number))
    o, o_pair, attention = over_batch(
        partial(_attend, Options(size, return_attention, distance_epsilon)), operands, len(batch)
    )
    return *unpack(o, v, v_points), o_pair, attention


class Options(NamedTuple):
    """Settings that are known when JAX compiles."""

    block_size: int
    with_attention: bool
    distance_epsilon: float | None


@partial(jax.jit, static_argnums=0)
def _attend(options: Options, operands: Operands) -> tuple[Any, Any, Any]:
    """One example's o (H, N, Cv); o_pair (N, H, c_z) and attention (H, N, N), or None.

    Always compiled: outside `jax.jit`, `jax.shard_map` does not support symbolic zeros.
    """
    return _attend_by_rows(options, varying_alike(operands))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_by_rows(options: Options, operands: Operands) -> tuple[Any, Any, Any]:
    """`_attend` of operands that vary over the same axes of `jax.shard_map`."""
    heads, number, _ = operands.queries.shape
    zeros = partial(jnp.zeros_like, operands.values)
    room: tuple[Any, Any, Any] = (
        zeros(),
        None if operands.pair is None else zeros(shape=(number, heads, operands.pair.shape[-1])),
        zeros(shape=(heads, number, number)) if options.with_attention else None,
    )
    blocks = Blocks(operands, options.distance_epsilon)

    def block(outputs: tuple[Any, Any, Any], start: Array) -> tuple[tuple[Any, Any, Any], None]:
        o, o_pair, attention = outputs
        rows = Rows(start, options.block_size)
        pair_rows = blocks.pair_rows(rows)
        weight, _ = blocks.attention(rows, blocks.bias_logits(pair_rows))
        o = rows.write(o, einsum("hij,hjc->hic", weight, operands.values), 1)
        if pair_rows is not None:
            o_pair = rows.write(o_pair, einsum("hij,ijc->ihc", weight, pair_rows), 0)
        if options.with_attention:
            attention = rows.write(attention, weight, 1)
        return (o, o_pair, attention), None

    return jax.lax.scan(block, room, blocks.rows(options.block_size))[0] if number else room


def _attend_forward(options: Options, primals: Any) -> tuple[tuple[Any, Any, Any], Any]:
    operands = jax.tree.map(lambda x: x.value, primals, is_leaf=lambda x: hasattr(x, "perturbed"))
    # Residuals hold arrays only, so a flag must be part of their structure: () if the pair needs a gradient, else None.
    wanted = () if primals.pair is not None and primals.pair.perturbed else None
    outputs = _attend_by_rows(options, jax.tree.map(in_reverse_mode_only, operands))
    return outputs, (operands, wanted)


def _attend_backward(options: Options, residuals: Any, cotangents: Any) -> tuple[Operands]:
    operands, wanted = residuals
    number = operands.queries.shape[1]
    d_o, d_o_pair, d_attention = (instantiate(x) for x in cotangents)
    if not number:
        return (jax.tree.map(jnp.zeros_like, operands),)
    blocks = Blocks(operands, options.distance_epsilon)

    def block(rows: Rows, gradients: Operands) -> RowGradients:
        fresh = rows.fresh(number, d_o.dtype)
        pair_rows = blocks.pair_rows(rows)
        rows_d_o = rows.read(d_o, 1) * fresh[:, None]
        d_weight = einsum("hic,hcj->hij", rows_d_o, blocks.values)
        if pair_rows is None:
            weight, distance = blocks.attention(rows, None)
        else:
            # One product of [W_bᵀ; dO_pair] with each row's pair gives the bias and the gradient to the attention.
            on_pair = blocks.beside_bias(rows.read(d_o_pair, 0) * fresh[:, None, None])
            both = jnp.transpose(einsum("ihc,ijc->ijh", on_pair, pair_rows), (2, 0, 1))
            d_weight += both[-len(d_weight) :]
            weight, distance = blocks.attention(rows, None if operands.bias is None else both[: len(d_weight)])
        if d_attention is not None:
            d_weight += rows.read(d_attention, 1) * fresh[:, None]
        # Without barriers XLA would compute these again in each of the many sums that read them.
        weight, distance = jax.lax.optimization_barrier((weight, distance))
        d_logits = jax.lax.optimization_barrier(weight * (d_weight - jnp.sum(weight * d_weight, -1, keepdims=True)))
        d_pair, d_bias = gradients.pair, gradients.bias
        if pair_rows is not None and d_bias is not None:
            d_bias += jnp.sum(einsum("hij,ijc->ihc", d_logits, pair_rows), 0)
        if pair_rows is not None and d_pair is not None:
            # [dL; P]ᵀ [W_bᵀ; dO_pair], again in one product; L: logits, P: attention.
            to_pair = [jnp.transpose(x, (1, 2, 0)) for x in ([] if d_bias is None else [d_logits]) + [weight]]
            rows_d_pair = einsum("ijh,ihc->ijc", jnp.concatenate(to_pair, -1), on_pair)
            d_pair = rows.write(d_pair, rows_d_pair.astype(d_pair.dtype), 0)
        return RowGradients(weight, d_logits, distance, rows_d_o, d_pair, d_bias)

    return gradients_by_rows(blocks, options.block_size, wanted, block)


_attend_by_rows.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
