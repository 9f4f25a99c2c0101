"""Triton kernels of invariant point attention: forward and backward each read the pair once.

The kernels exchange the logits L = q·k − ½ w·|q⃗ − k⃗|² + mask + z·b (Jumper et al. 2021, Suppl. Alg. 22, line 7) of
one chunk of query rows, which stay in the GPU's cache. A program that reads the pair handles one row, with all heads.

A chunk is `examples` whole examples from index `example`, or `rows` query rows of one example from index `row`. Arrays
are contiguous, and float32 except the pair: queries, keys (B, H, N, C) and points (B, H, N, 3P), scaled as in
`operands`; values (B, H, N, V); pair (B, N, N, c_z); bias (H, c_z); mask (B, N). Arrays of one chunk are (examples, H,
rows, stride), where stride is N rounded up to a multiple of every tile, so that their keys need no mask.

Arithmetic has float32 precision. On tensor cores a float32 product takes three TF32 products (`tf32x3`); with a
bfloat16 pair, three bfloat16 products. Distances are sums of squared differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from ipa_bridge.tiling import Chunk, Sizes, Tiles, grid, stride, tiles

_UNSPECIALIZED = ("example", "row", "rows", "number")
"""Arguments for whose values Triton must compile no special versions."""


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def logits(
    queries,
    keys,
    query_points,
    key_points,
    weights,
    mask,
    values,
    d_o,
    out,
    d_attention,
    example,
    row,
    rows,
    number,
    stride,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COORDINATES: tl.constexpr,
    VALUES: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    PADDED_VALUES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Logits without the pair's bias; backward also dO·Vᵀ. Grid: (tiles of keys, tiles of rows, examples × heads)."""
    j = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    whole = (example * HEADS + part).to(tl.int64) * number
    query, key = whole + row + i, whole + j
    some, seen = i < rows, j < number
    c = tl.arange(0, PADDED_CHANNELS)
    q = tl.load(queries + query[:, None] * CHANNELS + c, mask=some[:, None] & (c < CHANNELS), other=0.0)
    k = tl.load(keys + key[:, None] * CHANNELS + c, mask=seen[:, None] & (c < CHANNELS), other=0.0)
    logit = tl.dot(q, tl.trans(k), input_precision="ieee")
    distance2 = tl.zeros((ROWS, KEYS), tl.float32)
    for x in tl.static_range(COORDINATES):
        a = tl.load(query_points + query * COORDINATES + x, mask=some, other=0.0)
        b = tl.load(key_points + key * COORDINATES + x, mask=seen, other=0.0)
        offset = a[:, None] - b[None, :]
        distance2 += offset * offset
    logit -= 0.5 * tl.load(weights + part % HEADS) * distance2
    if HAS_MASK:
        of_example = (example + part // HEADS).to(tl.int64) * number
        valid = tl.load(mask + of_example + row + i, mask=some, other=0.0)
        others = tl.load(mask + of_example + j, mask=seen, other=0.0)
        logit += 1e5 * valid[:, None] * (others - 1)[None, :]
    at = (part.to(tl.int64) * rows + i)[:, None] * stride + j
    tl.store(out + at, logit, mask=some[:, None])
    if BACKWARD:
        c = tl.arange(0, PADDED_VALUES)
        d = tl.load(d_o + query[:, None] * VALUES + c, mask=some[:, None] & (c < VALUES), other=0.0)
        v = tl.load(values + key[:, None] * VALUES + c, mask=seen[:, None] & (c < VALUES), other=0.0)
        tl.store(d_attention + at, tl.dot(d, tl.trans(v), input_precision="tf32x3"), mask=some[:, None])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def attend_to_pair(
    logits,
    pair,
    bias,
    o_pair,
    lse,
    example,
    row,
    rows,
    number,
    stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_PAIR: tl.constexpr,
    KEYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Adds the pair's bias to the logits in place; also writes each row's log Σ exp and o_pair. Grid: (queries,)."""
    h, c = tl.arange(0, 16), tl.arange(0, WIDTH)
    has_head = (h < HEADS)[:, None]
    at_row, query, at_head, first = _of_query(example, row, rows, number, stride, h, HEADS)
    if HAS_PAIR:
        b = tl.load(bias + h[:, None] * WIDTH + c, mask=has_head, other=0.0)
    m_i = tl.full((16,), -float("inf"), tl.float32)
    l_i = tl.zeros((16,), tl.float32)
    acc = tl.zeros((16, WIDTH), tl.float32)
    for start in range(0, number, KEYS):
        j = start + tl.arange(0, KEYS)
        seen = j < number
        logit = tl.load(logits + at_row + j, mask=has_head, other=0.0)
        if HAS_PAIR:
            z = tl.load(pair + (first + j)[:, None] * WIDTH + c, mask=seen[:, None], other=0.0)
            logit += _on_pair(b, tl.trans(z), INTERPRETED)
            tl.store(logits + at_row + j, logit, mask=has_head)
        logit = tl.where(seen, logit, -float("inf"))
        now = tl.maximum(m_i, tl.max(logit, 1))
        shrink, weight = tl.exp(m_i - now), tl.exp(logit - now[:, None])
        l_i, m_i = l_i * shrink + tl.sum(weight, 1), now
        if HAS_PAIR:
            acc = acc * shrink[:, None] + _on_pair(weight, z, INTERPRETED)
    tl.store(lse + at_head, m_i + tl.log(l_i), mask=h < HEADS)
    if HAS_PAIR:
        tl.store(o_pair + (query * HEADS + h)[:, None] * WIDTH + c, acc / l_i[:, None], mask=has_head)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def attend(
    logits,
    lse,
    values,
    o,
    example,
    row,
    rows,
    number,
    stride,
    HEADS: tl.constexpr,
    VALUES: tl.constexpr,
    PADDED_VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Sums of values weighted by the softmax of the finished logits. Grid: (tiles of rows, examples × heads)."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    whole = (example * HEADS + part).to(tl.int64) * number
    query, some = whole + row + i, i < rows
    at = (part.to(tl.int64) * rows + i)[:, None] * stride
    c = tl.arange(0, PADDED_VALUES)
    lse_i = tl.load(lse + query, mask=some, other=0.0)
    acc = tl.zeros((ROWS, PADDED_VALUES), tl.float32)
    for start in range(0, number, KEYS):
        j = start + tl.arange(0, KEYS)
        seen = j < number
        logit = tl.load(logits + at + j, mask=some[:, None], other=0.0)
        logit = tl.where(seen, logit, -float("inf"))
        v = tl.load(values + (whole + j)[:, None] * VALUES + c, mask=seen[:, None] & (c < VALUES), other=0.0)
        acc += tl.dot(tl.exp(logit - lse_i[:, None]), v, input_precision="tf32x3")
    tl.store(o + query[:, None] * VALUES + c, acc, mask=some[:, None] & (c < VALUES))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def pair_gradients(
    logits,
    d_attention,
    pair,
    bias,
    d_o_pair,
    lse,
    delta,
    d_pair,
    d_bias,
    example,
    row,
    rows,
    number,
    stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_PAIR: tl.constexpr,
    WITH_D_PAIR: tl.constexpr,
    KEYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Gradients to logits and pair, each query's part of the gradient to the bias, and the attention. Grid: (queries,).

    The first overwrites the logits, the last dO·Vᵀ. `delta` is dO·o + dO_pair·o_pair of each query and head.
    """
    h, c = tl.arange(0, 16), tl.arange(0, WIDTH)
    has_head = (h < HEADS)[:, None]
    at_row, query, at_head, first = _of_query(example, row, rows, number, stride, h, HEADS)
    of_query = (query * HEADS + h)[:, None] * WIDTH + c
    lse_i = tl.load(lse + at_head, mask=h < HEADS, other=0.0)
    delta_i = tl.load(delta + at_head, mask=h < HEADS, other=0.0)
    if HAS_PAIR:
        b = tl.load(bias + h[:, None] * WIDTH + c, mask=has_head, other=0.0)
        to_bias = tl.zeros((16, WIDTH), tl.float32)
        d = tl.load(d_o_pair + of_query, mask=has_head, other=0.0)
    for start in range(0, number, KEYS):
        j = start + tl.arange(0, KEYS)
        seen = j < number
        logit = tl.load(logits + at_row + j, mask=has_head, other=0.0)
        to_weight = tl.load(d_attention + at_row + j, mask=has_head, other=0.0)
        if HAS_PAIR:
            z = tl.load(pair + (first + j)[:, None] * WIDTH + c, mask=seen[:, None], other=0.0)
            to_weight += _on_pair(d, tl.trans(z), INTERPRETED)
            logit += _on_pair(b, tl.trans(z), INTERPRETED)
        weight = tl.where(seen & has_head, tl.exp(logit - lse_i[:, None]), 0.0)
        to_logit = weight * (to_weight - delta_i[:, None])
        tl.store(logits + at_row + j, to_logit, mask=has_head)
        tl.store(d_attention + at_row + j, weight, mask=has_head)
        if HAS_PAIR:
            to_bias += _on_pair(to_logit, z, INTERPRETED)
        if WITH_D_PAIR:
            to_z = _to_pair(weight, d, z, INTERPRETED) + _to_pair(to_logit, b, z, INTERPRETED)
            at = (first + j)[:, None] * WIDTH + c
            tl.store(d_pair + at, to_z.to(d_pair.dtype.element_ty), mask=seen[:, None])
    if HAS_PAIR:
        within = (tl.program_id(0).to(tl.int64) * HEADS + h)[:, None] * WIDTH + c
        tl.store(d_bias + within, to_bias, mask=has_head)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def query_gradients(
    d_logits,
    keys,
    query_points,
    key_points,
    weights,
    d_queries,
    d_query_points,
    d_weights,
    example,
    row,
    rows,
    number,
    stride,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COORDINATES: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    PADDED_COORDINATES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Gradients to queries and their points, and each query's part of the gradient to the point weights.

    Grid: (tiles of rows, examples × heads).
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    whole = (example * HEADS + part).to(tl.int64) * number
    query, some = whole + row + i, i < rows
    at = (part.to(tl.int64) * rows + i)[:, None] * stride
    c, p = tl.arange(0, PADDED_CHANNELS), tl.arange(0, PADDED_COORDINATES)
    to_query = tl.zeros((ROWS, PADDED_CHANNELS), tl.float32)
    to_points = tl.zeros((ROWS, PADDED_COORDINATES), tl.float32)
    to_weight = tl.zeros((ROWS,), tl.float32)
    for start in range(0, number, KEYS):
        j = start + tl.arange(0, KEYS)
        key, seen = whole + j, j < number
        d = tl.where(seen, tl.load(d_logits + at + j, mask=some[:, None], other=0.0), 0.0)
        k = tl.load(keys + key[:, None] * CHANNELS + c, mask=seen[:, None] & (c < CHANNELS), other=0.0)
        to_query += tl.dot(d, k, input_precision="tf32x3")
        for x in tl.static_range(COORDINATES):
            a = tl.load(query_points + query * COORDINATES + x, mask=some, other=0.0)
            b = tl.load(key_points + key * COORDINATES + x, mask=seen, other=0.0)
            offset = a[:, None] - b[None, :]
            moved = d * offset
            to_points += tl.where(p == x, tl.sum(moved, 1)[:, None], 0.0)
            to_weight += tl.sum(moved * offset, 1)
    tl.store(d_queries + query[:, None] * CHANNELS + c, to_query, mask=some[:, None] & (c < CHANNELS))
    scaled = -tl.load(weights + part % HEADS) * to_points
    tl.store(d_query_points + query[:, None] * COORDINATES + p, scaled, mask=some[:, None] & (p < COORDINATES))
    tl.store(d_weights + query, -0.5 * to_weight, mask=some)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def key_gradients(
    d_logits,
    attention,
    queries,
    d_o,
    query_points,
    key_points,
    weights,
    d_keys,
    d_values,
    d_key_points,
    example,
    row,
    rows,
    number,
    stride,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COORDINATES: tl.constexpr,
    VALUES: tl.constexpr,
    PADDED_CHANNELS: tl.constexpr,
    PADDED_COORDINATES: tl.constexpr,
    PADDED_VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Adds to the gradients to keys, their points and values. Grid: (tiles of keys, examples × heads)."""
    j = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    part = tl.program_id(1)
    whole = (example * HEADS + part).to(tl.int64) * number
    key, seen = whole + j, j < number
    at = part.to(tl.int64) * rows * stride
    c, p, e = tl.arange(0, PADDED_CHANNELS), tl.arange(0, PADDED_COORDINATES), tl.arange(0, PADDED_VALUES)
    to_key = tl.zeros((KEYS, PADDED_CHANNELS), tl.float32)
    to_points = tl.zeros((KEYS, PADDED_COORDINATES), tl.float32)
    to_value = tl.zeros((KEYS, PADDED_VALUES), tl.float32)
    for start in range(0, rows, ROWS):
        i = start + tl.arange(0, ROWS)
        query, some = whole + row + i, i < rows
        within = at + i.to(tl.int64)[:, None] * stride + j
        d = tl.load(d_logits + within, mask=some[:, None], other=0.0)
        weight = tl.load(attention + within, mask=some[:, None], other=0.0)
        q = tl.load(queries + query[:, None] * CHANNELS + c, mask=some[:, None] & (c < CHANNELS), other=0.0)
        to_key += tl.dot(tl.trans(d), q, input_precision="tf32x3")
        rows_d_o = tl.load(d_o + query[:, None] * VALUES + e, mask=some[:, None] & (e < VALUES), other=0.0)
        to_value += tl.dot(tl.trans(weight), rows_d_o, input_precision="tf32x3")
        for x in tl.static_range(COORDINATES):
            a = tl.load(query_points + query * COORDINATES + x, mask=some, other=0.0)
            b = tl.load(key_points + key * COORDINATES + x, mask=seen, other=0.0)
            moved = d * (a[:, None] - b[None, :])
            to_points += tl.where(p == x, tl.sum(moved, 0)[:, None], 0.0)
    _add(d_keys + key[:, None] * CHANNELS + c, to_key, seen[:, None] & (c < CHANNELS))
    _add(d_values + key[:, None] * VALUES + e, to_value, seen[:, None] & (e < VALUES))
    scaled = tl.load(weights + part % HEADS) * to_points
    _add(d_key_points + key[:, None] * COORDINATES + p, scaled, seen[:, None] & (p < COORDINATES))


@triton.jit
def _of_query(example, row, rows, number, stride, h, HEADS: tl.constexpr):
    """Indices of this program's query: its logits by head, then itself in (B, N), in (B, H, N) and in (B, N, N)."""
    within, i = tl.program_id(0) // rows, tl.program_id(0) % rows
    at_row = ((within * HEADS + h).to(tl.int64) * rows + i)[:, None] * stride
    query = (example + within).to(tl.int64) * number + row + i
    at_head = ((example + within) * HEADS + h).to(tl.int64) * number + row + i
    return at_row, query, at_head, query * number


@triton.jit
def _on_pair(x, z, INTERPRETED: tl.constexpr):
    """x·z for float32 x and a pair z. For a bfloat16 pair, x is split into three bfloat16 parts of 8 bits each."""
    if z.dtype == tl.float32:
        out = tl.dot(x, z, input_precision="tf32x3")
    else:
        high, rest = _first_bits(x)
        middle, rest = _first_bits(rest)
        z = _operand(z, INTERPRETED)
        out = tl.dot(_operand(rest.to(tl.bfloat16), INTERPRETED), z)
        out = tl.dot(_operand(high, INTERPRETED), z, tl.dot(_operand(middle, INTERPRETED), z, out))
    return out


@triton.jit
def _to_pair(x, y, z, INTERPRETED: tl.constexpr):
    """xᵀ·y, part of the gradient to the pair z, as precise as z's dtype can store."""
    if z.dtype == tl.float32:
        out = tl.dot(tl.trans(x), y, input_precision="tf32x3")
    else:
        high, low = _first_bits(tl.trans(x))
        right, rest = _first_bits(y)
        high, right = _operand(high, INTERPRETED), _operand(right, INTERPRETED)
        low, rest = _operand(low.to(tl.bfloat16), INTERPRETED), _operand(rest.to(tl.bfloat16), INTERPRETED)
        out = tl.dot(high, right, tl.dot(high, rest, tl.dot(low, right)))
    return out


@triton.jit
def _first_bits(x):
    """The nearest bfloat16 number to a float32 one, and the remainder in float32."""
    high = x.to(tl.bfloat16)
    return high, x - high.to(tl.float32)


@triton.jit
def _operand(x, INTERPRETED: tl.constexpr):
    """x, in float32 under the interpreter, which cannot multiply bfloat16 numbers."""
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def _add(at, x, inside):
    tl.store(at, tl.load(at, mask=inside, other=0.0) + x, mask=inside)


KERNELS: dict[str, Any] = {
    kernel.__name__: kernel
    for kernel in (logits, attend_to_pair, attend, pair_gradients, query_gradients, key_gradients)
}


def compiler_options(tile: Tiles) -> dict[str, Any]:
    """Options of Triton's compiler."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def constants(
    kernel: str, sizes: Sizes, *, pair_dtype: str | None, has_mask: bool, backward: bool, d_pair: bool, interpret: bool
) -> dict[str, Any]:
    """Compile-time arguments of a kernel, by name."""
    tile = tiles(kernel, sizes, pair_dtype)
    known = {
        "HEADS": sizes.heads,
        "CHANNELS": sizes.channels,
        "COORDINATES": sizes.coordinates,
        "VALUES": sizes.values,
        "WIDTH": sizes.pair_channel or 16,
        "PADDED_CHANNELS": max(16, triton.next_power_of_2(sizes.channels)),
        "PADDED_COORDINATES": triton.next_power_of_2(sizes.coordinates),
        "PADDED_VALUES": max(16, triton.next_power_of_2(sizes.values)),
        "HAS_MASK": has_mask,
        "HAS_PAIR": pair_dtype is not None,
        "BACKWARD": backward,
        "WITH_D_PAIR": d_pair,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "INTERPRETED": interpret,
    }
    return {name: known[name] for name in KERNELS[kernel].arg_names if name in known}


def run(kernel: str, arrays: Mapping[str, Any], sizes: Sizes, chunk: Chunk, **options: Any) -> None:
    """Launches a kernel on a chunk, with those of the named arrays that are among its arguments."""
    known = {**arrays, **chunk._asdict(), "number": sizes.number, "stride": stride(sizes)}
    tile = tiles(kernel, sizes, options["pair_dtype"])
    function = KERNELS[kernel]
    if isinstance(function, triton.JITFunction) == options["interpret"]:  # else wrong bfloat16 results
        raise NotImplementedError("implementation='fused': only tests set TRITON_INTERPRET=1; unset it")
    compiled_for = constants(kernel, sizes, **options)
    given = {name: known[name] for name in function.arg_names if name not in compiled_for}
    function[grid(kernel, sizes, chunk, tile)](**given, **compiled_for, **compiler_options(tile))
