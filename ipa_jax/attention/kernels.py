"""Pallas kernels of invariant point attention: forward and backward each read the pair once.

They do the same as the Triton kernels of the same names. Arithmetic has float32 precision. On tensor cores a float32
product takes three TF32 products; with a bfloat16 pair, three bfloat16 products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.lax import DotAlgorithmPreset, Precision
from jaxtyping import Array, Float

from ipa_bridge.tiling import MAX_HEADS, Sizes, Tiles, tiles
from ipa_jax.attention.operands import Operands


def attend_to_pair(
    operands: Operands, logits: Float[Array, "H b N"], start: Array, *, interpret: bool
) -> tuple[Float[Array, "H b N"], Float[Array, "H b"], Float[Array, "b H c_z"]]:
    """The logits with the pair's bias added, log Σ exp of each row, and o_pair. One program per query."""
    pair: Any = operands.pair
    heads, size, number = logits.shape
    width, launch = pair.shape[-1], _tiles("attend_to_pair", pair)
    finished, lse, o_pair = _call(
        partial(_attend_to_pair, tile=launch.keys, interpret=interpret),
        grid=(size,),
        out_shape=(
            jax.ShapeDtypeStruct((MAX_HEADS, size, number), jnp.float32),
            jax.ShapeDtypeStruct((MAX_HEADS, size), jnp.float32),
            jax.ShapeDtypeStruct((size, MAX_HEADS, width), jnp.float32),
        ),
        input_output_aliases={1: 0},
        name="attend_to_pair",
        launch=launch,
        interpret=interpret,
    )(_first_row(start), _padded(logits, 0), pair, _padded_bias(operands))
    return finished[:heads], lse[:heads], o_pair[:, :heads]


