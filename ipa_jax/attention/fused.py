"""The same attention as `streamed`, in GPU kernels that read the pair once forward and once backward.

Pallas kernels (`ipa_jax.attention.kernels`) do the work that reads the pair; XLA does the rest. They exchange the
logits of one chunk of query rows, which stay in the GPU's cache. Apart from the pair and its gradient, no N×N array is
held. Arithmetic is in float32.
"""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ipa_bridge.tiling import Sizes, chunks, unsupported
from ipa_jax.attention.derivatives import in_reverse_mode_only, instantiate
from ipa_jax.attention.operands import Operands, number_of_examples, over_batch, unpack
from ipa_jax.attention.rows import Blocks, RowGradients, Rows, einsum, gradients_by_rows
from ipa_jax.dtypes import varying_alike

INTERPRETED = False
"""If True, Pallas interprets the kernels, on any device. For tests only."""


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
    None,
]:
    """Outputs o, o_points and o_pair, and None in place of the attention; all arrays but `pair` are float32.

    Raises:
        NotImplementedError: the kernels do not support these arguments or this device; the message gives the reason.
    """
    if block_size is not None:
        raise NotImplementedError(f"implementation 'fused' has no blocks: leave block_size None, got {block_size}")
    if return_attention:
        raise NotImplementedError("implementation 'fused' cannot return the attention; implementation='streamed' can")
    *batch, number, heads, channels = q.shape
    coordinates, values = 3 * q_points.shape[-2], v.shape[-1] + 3 * v_points.shape[-2]
    width = 0 if pair is None else pair.shape[-1]
    sizes = Sizes(1, number, heads, channels, coordinates, values, width)
    reason = unsupported(sizes, q.dtype.name, None if pair is None else pair.dtype.name) or _no_place_to_run()
    if reason:
        raise NotImplementedError(f"implementation='fused': {reason}; implementation='streamed' has no such limit")
    arrays = (q, k, v, q_points, k_points, v_points, pair, pair_bias_weight, point_weights, mask, allowed)
    operands = Operands.from_inputs(*arrays, logit_terms)
    if pair is not None and pair_bias_weight is None:
        operands = operands._replace(bias=jnp.zeros((width, heads), q.dtype))
    size = next((max(1, chunk.rows // number_of_examples(batch)) for chunk in chunks(sizes)), 1)
    if any(isinstance(length, int) and not length for length in batch):  # no kernel runs on an empty batch
        o = jnp.zeros_like(operands.values)
        o_pair = None if pair is None else jnp.zeros((*q.shape[:-1], width), q.dtype)
    else:
        o, o_pair, _ = over_batch(partial(_attend, Options(size, INTERPRETED, distance_epsilon)), operands, len(batch))
    return *unpack(o, v, v_points), o_pair, None


def _no_place_to_run() -> str | None:
    """Reason why the kernels cannot run here, or None if they can."""
    device = jax.default_backend()
    return None if INTERPRETED or device == "gpu" else f"a CUDA device was expected as JAX's default; got {device}"


def _kernels() -> ModuleType:
    """The module of the kernels, imported here because it imports Pallas."""
    return importlib.import_module("ipa_jax.attention.kernels")


class Options(NamedTuple):
    """Settings that are known when JAX compiles."""

    size: int
    """Query rows of a chunk."""
    interpret: bool
    distance_epsilon: float | None


@partial(jax.jit, static_argnums=0)
def _attend(options: Options, operands: Operands) -> tuple[Any, Any, Any]:
    """One example's o (H, N, Cv), o_pair (N, H, c_z) or None, and log Σ exp of the logits (H, N)."""
    return _attend_by_rows(options, varying_alike(operands))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_by_rows(options: Options, operands: Operands) -> tuple[Any, Any, Any]:
    """`_attend` of operands that vary over the same axes of `jax.shard_map`."""
    heads, number, _ = operands.queries.shape
    zeros = partial(jnp.zeros_like, operands.values)
    room: tuple[Any, Any, Any] = (
        zeros(),
        None if operands.pair is None else zeros(shape=(number, heads, operands.pair.shape[-1])),
        zeros(shape=(heads, number)),
    )
    blocks, kernels = Blocks(operands, options.distance_epsilon), _kernels()

    def chunk(outputs: tuple[Any, Any, Any], start: Array) -> tuple[tuple[Any, Any, Any], None]:
        o, o_pair, lse = outputs
        rows = Rows(start, options.size)
        logits, _ = blocks.logits(rows, None)
        if operands.pair is None:
            rows_lse = jax.nn.logsumexp(logits, -1)
        else:
            logits, rows_lse, rows_o_pair = kernels.attend_to_pair(operands, logits, start, interpret=options.interpret)
            o_pair = rows.write(o_pair, rows_o_pair, 0)
        weight = jnp.exp(logits - rows_lse[..., None])
        o = rows.write(o, einsum("hij,hjc->hic", weight, operands.values), 1)
        return (o, o_pair, rows.write(lse, rows_lse, 1)), None

    return jax.lax.scan(chunk, room, blocks.rows(options.size))[0] if number else room


def _attend_forward(options: Options, primals: Any) -> tuple[tuple[Any, Any, Any], Any]:
    operands = jax.tree.map(lambda x: x.value, primals, is_leaf=lambda x: hasattr(x, "perturbed"))
    # Residuals hold arrays only, so a flag must be part of their structure: () if the pair needs a gradient, else None.
    wanted = () if primals.pair is not None and primals.pair.perturbed else None
    outputs = _attend_by_rows(options, jax.tree.map(in_reverse_mode_only, operands))
    return outputs, (operands, outputs, wanted)


def _attend_backward(options: Options, residuals: Any, cotangents: Any) -> tuple[Operands]:
    (operands, (o, o_pair, lse)), wanted = jax.tree.map(_differentiated_once, residuals[:2]), residuals[2]
    number = operands.queries.shape[1]
    if not number:
        return (jax.tree.map(jnp.zeros_like, operands),)
    d_o, d_o_pair, _ = jax.tree.map(_differentiated_once, [instantiate(x) for x in cotangents])
    blocks, kernels = Blocks(operands, options.distance_epsilon), _kernels()

    def chunk(rows: Rows, gradients: Operands) -> RowGradients:
        fresh = rows.fresh(number, d_o.dtype)
        logits, distance = blocks.logits(rows, None)
        rows_d_o, rows_lse = rows.read(d_o, 1) * fresh[:, None], rows.read(lse, 1)
        d_weight = einsum("hic,hcj->hij", rows_d_o, blocks.values)
        delta = jnp.sum(rows_d_o * rows.read(o, 1), -1)
        d_pair, d_bias = gradients.pair, gradients.bias
        if operands.pair is None:
            weight = jnp.exp(logits - rows_lse[..., None])
            d_logits = weight * (d_weight - delta[..., None])
        else:
            rows_d_o_pair = rows.read(d_o_pair, 0) * fresh[:, None, None]
            delta += jnp.sum(rows_d_o_pair * rows.read(o_pair, 0), -1).T
            d_logits, weight, d_pair, rows_d_bias = kernels.pair_gradients(
                operands,
                logits,
                d_weight,
                rows_d_o_pair,
                rows_lse,
                delta,
                d_pair,
                rows.start,
                interpret=options.interpret,
            )
            d_bias = None if d_bias is None else d_bias + rows_d_bias
        # Without barriers XLA would compute these again in each of the many sums that read them.
        weight, distance, d_logits = jax.lax.optimization_barrier((weight, distance, d_logits))
        return RowGradients(weight, d_logits, distance, rows_d_o, d_pair, d_bias)

    return gradients_by_rows(blocks, options.size, wanted, chunk)


_attend_by_rows.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


@jax.custom_jvp
def _differentiated_once(x: Array) -> Array:
    """The same array, whose derivative raises NotImplementedError."""
    return x


@_differentiated_once.defjvp
def _(*_: Any) -> Any:
    raise NotImplementedError(
        "this implementation has first derivatives only; implementation='reference' has all others"
    )
