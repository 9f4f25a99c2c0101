"""The same attention as the reference, computed one block of query rows at a time.

Apart from the pair and its gradient, no N×N array is held. Softmax runs over whole rows, so nothing is approximated.
Backward computes each block's attention again.

Squared distances do not suffer from cancellation: they are sums of squared differences. For float32 inputs on
CPU they are |q|² + |k|² − 2 q·k in float64, a matrix product with precision to spare.

Forward and backward are each an opaque operator (for `torch.compile` and `torch.export`) inside an autograd function
(for `torch.func.grad` and `vmap`). Forward-mode and higher derivatives raise an error: use the reference.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ipa_torch.attention.derivatives import ONLY_REVERSE_MODE, one_by_one, wants_gradients, without_derivative
from ipa_torch.attention.operands import Operands, unpack
from ipa_torch.attention.rows import Blocks


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
        ValueError: block_size is below 1.
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, or None for a size that suits N; got {block_size}")
    operands = Operands.from_inputs(q, k, v, q_points, k_points, v_points, pair, pair_bias_weight, point_weights, mask)
    inputs = (*operands, block_size or 0, return_attention)
    if not torch.compiler.is_compiling():
        o, o_pair, attention = _EagerAttend.apply(*inputs)
    elif wants_gradients(operands):
        o, o_pair, attention = _Attend.apply(*inputs)
    else:  # Dynamo cannot trace an autograd function if no input needs a gradient.
        o, o_pair, attention = _attend(*inputs)
    *batch, number, heads, _ = v.shape
    return (
        *unpack(o, v, v_points),
        None if pair is None else o_pair.reshape(*batch, number, heads, pair.shape[-1]),
        attention.reshape(*batch, heads, number, number) if return_attention else None,
    )


class _Attend(torch.autograd.Function):
    """The streamed attention with its first derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `_attend`."""
        return _attend(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Saves the inputs, which are all that backward needs."""
        *operands, ctx.block_size, ctx.with_attention = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        """Gradients to the inputs that need one, None for the others."""
        *operands, _, _ = ctx.needs_input_grad
        wanted = Operands(*operands)
        options = (ctx.block_size, ctx.with_attention, wanted.pair)
        differentiate = _attend_backward if torch.compiler.is_compiling() else _AttendBackward.apply
        gradients = (*differentiate(*cotangents, *ctx.saved_tensors, *options), None)
        found = tuple(x if needed else None for x, needed in zip(gradients, wanted, strict=True))
        return *found, None, None


class _EagerAttend(_Attend):
    """`_Attend` with an error for forward mode; `torch.compile` does not support a jvp rule."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(ONLY_REVERSE_MODE)


@torch.library.custom_op("ipa_twins::attend", mutates_args=())
def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_points: Tensor,
    key_points: Tensor,
    weights: Tensor,
    pair: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    block_size: int,
    with_attention: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs o (B, H, N, Cv), o_pair (B, N, H, c_z) and attention (B, H, N, N); the last two may be empty.

    Takes the fields of `Operands`. A block_size of 0 means the default.
    """
    operands = Operands(queries, keys, values, query_points, key_points, weights, pair, bias, mask)
    o, o_pair, attention = _outputs(operands, with_attention)
    for example in range(len(queries)):
        blocks = Blocks(operands.example(example))
        for rows in blocks.rows(block_size):
            pair_rows = blocks.pair_rows(rows)
            weight = blocks.attention(rows, blocks.bias_logits(pair_rows))
            o[example, :, rows] = torch.bmm(weight, blocks.values)
            if pair_rows is not None:
                torch.bmm(weight.transpose(0, 1), pair_rows, out=o_pair[example, rows])
            if with_attention:
                attention[example, :, rows] = weight
    return o, o_pair, attention


