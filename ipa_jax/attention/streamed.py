"""The reference's function, a block of query rows at a time: nothing of N×N but the pair, its gradient and a block.

Softmax runs over whole rows, so nothing is approximated; backward computes each block's attention anew. Squared
distances lose nothing to cancellation: they are sums of squared differences.

Forward-mode and higher derivatives are refused: the reference has them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

BLOCK_BYTES = 32 << 20
"""Of the arrays of rows × N × heads that one block has, about four at a time."""

ONLY_REVERSE_MODE = (
    "implementation='streamed' has first derivatives in reverse mode only; implementation='reference' has all others"
)


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
    """Outputs, and attention weights if asked for; all arrays but `pair` in one dtype of at least float32."""
    *batch, number, heads, _ = q.shape
    num_v = v.shape[-1]
    temperature = math.sqrt(1 / (2 if pair is None else 3))
    inputs = _Inputs(
        queries=_heads_first(q * (temperature / math.sqrt(q.shape[-1]))),
        keys=_heads_first(k),
        values=_heads_first(jnp.concatenate([v, _flat(v_points)], -1)),
        query_points=_heads_first(_flat(q_points)),
        key_points=_heads_first(_flat(k_points)),
        pair=pair,
        mask=jnp.ones(q.shape[:-2], q.dtype) if mask is None else jnp.broadcast_to(mask, q.shape[:-2]),
        weights=point_weights * (temperature * math.sqrt(2 / (9 * q_points.shape[-2]))),
        bias=None if pair is None or pair_bias_weight is None else pair_bias_weight * temperature,
    )
    width = 0 if pair is None else pair.shape[-1]
    size = min(block_size or default_block_size(number, heads, width), max(number, 1))
    attend = partial(_attend, size, return_attention)
    axes = jax.tree.map(lambda _: 0, inputs)._replace(weights=None, bias=None)
    for _ in batch:
        attend = jax.vmap(attend, (axes,))
    try:
        o, o_pair, attention = attend(inputs)
    except TypeError as error:
        if "forward-mode" in str(error):
            raise NotImplementedError(ONLY_REVERSE_MODE) from error
        raise
    o = jnp.swapaxes(o, -2, -3)
    o_points = o[..., num_v:].reshape(*batch, number, heads, v_points.shape[-2], 3)
    return o[..., :num_v], o_points, o_pair, attention


def default_block_size(number: int, heads: int, pair_channel: int) -> int:
    """Query rows at a time: as many as fit in `BLOCK_BYTES`, for under XLA few large blocks run faster than many."""
    return max(1, min(number, BLOCK_BYTES // max(1, 16 * number * heads)))


class _Inputs(NamedTuple):
    """One example's, scaled: logits are queries·keys − ½ weights·|query_points − key_points|² + pair·bias."""

    queries: Float[Array, "H N C"]
    keys: Float[Array, "H N C"]
    values: Float[Array, "H N Cv"]
    query_points: Float[Array, "H N 3P"]
    key_points: Float[Array, "H N 3P"]
    pair: Float[Array, "N N c_z"] | None
    """In any dtype."""
    mask: Float[Array, " N"]
    weights: Float[Array, " H"]
    bias: Float[Array, "c_z H"] | None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(block_size: int, with_attention: bool, inputs: _Inputs) -> tuple[Any, Any, Any]:
    """One example's o (H, N, Cv); o_pair (N, H, c_z) and attention (H, N, N), or None."""
    heads, number, _ = inputs.queries.shape
    room: tuple[Any, Any, Any] = (
        jnp.zeros_like(inputs.values),
        None if inputs.pair is None else jnp.zeros((number, heads, inputs.pair.shape[-1]), inputs.queries.dtype),
        jnp.zeros((heads, number, number), inputs.queries.dtype) if with_attention else None,
    )

    def block(outputs: tuple[Any, Any, Any], start: Array) -> tuple[tuple[Any, Any, Any], None]:
        o, o_pair, attention = outputs
        rows = _Rows(start, block_size)
        pair = rows.of_pair(inputs)
        weight = _attention(inputs, rows, None if pair is None else _bias(inputs, pair))
        o = rows.write(o, _einsum("hij,hjc->hic", weight, inputs.values), 1)
        if pair is not None:
            o_pair = rows.write(o_pair, _einsum("hij,ijc->ihc", weight, pair), 0)
        if with_attention:
            attention = rows.write(attention, weight, 1)
        return (o, o_pair, attention), None

    return jax.lax.scan(block, room, _starts(number, block_size))[0] if number else room


