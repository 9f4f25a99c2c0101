"""The streamed attention's function in GPU kernels that read the pair once, and once more backwards.

Pallas kernels do what touches the pair, the twins of `ipa_bridge.kernels.point_attention`'s; XLA the rest. Between them
lie the logits of a chunk of query rows, in the GPU's cache; nothing else of N×N is held. Arithmetic is float32's.
With TRITON_INTERPRET=1 the kernels are interpreted, on any device, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.lax import DotAlgorithmPreset, Precision
from jaxtyping import Array, Float

from ipa_bridge.kernels import INTERPRETED, MOST_HEADS, Sizes, Tiles, chunks, tiles, unsupported
from ipa_jax.attention.streamed import (
    Inputs,
    Keys,
    RowGradients,
    Rows,
    einsum,
    gradients_by_rows,
    in_reverse_mode_only,
    instantiate,
    logits_and_distance2,
    number_of_examples,
    over_batch,
    starts,
    unpacked,
)
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
) -> tuple[
    Float[Array, "*B N H Cv"],
    Float[Array, "*B N H Pv 3"],
    Float[Array, "*B N H c_z"] | None,
    None,
]:
    """Outputs; all arrays but `pair` in float32.

    Raises:
        NotImplementedError: the kernels cannot do this, and why.
    """
    *batch, number, heads, channels = q.shape
    coordinates, values = 3 * q_points.shape[-2], v.shape[-1] + 3 * v_points.shape[-2]
    width = 0 if pair is None else pair.shape[-1]
    examples = number_of_examples(batch)
    sizes = Sizes(1, number, heads, channels, coordinates, values, width)
    reason = unsupported(sizes, q.dtype.name, None if pair is None else pair.dtype.name) or _no_place_to_run()
    if reason:
        raise NotImplementedError(f"implementation='fused': {reason}; implementation='streamed' has no such limit")
    inputs = Inputs.of(q, k, v, q_points, k_points, v_points, pair, pair_bias_weight, point_weights, mask)
    size = next((max(1, chunk.rows // examples) for chunk in chunks(sizes)), 1)
    if any(isinstance(length, int) and not length for length in batch):  # on which no kernel can be launched
        o, o_pair = jnp.zeros_like(inputs.values), None if pair is None else jnp.zeros((*q.shape[:-1], width), q.dtype)
    else:
        o, o_pair, _ = over_batch(partial(_attend, size), inputs, len(batch))
    return *unpacked(o, v, v_points), o_pair, None


def _no_place_to_run() -> str | None:
    """Why kernels cannot run here; None where they can."""
    device = jax.default_backend()
    return None if INTERPRETED or device == "gpu" else f"a CUDA device was expected as JAX's default; got {device}"


@partial(jax.jit, static_argnums=0)
def _attend(size: int, inputs: Inputs) -> tuple[Any, Any, Any]:
    """One example's o (H, N, Cv), o_pair (N, H, c_z) or None, and log Σ exp of the logits (H, N)."""
    return _attend_by_rows(size, varying_alike(inputs))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_by_rows(size: int, inputs: Inputs) -> tuple[Any, Any, Any]:
    """`_attend` of inputs that vary alike."""
    heads, number, _ = inputs.queries.shape
    zeros = partial(jnp.zeros_like, inputs.values)
    room: tuple[Any, Any, Any] = (
        zeros(),
        None if inputs.pair is None else zeros(shape=(number, heads, inputs.pair.shape[-1])),
        zeros(shape=(heads, number)),
    )
    keys = Keys.of(inputs)

    def chunk(outputs: tuple[Any, Any, Any], start: Array) -> tuple[tuple[Any, Any, Any], None]:
        o, o_pair, log_sum = outputs
        rows = Rows(start, size)
        logits, _ = logits_and_distance2(inputs, keys, rows, None)
        if inputs.pair is None:
            rows_log_sum = jax.nn.logsumexp(logits, -1)
        else:
            logits, rows_log_sum, rows_o_pair = _attend_to_pair(inputs, logits, start)
            o_pair = rows.write(o_pair, rows_o_pair, 0)
        weight = jnp.exp(logits - rows_log_sum[..., None])
        o = rows.write(o, einsum("hij,hjc->hic", weight, inputs.values), 1)
        return (o, o_pair, rows.write(log_sum, rows_log_sum, 1)), None

    return jax.lax.scan(chunk, room, starts(number, size))[0] if number else room