def _attend_to_pair(
    start: Any, logits: Any, pair: Any, bias: Any, finished: Any, lse: Any, o_pair: Any, *, tile: int, interpret: bool
) -> None:
    number, width = pair.shape[-2:]
    i = pl.program_id(0)
    row = start[0] + i

    def step(at: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m_i, l_i, acc = carry
        keys, seen = _keys(at, tile, number)
        z = plt.load(pair.at[row, keys, :], mask=seen[:, None], other=0.0)
        logit = plt.load(logits.at[:, i, keys], mask=seen[None], other=0.0)
        logit += _on_pair(bias[...], z.T, interpret)
        plt.store(finished.at[:, i, keys], logit, mask=seen[None])
        logit = jnp.where(seen, logit, -jnp.inf)
        now = jnp.maximum(m_i, logit.max(1))
        shrink, weight = jnp.exp(m_i - now), jnp.exp(logit - now[:, None])
        return now, l_i * shrink + weight.sum(1), acc * shrink[:, None] + _on_pair(weight, z, interpret)

    first = (
        jnp.full(MAX_HEADS, -jnp.inf, jnp.float32),
        jnp.zeros(MAX_HEADS, jnp.float32),
        jnp.zeros((MAX_HEADS, width), jnp.float32),
    )
    m_i, l_i, acc = jax.lax.fori_loop(0, pl.cdiv(number, tile), step, first)
    lse[:, i] = m_i + jnp.log(l_i)
    o_pair[i] = acc / l_i[:, None]


def pair_gradients(
    operands: Operands,
    logits: Float[Array, "H b N"],
    d_weight: Float[Array, "H b N"],
    d_o_pair: Float[Array, "b H c_z"],
    lse: Float[Array, "H b"],
    delta: Float[Array, "H b"],
    d_pair: Float[Array, "N N c_z"] | None,
    start: Array,
    *,
    interpret: bool,
) -> tuple[Float[Array, "H b N"], Float[Array, "H b N"], Float[Array, "N N c_z"] | None, Float[Array, "H c_z"]]:
    """d_logits, the attention, d_pair with this chunk's rows written, and this chunk's part of d_bias.

    `delta` is dO·o + dO_pair·o_pair of each query and head. One program per query.
    """
    pair: Any = operands.pair
    heads, size, number = logits.shape
    width, launch = pair.shape[-1], _tiles("pair_gradients", pair)
    of_chunk = jax.ShapeDtypeStruct((MAX_HEADS, size, number), jnp.float32)
    outputs = [of_chunk, of_chunk, jax.ShapeDtypeStruct((size, MAX_HEADS, width), jnp.float32)]
    arrays = [
        _first_row(start),
        _padded(logits, 0),
        _padded(d_weight, 0),
        pair,
        _padded_bias(operands),
        _padded(d_o_pair, 1),
        _padded(lse, 0),
        _padded(delta, 0),
    ]
    aliases = {1: 0, 2: 1}
    if d_pair is not None:  # the whole array, in which the kernel writes this chunk's rows
        outputs.append(jax.ShapeDtypeStruct(d_pair.shape, d_pair.dtype))
        aliases[len(arrays)] = len(outputs) - 1
        arrays.append(d_pair)
    d_logits, weight, d_bias, *found = _call(
        partial(_pair_gradients, tile=launch.keys, with_d_pair=d_pair is not None, interpret=interpret),
        grid=(size,),
        out_shape=tuple(outputs),
        input_output_aliases=aliases,
        name="pair_gradients",
        launch=launch,
        interpret=interpret,
    )(*arrays)
    return d_logits[:heads], weight[:heads], (found[0] if found else None), d_bias[:, :heads].sum(0)


def _pair_gradients(start: Any, *references: Any, tile: int, with_d_pair: bool, interpret: bool) -> None:
    logits, d_weight, pair, bias, d_o_pair, lse, delta, *rest = references
    d_logits, weights, d_bias, *into = rest[1:] if with_d_pair else rest
    number, width = pair.shape[-2:]
    i = pl.program_id(0)
    row = start[0] + i
    lse_i, delta_i, b, d = lse[:, i][:, None], delta[:, i][:, None], bias[...], d_o_pair[i]

    def step(at: Array, to_bias: Array) -> Array:
        keys, seen = _keys(at, tile, number)
        z = plt.load(pair.at[row, keys, :], mask=seen[:, None], other=0.0)
        logit = plt.load(logits.at[:, i, keys], mask=seen[None], other=-jnp.inf)
        to_weight = plt.load(d_weight.at[:, i, keys], mask=seen[None], other=0.0)
        weight = jnp.exp(logit + _on_pair(b, z.T, interpret) - lse_i)
        to_logit = weight * (to_weight + _on_pair(d, z.T, interpret) - delta_i)
        plt.store(d_logits.at[:, i, keys], to_logit, mask=seen[None])
        plt.store(weights.at[:, i, keys], weight, mask=seen[None])
        for x in into:
            to_z = _to_pair(weight, d, z, interpret) + _to_pair(to_logit, b, z, interpret)
            plt.store(x.at[row, keys, :], to_z.astype(x.dtype), mask=seen[:, None])
        return to_bias + _on_pair(to_logit, z, interpret)

    first = jnp.zeros((MAX_HEADS, width), jnp.float32)
    d_bias[i] = jax.lax.fori_loop(0, pl.cdiv(number, tile), step, first)


def _tiles(kernel: str, pair: Array) -> Tiles:
    """Tile sizes, the same as for the Triton kernel of that name."""
    return tiles(kernel, Sizes(1, pair.shape[-2], MAX_HEADS, 1, 1, 1, pair.shape[-1]), pair.dtype.name)


def _call(kernel: Callable, *, name: str, launch: Tiles, interpret: bool, **options: Any) -> Callable:
    """A Pallas kernel, run with JAX's 64-bit types disabled: Pallas cannot mix integers of 32 and 64 bits."""

    def call(*arrays: Array) -> tuple[Any, ...]:
        compiler = plt.CompilerParams(num_warps=launch.warps, num_stages=launch.stages)
        with jax.enable_x64(False):
            ready = pl.pallas_call(kernel, name=name, interpret=interpret, compiler_params=compiler, **options)
            return ready(*arrays)

    return call


def _first_row(start: Array) -> Array:
    """The first row as the kernels need it: an int32 array of length 1."""
    return start.astype(jnp.int32)[None]


def _keys(at: Array, tile: int, number: int) -> tuple[Any, Array]:
    """Slice of one tile's keys, and a mask that is True for keys below `number`."""
    first = at.astype(jnp.int32) * tile
    return pl.ds(first, tile), first + jnp.arange(tile, dtype=jnp.int32) < number


def _padded(x: Array, axis: int) -> Array:
    """The array with its axis of heads padded with zeros to `MAX_HEADS`, one tile of a tensor core."""
    return jnp.pad(x, [(0, MAX_HEADS - x.shape[i] if i == axis else 0) for i in range(x.ndim)])


def _padded_bias(operands: Operands) -> Float[Array, "16 c_z"]:
    bias: Any = operands.bias
    return _padded(bias.T, 0)


def _on_pair(x: Array, z: Array, interpret: bool) -> Array:
    """x·z for float32 x and a pair z. For a bfloat16 pair, x is split into three bfloat16 parts of 8 bits each."""
    if z.dtype == jnp.float32:
        return _dot(x, z, interpret)
    high, rest = _first_bits(x)
    middle, rest = _first_bits(rest)
    return _dot(rest.astype(jnp.bfloat16), z, interpret) + _dot(middle, z, interpret) + _dot(high, z, interpret)


def _to_pair(x: Array, y: Array, z: Array, interpret: bool) -> Array:
    """xᵀ·y, part of the gradient to the pair z, as precise as z's dtype can store."""
    if z.dtype == jnp.float32:
        return _dot(x.T, y, interpret)
    (high, low), (right, rest) = _first_bits(x), _first_bits(y)
    low, rest = low.astype(jnp.bfloat16), rest.astype(jnp.bfloat16)
    return _dot(low.T, right, interpret) + _dot(high.T, rest, interpret) + _dot(high.T, right, interpret)


def _first_bits(x: Array) -> tuple[Array, Array]:
    """The nearest bfloat16 number to a float32 one, and the remainder in float32."""
    high = x.astype(jnp.bfloat16)
    return high, x - high.astype(jnp.float32)


def _dot(x: Array, y: Array, interpret: bool) -> Array:
    """x·y on tensor cores; for float32 numbers three TF32 products."""
    precision: Any = Precision.HIGHEST if interpret else DotAlgorithmPreset.TF32_TF32_F32_X3
    if x.dtype != jnp.float32:
        precision = None
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)