@torch.library.custom_op("ipa_twins::attend_backward", mutates_args=())
def _attend_backward(
    d_o: Tensor,
    d_o_pair: Tensor,
    d_attention: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_points: Tensor,
    key_points: Tensor,
    weights: Tensor,
    pair: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    block_size: int,
    with_attention: bool,
    with_d_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to the first eight inputs of `_attend`, empty where the input is None or needs no gradient."""
    operands = Operands(queries, keys, values, query_points, key_points, weights, pair, bias, mask)
    gradients = _gradients(operands, with_d_pair)
    d_queries, d_keys, d_values, d_query_points, d_key_points, d_weights, d_pair, d_bias = gradients
    heads = queries.shape[1]
    for example in range(len(queries)):
        blocks = Blocks(operands.example(example))
        points = _PointGradients(blocks)
        for rows in blocks.rows(block_size):
            pair_rows = blocks.pair_rows(rows)
            on_pair = both = None
            if pair_rows is not None:
                on_pair, both = _products_with_pair(blocks, pair_rows, d_o_pair[example, rows])
            weight = blocks.attention(rows, None if bias is None or both is None else both[:heads])
            rows_d_o = d_o[example, :, rows].contiguous()
            d_logits = blocks.scratch("d_logits", weight.shape)
            torch.bmm(rows_d_o, blocks.values.transpose(1, 2), out=d_logits)
            if both is not None:
                d_logits += both[-heads:]
            if with_attention:
                d_logits += d_attention[example, :, rows]
            d_logits -= torch.sum(weight * d_logits, -1, keepdim=True)
            d_logits *= weight
            d_values[example].baddbmm_(weight.transpose(1, 2), rows_d_o)
            d_queries[example, :, rows] = torch.bmm(d_logits, blocks.keys)
            d_keys[example].baddbmm_(d_logits.transpose(1, 2), blocks.queries[:, rows])
            points.add(rows, d_logits)
            if pair_rows is None or on_pair is None or both is None:
                continue
            if bias is not None:
                d_bias += torch.bmm(d_logits.transpose(0, 1), pair_rows).sum(0).T
            if with_d_pair:
                _write_pair_gradient(d_pair[example, rows], on_pair, both, weight, None if bias is None else d_logits)
        points.into(d_query_points[example], d_key_points[example], d_weights)
    return gradients


def _products_with_pair(blocks: Blocks, pair_rows: Tensor, d_o_pair: Tensor) -> tuple[Tensor, Tensor]:
    """[W_bᵀ; dO_pair] of each row, and its product with the row's pair: the bias and the attention's gradient."""
    on_pair = blocks.beside_bias(d_o_pair)
    both = blocks.scratch("both", (len(on_pair), on_pair.shape[1], pair_rows.shape[1]))
    torch.bmm(on_pair, pair_rows.transpose(1, 2), out=both)
    return on_pair, both.transpose(0, 1)


def _write_pair_gradient(
    d_pair: Tensor, on_pair: Tensor, both: Tensor, weight: Tensor, d_logits: Tensor | None
) -> None:
    """Writes [dL; P]ᵀ [W_bᵀ; dO_pair] of each row (L: logits, P: attention), in one product that overwrites `both`.

    dL is None without a bias.
    """
    heads = len(weight)
    if d_logits is not None:
        both[:heads] = d_logits
    both[-heads:] = weight
    to_pair = both.permute(1, 2, 0)
    if d_pair.dtype == weight.dtype:
        torch.bmm(to_pair, on_pair, out=d_pair)
    else:
        d_pair.copy_(torch.bmm(to_pair, on_pair).to(d_pair.dtype))


class _PointGradients:
    """Gradients to points and point weights, summed over blocks, with the same arithmetic as the distances."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        if blocks.in_float64:
            ones = torch.ones_like(blocks.wide_keys[..., :1])
            self.queries, self.keys = (torch.cat([x, ones], -1) for x in (blocks.wide_queries, blocks.wide_keys))
        else:
            self.queries, self.keys = blocks.query_points, blocks.key_points
        self.by_query, self.by_key = torch.zeros_like(self.queries), torch.zeros_like(self.keys)
        self.by_weight = blocks.weights.new_zeros(blocks.weights.shape)

    def add(self, rows: slice, d_logits: Tensor) -> None:
        """Adds the gradients of one block, from ∂L/∂q = −w·(q − k)."""
        if self.blocks.in_float64:
            wide = d_logits.double()
            self.by_query[:, rows] = torch.bmm(wide, self.keys)
            self.by_key.baddbmm_(wide.transpose(1, 2), self.queries[:, rows])
            return
        for i, offset in enumerate(self.blocks.offsets(rows)):
            moved = d_logits * offset
            self.by_query[:, rows, i] = -moved.sum(-1)
            self.by_key[..., i] += moved.sum(1)
            self.by_weight -= 0.5 * torch.sum(moved * offset, (1, 2))

    def into(self, d_queries: Tensor, d_keys: Tensor, d_weights: Tensor) -> None:
        """Writes the gradients to points, and adds the gradient to the point weights."""
        weights = self.blocks.weights[:, None, None]
        if not self.blocks.in_float64:
            d_queries.copy_(weights * self.by_query)
            d_keys.copy_(weights * self.by_key)
            d_weights += self.by_weight
            return
        q, k = self.blocks.wide_queries, self.blocks.wide_keys
        from_keys, row_sum = self.by_query[..., :-1], self.by_query[..., -1:]
        from_queries, column_sum = self.by_key[..., :-1], self.by_key[..., -1:]
        d_queries.copy_(weights * (from_keys - q * row_sum))
        d_keys.copy_(weights * (from_queries - k * column_sum))
        products = 2 * q * from_keys - q * q * row_sum - k * k * column_sum
        d_weights += 0.5 * torch.sum(products, (1, 2))


def _outputs(operands: Operands, with_attention: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates the outputs of `_attend`."""
    queries, pair = operands.queries, operands.pair
    examples, heads, number, _ = queries.shape
    return (
        torch.empty_like(operands.values),
        queries.new_empty(0 if pair is None else (examples, number, heads, pair.shape[-1])),
        queries.new_empty((examples, heads, number, number) if with_attention else 0),
    )


def _gradients(
    operands: Operands, with_d_pair: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocates the outputs of `_attend_backward`; zeros where blocks add to them."""
    queries, pair, bias = operands.queries, operands.pair, operands.bias
    return (
        torch.empty_like(queries),
        torch.zeros_like(operands.keys),
        torch.zeros_like(operands.values),
        torch.empty_like(operands.query_points),
        torch.empty_like(operands.key_points),
        torch.zeros_like(operands.weights),
        queries.new_empty(0) if pair is None or not with_d_pair else torch.empty_like(pair),
        queries.new_empty(0) if bias is None else torch.zeros_like(bias),
    )


@_attend.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    *operands, _, with_attention = inputs
    return _outputs(Operands(*operands), with_attention)


@_attend_backward.register_fake
def _(d_o: Tensor, d_o_pair: Tensor, d_attention: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *operands, _, _, with_d_pair = inputs
    return _gradients(Operands(*operands), with_d_pair)


_attend.register_vmap(partial(one_by_one, _attend))
_attend_backward.register_vmap(partial(one_by_one, _attend_backward))

_AttendBackward = without_derivative(_attend_backward)