def _attend_forward(size: int, primals: Any) -> tuple[tuple[Any, Any, Any], Any]:
    inputs = jax.tree.map(lambda x: x.value, primals, is_leaf=lambda x: hasattr(x, "perturbed"))
    # Whether the pair wants a gradient, told by structure: residuals are arrays.
    wanted = () if primals.pair is not None and primals.pair.perturbed else None
    outputs = _attend_by_rows(size, jax.tree.map(in_reverse_mode_only, inputs))
    return outputs, (inputs, outputs, wanted)


def _attend_backward(size: int, residuals: Any, cotangents: Any) -> tuple[Inputs]:
    (inputs, (o, o_pair, log_sum)), wanted = jax.tree.map(_differentiated_once, residuals[:2]), residuals[2]
    number = inputs.queries.shape[1]
    if not number:
        return (jax.tree.map(jnp.zeros_like, inputs),)
    d_o, d_o_pair, _ = jax.tree.map(_differentiated_once, [instantiate(x) for x in cotangents])
    keys = Keys.of(inputs)

    def chunk(rows: Rows, gradients: Inputs) -> RowGradients:
        fresh = rows.fresh(number, d_o.dtype)
        logits, distance2 = logits_and_distance2(inputs, keys, rows, None)
        rows_d_o, rows_log_sum = rows.read(d_o, 1) * fresh[:, None], rows.read(log_sum, 1)
        d_weight = einsum("hic,hcj->hij", rows_d_o, keys.values)
        inner = jnp.sum(rows_d_o * rows.read(o, 1), -1)
        d_pair, d_bias = gradients.pair, gradients.bias
        if inputs.pair is None:
            weight = jnp.exp(logits - rows_log_sum[..., None])
            d_logits = weight * (d_weight - inner[..., None])
        else:
            rows_d_o_pair = rows.read(d_o_pair, 0) * fresh[:, None, None]
            inner += jnp.sum(rows_d_o_pair * rows.read(o_pair, 0), -1).T
            of_rows = _OfRows(logits, d_weight, rows_d_o_pair, rows_log_sum, inner)
            d_logits, weight, d_pair, rows_d_bias = _pair_gradients(inputs, of_rows, d_pair, rows.start)
            d_bias = None if d_bias is None else d_bias + rows_d_bias
        # Behind barriers, or XLA computes them anew in each of the many sums that read them.
        weight, distance2, d_logits = jax.lax.optimization_barrier((weight, distance2, d_logits))
        return RowGradients(weight, d_logits, distance2, rows_d_o, d_pair, d_bias)

    return gradients_by_rows(inputs, keys, size, wanted, chunk)


_attend_by_rows.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


@jax.custom_jvp
def _differentiated_once(x: Array) -> Array:
    """The array, which has no derivative."""
    return x


@_differentiated_once.defjvp
def _(*_: Any) -> Any:
    raise NotImplementedError(
        "this implementation has first derivatives only; implementation='reference' has all others"
    )


class _OfRows(NamedTuple):
    """What the pair's gradients take of a chunk's rows."""

    logits: Float[Array, "H b N"]
    d_weight: Float[Array, "H b N"]
    d_o_pair: Float[Array, "b H c_z"]
    log_sum: Float[Array, "H b"]
    inner: Float[Array, "H b"]
    """dO·o + dO_pair·o_pair."""