def _attend_forward(block_size: int, with_attention: bool, primals: Any) -> tuple[tuple[Any, Any, Any], Any]:
    inputs = jax.tree.map(lambda x: x.value, primals, is_leaf=lambda x: hasattr(x, "perturbed"))
    # Whether the pair wants a gradient, told by structure: residuals are arrays.
    wanted = () if primals.pair is not None and primals.pair.perturbed else None
    return _attend(block_size, with_attention, inputs), (inputs, wanted)


def _attend_backward(block_size: int, with_attention: bool, residuals: Any, cotangents: Any) -> tuple[_Inputs]:
    inputs, wanted = residuals
    number = inputs.queries.shape[1]
    d_o, d_o_pair, d_attention = (_instantiate(x) for x in cotangents)
    room = jax.tree.map(jnp.zeros_like, inputs)
    room = room._replace(pair=None if wanted is None else room.pair)
    if not number:
        return (jax.tree.map(jnp.zeros_like, inputs),)

    def block(gradients: _Inputs, start: Array) -> tuple[_Inputs, None]:
        rows = _Rows(start, block_size)
        fresh = rows.fresh(number, d_o.dtype)
        pair = rows.of_pair(inputs)
        weight = _attention(inputs, rows, None if pair is None else _bias(inputs, pair))
        rows_d_o = rows.read(d_o, 1) * fresh[:, None]
        d_logits = _einsum("hic,hjc->hij", rows_d_o, inputs.values)
        rows_d_o_pair = None
        if pair is not None:
            rows_d_o_pair = rows.read(d_o_pair, 0) * fresh[:, None, None]
            d_logits += _einsum("ihc,ijc->hij", rows_d_o_pair, pair)
        if d_attention is not None:
            d_logits += rows.read(d_attention, 1) * fresh[:, None]
        d_logits = weight * (d_logits - jnp.sum(weight * d_logits, -1, keepdims=True))
        queries = rows.read(inputs.queries, 1)
        d_query_points, d_key_points, d_weights = _point_gradients(inputs, rows, d_logits)
        d_pair, d_bias = gradients.pair, gradients.bias
        if pair is not None and d_bias is not None:
            d_bias += _einsum("hij,ijc->ch", d_logits, pair)
        if pair is not None and d_pair is not None:
            rows_d_pair = _einsum("hij,ihc->ijc", weight, cast(Array, rows_d_o_pair))
            if inputs.bias is not None:
                rows_d_pair += _einsum("hij,ch->ijc", d_logits, inputs.bias)
            d_pair = rows.write(d_pair, rows_d_pair.astype(d_pair.dtype), 0)
        return gradients._replace(
            queries=rows.write(gradients.queries, _einsum("hij,hjc->hic", d_logits, inputs.keys), 1),
            keys=gradients.keys + _einsum("hij,hic->hjc", d_logits, queries),
            values=gradients.values + _einsum("hij,hic->hjc", weight, rows_d_o),
            query_points=rows.write(gradients.query_points, d_query_points, 1),
            key_points=gradients.key_points + d_key_points,
            weights=gradients.weights + d_weights,
            pair=d_pair,
            bias=d_bias,
        ), None

    gradients = jax.lax.scan(block, room, _starts(number, block_size))[0]
    if inputs.pair is not None and wanted is None:
        gradients = gradients._replace(pair=jnp.zeros_like(inputs.pair))
    return (gradients,)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


