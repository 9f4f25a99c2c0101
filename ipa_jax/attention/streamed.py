"""The reference's function, a block of query rows at a time: nothing of N×N but the pair, its gradient and a block.

Softmax runs over whole rows, so nothing is approximated; backward computes each block's attention anew. Squared
distances lose nothing to cancellation: they are sums of squared differences.

Forward mode is refused: the reference has it. So does it have derivatives of derivatives; in reverse mode this one has
them too, but they hold as much in memory as the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.lax import Precision
from jaxtyping import Array, Float

from ipa_bridge.kernels import CHUNK_BYTES
from ipa_jax.dtypes import varying_alike

BLOCK_BYTES = 4 << 20
"""Of the pair in one block; between 2 and 8 MB the optimum is flat, where a block stays in cache."""

MOST_ROWS = 64
"""Of a block, where the pair's rows are short."""

LANES = 8
"""XLA's products on CPU run at their full rate where the last axis of their output is a multiple of this."""

ONLY_REVERSE_MODE = (
    "this implementation has derivatives in reverse mode only; implementation='reference' has all others"
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
    inputs = Inputs.of(q, k, v, q_points, k_points, v_points, pair, pair_bias_weight, point_weights, mask)
    width = 0 if pair is None else pair.shape[-1]
    on_gpu = jax.default_backend() == "gpu"
    size = block_size or default_block_size(number, heads, width, on_gpu=on_gpu) // number_of_examples(batch)
    size = max(1, min(size, number))
    o, o_pair, attention = over_batch(partial(_attend, size, return_attention), inputs, len(batch))
    return *unpacked(o, v, v_points), o_pair, attention


def number_of_examples(batch: Sequence[Any]) -> int:
    """The product of the batch axes, at least 1; an axis whose length `jax.export` leaves open counts as 1."""
    return max(1, math.prod(length for length in batch if isinstance(length, int)))


def over_batch(attend: Callable, inputs: Inputs, axes: int) -> tuple[Any, Any, Any]:
    """One example's function on all of them.

    Raises:
        NotImplementedError: it is asked for a forward-mode derivative; under `jax.jit` this raises when JAX compiles.
    """
    batched = jax.tree.map(lambda _: 0, inputs)._replace(weights=None, bias=None)
    for _ in range(axes):
        attend = jax.vmap(attend, (batched,))
    return attend(jax.tree.map(in_reverse_mode_only, inputs))


def unpacked(
    o: Float[Array, "*B H N C"], v: Float[Array, "*B N H Cv"], v_points: Float[Array, "*B N H Pv 3"]
) -> tuple[Float[Array, "*B N H Cv"], Float[Array, "*B N H Pv 3"]]:
    """The values' part of an output and the points' part, in their shapes."""
    o = jnp.swapaxes(o, -2, -3)
    return o[..., : v.shape[-1]], o[..., v.shape[-1] :].reshape(v_points.shape)


def default_block_size(number: int, heads: int, pair_channel: int, *, on_gpu: bool = False) -> int:
    """Query rows at a time, so that their part of the pair stays in cache; on a GPU, that their logits do.

    There blocks are as large as that and an eighth of the pair allow, for each costs the same number of launches.
    """
    if on_gpu:
        return max(1, min(number, max(MOST_ROWS, number // 8), CHUNK_BYTES // max(1, 4 * heads * number)))
    return max(1, min(number, MOST_ROWS, BLOCK_BYTES // max(1, 4 * number * max(pair_channel, 1))))


class Inputs(NamedTuple):
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

    @classmethod
    def of(
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
    ) -> Inputs:
        """Of all examples, batch axes first."""
        temperature = math.sqrt(1 / (2 if pair is None else 3))
        return cls(
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


@partial(jax.jit, static_argnums=(0, 1))
def _attend(block_size: int, with_attention: bool, inputs: Inputs) -> tuple[Any, Any, Any]:
    """One example's o (H, N, Cv); o_pair (N, H, c_z) and attention (H, N, N), or None.

    Compiled as a whole, outside `jax.jit` too: there `jax.shard_map` knows no symbolic zeros.
    """
    return _attend_by_rows(block_size, with_attention, varying_alike(inputs))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_by_rows(block_size: int, with_attention: bool, inputs: Inputs) -> tuple[Any, Any, Any]:
    """`_attend` of inputs that vary alike."""
    heads, number, _ = inputs.queries.shape
    zeros = partial(jnp.zeros_like, inputs.values)
    room: tuple[Any, Any, Any] = (
        zeros(),
        None if inputs.pair is None else zeros(shape=(number, heads, inputs.pair.shape[-1])),
        zeros(shape=(heads, number, number)) if with_attention else None,
    )
    keys = Keys.of(inputs)

    def block(outputs: tuple[Any, Any, Any], start: Array) -> tuple[tuple[Any, Any, Any], None]:
        o, o_pair, attention = outputs
        rows = Rows(start, block_size)
        pair = rows.of_pair(inputs)
        weight, _ = _attention_and_distance2(inputs, keys, rows, _bias(inputs, pair))
        o = rows.write(o, einsum("hij,hjc->hic", weight, inputs.values), 1)
        if pair is not None:
            o_pair = rows.write(o_pair, einsum("hij,ijc->ihc", weight, pair), 0)
        if with_attention:
            attention = rows.write(attention, weight, 1)
        return (o, o_pair, attention), None

    return jax.lax.scan(block, room, starts(number, block_size))[0] if number else room


def _attend_forward(block_size: int, with_attention: bool, primals: Any) -> tuple[tuple[Any, Any, Any], Any]:
    inputs = jax.tree.map(lambda x: x.value, primals, is_leaf=lambda x: hasattr(x, "perturbed"))
    # Whether the pair wants a gradient, told by structure: residuals are arrays.
    wanted = () if primals.pair is not None and primals.pair.perturbed else None
    outputs = _attend_by_rows(block_size, with_attention, jax.tree.map(in_reverse_mode_only, inputs))
    return outputs, (inputs, wanted)


def _attend_backward(block_size: int, with_attention: bool, residuals: Any, cotangents: Any) -> tuple[Inputs]:
    inputs, wanted = residuals
    number = inputs.queries.shape[1]
    d_o, d_o_pair, d_attention = (instantiate(x) for x in cotangents)
    if not number:
        return (jax.tree.map(jnp.zeros_like, inputs),)
    keys = Keys.of(inputs)

    def block(rows: Rows, gradients: Inputs) -> RowGradients:
        fresh = rows.fresh(number, d_o.dtype)
        pair = rows.of_pair(inputs)
        rows_d_o = rows.read(d_o, 1) * fresh[:, None]
        d_weight = einsum("hic,hcj->hij", rows_d_o, keys.values)
        if pair is None:
            weight, distance2 = _attention_and_distance2(inputs, keys, rows, None)
        else:
            # [W_bᵀ; dO_pair] of each row against its pair: the bias and what the softmax is told, in one product.
            on_pair = _beside_bias(inputs, rows.read(d_o_pair, 0) * fresh[:, None, None])
            both = jnp.transpose(einsum("ihc,ijc->ijh", on_pair, pair), (2, 0, 1))
            d_weight += both[-len(d_weight) :]
            weight, distance2 = _attention_and_distance2(
                inputs, keys, rows, None if inputs.bias is None else both[: len(d_weight)]
            )
        if d_attention is not None:
            d_weight += rows.read(d_attention, 1) * fresh[:, None]
        # Behind barriers, or XLA computes them anew in each of the many sums that read them.
        weight, distance2 = jax.lax.optimization_barrier((weight, distance2))
        d_logits = jax.lax.optimization_barrier(weight * (d_weight - jnp.sum(weight * d_weight, -1, keepdims=True)))
        d_pair, d_bias = gradients.pair, gradients.bias
        if pair is not None and d_bias is not None:
            d_bias += jnp.sum(einsum("hij,ijc->ihc", d_logits, pair), 0)
        if pair is not None and d_pair is not None:
            # [dL; P]ᵀ [W_bᵀ; dO_pair], again in one.
            to_pair = [jnp.transpose(x, (1, 2, 0)) for x in ([] if d_bias is None else [d_logits]) + [weight]]
            rows_d_pair = einsum("ijh,ihc->ijc", jnp.concatenate(to_pair, -1), on_pair)
            d_pair = rows.write(d_pair, rows_d_pair.astype(d_pair.dtype), 0)
        return RowGradients(weight, d_logits, distance2, rows_d_o, d_pair, d_bias)

    return gradients_by_rows(inputs, keys, block_size, wanted, block)


_attend_by_rows.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


class Keys(NamedTuple):
    """What every block reads of the keys, with the residues last: turned once, not in each block."""

    keys: Float[Array, "H C N"]
    values: Float[Array, "H Cv N"]
    points: Float[Array, "H 3P N"]

    @classmethod
    def of(cls, inputs: Inputs) -> Keys:
        """Of one example."""
        return cls(_turned(inputs.keys), _turned(inputs.values), _turned(inputs.key_points))


class Rows(NamedTuple):
    """A block of query rows."""

    start: Array
    size: int

    def read(self, x: Array, axis: int) -> Array:
        """The rows of an array."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis)

    def write(self, x: Array, rows: Array, axis: int) -> Array:
        """The array with these rows."""
        return jax.lax.dynamic_update_slice_in_dim(x, rows, self.start, axis)

    def of_pair(self, inputs: Inputs) -> Float[Array, "b N c_z"] | None:
        """The pair's rows in the dtype of the arithmetic."""
        return None if inputs.pair is None else self.read(inputs.pair, 0).astype(inputs.queries.dtype)

    def fresh(self, number: int, dtype: Any) -> Float[Array, " b"]:
        """1 for rows that no later block computes again: the last block comes first, and reaches back to its size."""
        whole = number // self.size * self.size
        again = (self.start % self.size != 0) & (self.start + jnp.arange(self.size) < whole)
        return 1 - again.astype(dtype)


class RowGradients(NamedTuple):
    """What the rows of one block have to do with all gradients."""

    weight: Float[Array, "H b N"]
    d_logits: Float[Array, "H b N"]
    distance2: Float[Array, "H b N"]
    d_o: Float[Array, "H b Cv"]
    d_pair: Float[Array, "N N c_z"] | None
    """Of all rows so far, these among them; None where it is not wanted."""
    d_bias: Float[Array, "H c_z"] | None
    """Of all rows so far."""


def gradients_by_rows(
    inputs: Inputs, keys: Keys, size: int, wanted: Any, block: Callable[[Rows, Inputs], RowGradients]
) -> tuple[Inputs]:
    """Gradients to all inputs, block by block of so many rows; to the pair only where `wanted` is not None."""
    room = jax.tree.map(jnp.zeros_like, inputs)
    # Sums over blocks are kept with the residues last, as the products that they add up come out.
    room = room._replace(
        keys=_turned(room.keys),
        values=_turned(room.values),
        key_points=_turned(room.key_points),
        pair=None if wanted is None else room.pair,
        bias=None if inputs.bias is None else room.bias.T,
    )

    def add(gradients: Inputs, start: Array) -> tuple[Inputs, None]:
        rows = Rows(start, size)
        weight, d_logits, distance2, rows_d_o, d_pair, d_bias = block(rows, gradients)
        d_query_points, d_key_points = _point_gradients(inputs, keys, rows, d_logits)
        return Inputs(
            queries=rows.write(gradients.queries, einsum("hij,hjc->hic", d_logits, inputs.keys), 1),
            keys=gradients.keys + einsum("hij,hic->hcj", d_logits, rows.read(inputs.queries, 1)),
            values=gradients.values + einsum("hij,hic->hcj", weight, rows_d_o),
            query_points=rows.write(gradients.query_points, d_query_points, 1),
            key_points=gradients.key_points + d_key_points,
            pair=d_pair,
            mask=gradients.mask,
            weights=gradients.weights - 0.5 * jnp.sum(d_logits * distance2, (1, 2)),
            bias=d_bias,
        ), None

    gradients = jax.lax.scan(add, room, starts(inputs.queries.shape[1], size))[0]
    return (
        gradients._replace(
            keys=_turned(gradients.keys),
            values=_turned(gradients.values),
            key_points=_turned(gradients.key_points),
            pair=None if inputs.pair is None else jnp.zeros_like(inputs.pair) if wanted is None else gradients.pair,
            bias=None if inputs.bias is None else gradients.bias.T,
        ),
    )


def starts(number: int, block_size: int) -> Array:
    """First rows of the blocks; one that would reach over the end starts earlier, and comes first."""
    starts = list(range(0, number - block_size + 1, block_size))
    return jnp.asarray(([number - block_size] if number % block_size else []) + starts)


def _bias(inputs: Inputs, pair: Float[Array, "b N c_z"] | None) -> Float[Array, "H b N"] | None:
    if pair is None or inputs.bias is None:
        return None
    heads = inputs.bias.shape[-1]
    padded = jnp.pad(inputs.bias.T, ((0, -heads % LANES), (0, 0)))
    padded = jnp.broadcast_to(padded, (pair.shape[0], *padded.shape))
    return jnp.transpose(einsum("ihc,ijc->ijh", padded, pair)[..., :heads], (2, 0, 1))


def _beside_bias(inputs: Inputs, rows: Float[Array, "b H c_z"]) -> Float[Array, "b 2H c_z"]:
    """[W_bᵀ; rows] of each query; rows alone without a bias."""
    if inputs.bias is None:
        return rows
    return jnp.concatenate([jnp.broadcast_to(inputs.bias.T, rows.shape), rows], 1)


def _attention_and_distance2(
    inputs: Inputs, keys: Keys, rows: Rows, bias: Float[Array, "H b N"] | None
) -> tuple[Float[Array, "H b N"], Float[Array, "H b N"]]:
    """The rows' attention, and squared distances."""
    logits, distance2 = logits_and_distance2(inputs, keys, rows, bias)
    return jax.nn.softmax(logits, -1), distance2


def logits_and_distance2(
    inputs: Inputs, keys: Keys, rows: Rows, bias: Float[Array, "H b N"] | None
) -> tuple[Float[Array, "H b N"], Float[Array, "H b N"]]:
    """The rows' logits, and squared distances."""
    logits = einsum("hic,hcj->hij", rows.read(inputs.queries, 1), keys.keys)
    distance2: Any = sum(offset * offset for offset in _offsets(inputs, keys, rows))
    logits -= 0.5 * inputs.weights[:, None, None] * distance2
    if bias is not None:
        logits += bias
    logits -= 1e5 * rows.read(inputs.mask, 0)[:, None] * (1 - inputs.mask)
    return logits, distance2


def _point_gradients(
    inputs: Inputs, keys: Keys, rows: Rows, d_logits: Float[Array, "H b N"]
) -> tuple[Float[Array, "H b 3P"], Float[Array, "H 3P N"]]:
    """To query points and key points, by ∂L/∂q = −w·(q − k)."""
    moved = [d_logits * offset for offset in _offsets(inputs, keys, rows)]
    weights = inputs.weights[:, None, None]
    d_queries = jnp.stack([jnp.sum(x, -1) for x in moved], -1)
    d_keys = jnp.stack([jnp.sum(x, -2) for x in moved], -2)
    return -weights * d_queries, weights * d_keys


def _offsets(inputs: Inputs, keys: Keys, rows: Rows) -> list[Float[Array, "H b N"]]:
    """Differences q − k, coordinate by coordinate."""
    points = rows.read(inputs.query_points, 1)
    return [points[..., i, None] - keys.points[:, i, None] for i in range(points.shape[-1])]


def einsum(subscripts: str, *arrays: Array) -> Array:
    """In full precision, whatever the default."""
    return jnp.einsum(subscripts, *arrays, precision=Precision.HIGHEST)


def in_reverse_mode_only(x: Array) -> Array:
    """The array, whose tangents may be transposed but not computed."""
    return _checked.bind(x)


def _refuse(*_: Any, **__: Any) -> Any:
    """Called where a tangent is computed: at once, or when JAX compiles."""
    raise NotImplementedError(ONLY_REVERSE_MODE)


def _tangent_of_checked(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Leaves the array itself, so that none is kept beside it for backward; the forward rules check once more."""
    (x,), (tangent,) = primals, tangents
    return x, tangent if isinstance(tangent, ad.Zero) else _tangent.bind(tangent)


# JAX itself refuses forward mode with a TypeError, where a tangent comes to a function with a backward rule of its own;
# it comes here before.
_checked, _tangent = Primitive("check_reverse_mode"), Primitive("tangent_in_reverse_mode")
_checked.def_impl(lambda x: x)
_checked.def_abstract_eval(lambda x: x)
ad.primitive_jvps[_checked] = _tangent_of_checked
batching.defvectorized(_checked)
mlir.register_lowering(_checked, lambda _, x: [x])
_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda x: x)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
batching.primitive_batchers[_tangent] = _refuse
mlir.register_lowering(_tangent, _refuse)


def _heads_first(x: Float[Array, "*B N H D"]) -> Float[Array, "*B H N D"]:
    return jnp.swapaxes(x, -2, -3)


def _turned(x: Float[Array, "H N D"]) -> Float[Array, "H D N"]:
    """With the residues last."""
    return jnp.swapaxes(x, -1, -2)


def _flat(points: Float[Array, "*B N H P 3"]) -> Float[Array, "*B N H 3P"]:
    return points.reshape(*points.shape[:-2], 3 * points.shape[-2])


def instantiate(x: Any) -> Any:
    """A cotangent as an array, zeros where it is known to be zero; None where there is no output."""
    if not isinstance(x, jax.custom_derivatives.SymbolicZero):
        return x
    aval: Any = x.aval
    return jnp.zeros(aval.shape, aval.dtype)