def _attend_to_pair(
    inputs: Inputs, logits: Float[Array, "H b N"], start: Array
) -> tuple[Float[Array, "H b N"], Float[Array, "H b"], Float[Array, "b H c_z"]]:
    """The logits with the pair's bias, log Σ exp of each row, and o_pair. A program for one query."""
    pair: Any = inputs.pair
    heads, size, number = logits.shape
    width, launch = pair.shape[-1], _tiles("attend_to_pair", pair)
    tile = launch.keys

    def kernel(start: Any, logits: Any, pair: Any, bias: Any, finished: Any, log_sum: Any, o_pair: Any) -> None:
        i = pl.program_id(0)
        row = start[0] + i

        def step(at: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            most, total, o = carry
            keys, seen = _keys(at, tile, number)
            z = plt.load(pair.at[row, keys, :], mask=seen[:, None], other=0.0)
            logit = plt.load(logits.at[:, i, keys], mask=seen[None], other=0.0)
            logit += _on_pair(bias[...], z.T)
            plt.store(finished.at[:, i, keys], logit, mask=seen[None])
            logit = jnp.where(seen, logit, -jnp.inf)
            now = jnp.maximum(most, logit.max(1))
            shrink, weight = jnp.exp(most - now), jnp.exp(logit - now[:, None])
            return now, total * shrink + weight.sum(1), o * shrink[:, None] + _on_pair(weight, z)

        first = (
            jnp.full(MOST_HEADS, -jnp.inf, jnp.float32),
            jnp.zeros(MOST_HEADS, jnp.float32),
            jnp.zeros((MOST_HEADS, width), jnp.float32),
        )
        most, total, o = jax.lax.fori_loop(0, pl.cdiv(number, tile), step, first)
        log_sum[:, i] = most + jnp.log(total)
        o_pair[i] = o / total[:, None]

    finished, log_sum, o_pair = _call(
        kernel,
        grid=(size,),
        out_shape=(
            jax.ShapeDtypeStruct((MOST_HEADS, size, number), jnp.float32),
            jax.ShapeDtypeStruct((MOST_HEADS, size), jnp.float32),
            jax.ShapeDtypeStruct((size, MOST_HEADS, width), jnp.float32),
        ),
        input_output_aliases={1: 0},
        name="attend_to_pair",
        launch=launch,
    )(_first_row(start), _padded(logits, 0), pair, _padded_bias(inputs))
    return finished[:heads], log_sum[:heads], o_pair[:, :heads]


def _pair_gradients(
    inputs: Inputs, of_rows: _OfRows, d_pair: Float[Array, "N N c_z"] | None, start: Array
) -> tuple[Float[Array, "H b N"], Float[Array, "H b N"], Float[Array, "N N c_z"] | None, Float[Array, "H c_z"]]:
    """The gradient to the logits, the attention, the pair's gradient with these rows, and theirs to the bias."""
    pair: Any = inputs.pair
    heads, size, number = of_rows.logits.shape
    width, launch = pair.shape[-1], _tiles("pair_gradients", pair)
    tile = launch.keys

    def kernel(start: Any, *references: Any) -> None:
        logits, d_weight, pair, bias, d_o_pair, log_sum, inner, *rest = references
        d_logits, weights, d_bias, *into = rest if d_pair is None else rest[1:]
        i = pl.program_id(0)
        row = start[0] + i
        norm, removed, b, d = log_sum[:, i][:, None], inner[:, i][:, None], bias[...], d_o_pair[i]

        def step(at: Array, to_bias: Array) -> Array:
            keys, seen = _keys(at, tile, number)
            z = plt.load(pair.at[row, keys, :], mask=seen[:, None], other=0.0)
            logit = plt.load(logits.at[:, i, keys], mask=seen[None], other=-jnp.inf)
            to_weight = plt.load(d_weight.at[:, i, keys], mask=seen[None], other=0.0)
            weight = jnp.exp(logit + _on_pair(b, z.T) - norm)
            to_logit = weight * (to_weight + _on_pair(d, z.T) - removed)
            plt.store(d_logits.at[:, i, keys], to_logit, mask=seen[None])
            plt.store(weights.at[:, i, keys], weight, mask=seen[None])
            for x in into:
                to_z = _to_pair(weight, d, z) + _to_pair(to_logit, b, z)
                plt.store(x.at[row, keys, :], to_z.astype(x.dtype), mask=seen[:, None])
            return to_bias + _on_pair(to_logit, z)

        first = jnp.zeros((MOST_HEADS, width), jnp.float32)
        d_bias[i] = jax.lax.fori_loop(0, pl.cdiv(number, tile), step, first)

    of_chunk = jax.ShapeDtypeStruct((MOST_HEADS, size, number), jnp.float32)
    outputs = [of_chunk, of_chunk, jax.ShapeDtypeStruct((size, MOST_HEADS, width), jnp.float32)]
    arrays = [
        _first_row(start),
        _padded(of_rows.logits, 0),
        _padded(of_rows.d_weight, 0),
        pair,
        _padded_bias(inputs),
        _padded(of_rows.d_o_pair, 1),
        _padded(of_rows.log_sum, 0),
        _padded(of_rows.inner, 0),
    ]
    aliases = {1: 0, 2: 1}
    if d_pair is not None:  # all of it, of which these rows are written
        outputs.append(jax.ShapeDtypeStruct(d_pair.shape, d_pair.dtype))
        aliases[len(arrays)] = len(outputs) - 1
        arrays.append(d_pair)
    d_logits, weight, d_bias, *found = _call(
        kernel,
        grid=(size,),
        out_shape=tuple(outputs),
        input_output_aliases=aliases,
        name="pair_gradients",
        launch=launch,
    )(*arrays)
    return d_logits[:heads], weight[:heads], (found[0] if found else None), d_bias[:, :heads].sum(0)


def _tiles(kernel: str, pair: Array) -> Tiles:
    """As of the kernel in Triton."""
    return tiles(kernel, Sizes(1, pair.shape[-2], MOST_HEADS, 1, 1, 1, pair.shape[-1]), pair.dtype.name)


def _call(kernel: Callable, *, name: str, launch: Tiles, **options: Any) -> Callable:
    """A Pallas kernel; within, integers have 32 bits whatever JAX is told, for Pallas mixes none."""

    def call(*arrays: Array) -> tuple[Any, ...]:
        compiler = plt.CompilerParams(num_warps=launch.warps, num_stages=launch.stages)
        with jax.enable_x64(False):
            ready = pl.pallas_call(kernel, name=name, interpret=INTERPRETED, compiler_params=compiler, **options)
            return ready(*arrays)

    return call


def _first_row(start: Array) -> Array:
    """As kernels take it."""
    return start.astype(jnp.int32)[None]


def _keys(at: Array, tile: int, number: int) -> tuple[Any, Array]:
    """The keys of one tile of a row, and which of them there are."""
    first = at.astype(jnp.int32) * tile
    return pl.ds(first, tile), first + jnp.arange(tile, dtype=jnp.int32) < number


def _padded(x: Array, axis: int) -> Array:
    """With as many heads as a tile of a tensor core has."""
    return jnp.pad(x, [(0, MOST_HEADS - x.shape[i] if i == axis else 0) for i in range(x.ndim)])


def _padded_bias(inputs: Inputs) -> Float[Array, "16 c_z"]:
    bias: Any = inputs.bias
    return _padded(bias.T, 0)


def _on_pair(x: Array, z: Array) -> Array:
    """x·z, of float32 numbers and a pair: with a bfloat16 pair in three parts of 8 bits each."""
    if z.dtype == jnp.float32:
        return _dot(x, z)
    high, rest = _first_bits(x)
    middle, rest = _first_bits(rest)
    return _dot(rest.astype(jnp.bfloat16), z) + _dot(middle, z) + _dot(high, z)


def _to_pair(x: Array, y: Array, z: Array) -> Array:
    """xᵀ·y, to the precision that the gradient of that pair keeps."""
    if z.dtype == jnp.float32:
        return _dot(x.T, y)
    (high, low), (right, rest) = _first_bits(x), _first_bits(y)
    low, rest = low.astype(jnp.bfloat16), rest.astype(jnp.bfloat16)
    return _dot(low.T, right) + _dot(high.T, rest) + _dot(high.T, right)


def _first_bits(x: Array) -> tuple[Array, Array]:
    """The bfloat16 number next to a float32 one, and what is left."""
    high = x.astype(jnp.bfloat16)
    return high, x - high.astype(jnp.float32)


def _dot(x: Array, y: Array) -> Array:
    """On tensor cores, of float32 numbers in three products of TF32."""
    precision: Any = Precision.HIGHEST if INTERPRETED else DotAlgorithmPreset.TF32_TF32_F32_X3
    if x.dtype != jnp.float32:
        precision = None
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)