class _Rows(NamedTuple):
    """A block of query rows."""

    start: Array
    size: int

    def read(self, x: Array, axis: int) -> Array:
        """The rows of an array."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis)

    def write(self, x: Array, rows: Array, axis: int) -> Array:
        """The array with these rows."""
        return jax.lax.dynamic_update_slice_in_dim(x, rows, self.start, axis)

    def of_pair(self, inputs: _Inputs) -> Float[Array, "b N c_z"] | None:
        """The pair's rows in the dtype of the arithmetic."""
        return None if inputs.pair is None else self.read(inputs.pair, 0).astype(inputs.queries.dtype)

    def fresh(self, number: int, dtype: Any) -> Float[Array, " b"]:
        """1 for rows that no later block computes again: the last block comes first, and reaches back to its size."""
        whole = number // self.size * self.size
        again = (self.start % self.size != 0) & (self.start + jnp.arange(self.size) < whole)
        return 1 - again.astype(dtype)


def _starts(number: int, block_size: int) -> Array:
    """First rows of the blocks; one that would reach over the end starts earlier, and comes first."""
    starts = list(range(0, number - block_size + 1, block_size))
    return jnp.asarray(([number - block_size] if number % block_size else []) + starts)


def _bias(inputs: _Inputs, pair: Float[Array, "b N c_z"]) -> Float[Array, "H b N"] | None:
    return None if inputs.bias is None else _einsum("ijc,ch->hij", pair, inputs.bias)


def _attention(inputs: _Inputs, rows: _Rows, bias: Float[Array, "H b N"] | None) -> Float[Array, "H b N"]:
    logits = _einsum("hic,hjc->hij", rows.read(inputs.queries, 1), inputs.keys)
    distance2 = sum(offset * offset for offset in _offsets(inputs, rows))
    logits -= 0.5 * inputs.weights[:, None, None] * distance2
    if bias is not None:
        logits += bias
    return jax.nn.softmax(logits - 1e5 * rows.read(inputs.mask, 0)[:, None] * (1 - inputs.mask), -1)


def _offsets(inputs: _Inputs, rows: _Rows) -> list[Float[Array, "H b N"]]:
    """Differences q − k, coordinate by coordinate."""
    queries, keys = rows.read(inputs.query_points, 1), inputs.key_points
    return [queries[..., i, None] - keys[:, None, :, i] for i in range(keys.shape[-1])]


def _point_gradients(
    inputs: _Inputs, rows: _Rows, d_logits: Float[Array, "H b N"]
) -> tuple[Float[Array, "H b 3P"], Float[Array, "H N 3P"], Float[Array, " H"]]:
    """To query points, key points and weights, by ∂L/∂q = −w·(q − k)."""
    moved = [d_logits * offset for offset in _offsets(inputs, rows)]
    weights = inputs.weights[:, None, None]
    d_queries = -weights * jnp.stack([jnp.sum(x, -1) for x in moved], -1)
    d_keys = weights * jnp.stack([jnp.sum(x, -2) for x in moved], -1)
    stretched = [jnp.sum(x * offset, (-1, -2)) for x, offset in zip(moved, _offsets(inputs, rows), strict=True)]
    d_weights = -0.5 * sum(stretched[1:], stretched[0])
    return d_queries, d_keys, d_weights


def _einsum(subscripts: str, *arrays: Array) -> Array:
    return jnp.einsum(subscripts, *arrays, precision=Precision.HIGHEST)


def _heads_first(x: Float[Array, "*B N H D"]) -> Float[Array, "*B H N D"]:
    return jnp.swapaxes(x, -2, -3)


def _flat(points: Float[Array, "*B N H P 3"]) -> Float[Array, "*B N H 3P"]:
    return points.reshape(*points.shape[:-2], 3 * points.shape[-2])


def _instantiate(x: Any) -> Any:
    """A cotangent as an array, zeros where it is known to be zero; None where there is no output."""
    if not isinstance(x, jax.custom_derivatives.SymbolicZero):
        return x
    aval: Any = x.aval
    return jnp.zeros(aval.shape, aval.dtype)
