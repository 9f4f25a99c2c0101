"""The reference's function, a block of query rows at a time: nothing of N×N but the pair, its gradient and a block.

Softmax runs over whole rows, so nothing is approximated; backward computes each block's attention anew. Squared
distances lose nothing to cancellation: they are sums of squared differences, or on CPU in float32 the usual product
|q|² + |k|² − 2 q·k in float64, which has the bits to spare and is a matrix product.

Forward and backward are each an opaque operator (for `torch.compile` and `torch.export`) inside an autograd function
(for `torch.func.grad` and `vmap`). Forward-mode and higher derivatives are refused: the reference has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ipa_bridge.kernels import CHUNK_BYTES

BLOCK_BYTES = 6 << 20
"""Of the pair in one block; between 4 and 8 MB the optimum is flat, where a block stays in cache."""

MOST_ROWS = 64
"""Of a block, where the pair's rows are short."""

SMALLEST_WEIGHT = 1e-30
"""Attention weights below are zero: subnormal numbers slow a CPU's products threefold and add nothing."""

ONLY_REVERSE_MODE = (
    "this implementation has first derivatives in reverse mode only; implementation='reference' has all others"
)


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
    """Outputs, and attention weights if asked for; all tensors but `pair` in one dtype of at least float32."""
    arrays = scaled(q, k, v, q_points, k_points, v_points, pair, pair_bias_weight, point_weights, mask)
    inputs = (*arrays, block_size or 0, return_attention)
    if not torch.compiler.is_compiling():
        o, o_pair, attention = _EagerAttend.apply(*inputs)
    elif wants_gradients(arrays):
        o, o_pair, attention = _Attend.apply(*inputs)
    else:  # Dynamo has no place for an autograd function without gradients.
        o, o_pair, attention = _attend(*inputs)
    *batch, number, heads, _ = v.shape
    return (
        *unpacked(o, v, v_points),
        None if pair is None else o_pair.reshape(*batch, number, heads, pair.shape[-1]),
        attention.reshape(*batch, heads, number, number) if return_attention else None,
    )


def scaled(
    q: Float[Tensor, "*B N H C"],
    k: Float[Tensor, "*B N H C"],
    v: Float[Tensor, "*B N H Cv"],
    q_points: Float[Tensor, "*B N H P 3"],
    k_points: Float[Tensor, "*B N H P 3"],
    v_points: Float[Tensor, "*B N H Pv 3"],
    pair: Float[Tensor, "*B N N c_z"] | None,
    pair_bias_weight: Float[Tensor, "c_z H"] | None,
    point_weights: Float[Tensor, " H"],
    mask: Float[Tensor, "*B N"] | None,
) -> tuple[Any, ...]:
    """Queries, keys, values, points, weights, pair, bias and mask as `_attend` takes them: one batch axis, heads first.

    Logits are queries·keys − ½ weights·|query points − key points|² + pair·bias.
    """
    *batch, number, _, _ = q.shape
    temperature = math.sqrt(1 / (2 if pair is None else 3))
    queries, keys, values, query_points, key_points = (
        _heads_first(x)
        for x in (
            q * (temperature / math.sqrt(q.shape[-1])),
            k,
            torch.cat([v, v_points.flatten(-2)], -1),
            q_points.flatten(-2),
            k_points.flatten(-2),
        )
    )
    rows = queries.shape[0]
    return (
        queries,
        keys,
        values,
        query_points,
        key_points,
        point_weights * (temperature * math.sqrt(2 / (9 * q_points.shape[-2]))),
        None if pair is None else pair.reshape(rows, *pair.shape[-3:]),
        None if pair is None or pair_bias_weight is None else pair_bias_weight * temperature,
        None if mask is None else mask.expand(*batch, number).reshape(rows, number),
    )


def unpacked(
    o: Float[Tensor, "B H N C"], v: Float[Tensor, "*B N H Cv"], v_points: Float[Tensor, "*B N H Pv 3"]
) -> tuple[Float[Tensor, "*B N H Cv"], Float[Tensor, "*B N H Pv 3"]]:
    """The values' part of an output and the points' part, in their shapes."""
    o = o.transpose(1, 2).reshape(*v.shape[:-1], o.shape[-1])
    return o[..., : v.shape[-1]], o[..., v.shape[-1] :].unflatten(-1, v_points.shape[-2:])


def wants_gradients(inputs: Sequence[Any]) -> bool:
    """Whether any of them will be asked for one."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def default_block_size(number: int, heads: int, pair_channel: int, *, on_gpu: bool = False) -> int:
    """Query rows at a time, so that their part of the pair stays in cache; on a GPU, that their logits do.

    There blocks are as large as that and an eighth of the pair allow, for each costs the same number of launches.
    """
    if on_gpu:
        return max(1, min(number, max(MOST_ROWS, number // 8), CHUNK_BYTES // max(1, 4 * heads * number)))
    return max(1, min(number, MOST_ROWS, BLOCK_BYTES // max(1, 4 * number * max(pair_channel, 1))))


def _heads_first(x: Float[Tensor, "*B N H D"]) -> Float[Tensor, "B H N D"]:
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]).transpose(1, 2).contiguous()


class _Attend(torch.autograd.Function):
    """The streamed core with its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `_attend`."""
        return _attend(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """What backward needs are the inputs alone."""
        ctx.block_size, ctx.with_attention = inputs[9], inputs[10]
        ctx.save_for_backward(*inputs[:9])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        """First derivatives, of what needs one."""
        needed = ctx.needs_input_grad
        options = (ctx.block_size, ctx.with_attention, needed[6])
        differentiate = _attend_backward if torch.compiler.is_compiling() else _AttendBackward.apply
        gradients = differentiate(*cotangents, *ctx.saved_tensors, *options)
        known = (*gradients, None, None, None)
        return tuple(x if wanted else None for x, wanted in zip(known, needed, strict=True))


class _EagerAttend(_Attend):
    """The same, with a word to who wants forward mode; under `torch.compile` there is no place for one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """There is none."""
        raise NotImplementedError(ONLY_REVERSE_MODE)


def without_derivative(operator: Callable, message: str) -> Any:
    """An operator as an autograd function that has no derivative of its own, and says so."""

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> tuple[Tensor, ...]:
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            raise NotImplementedError(message)

    return Once


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
    """Sums o (B, H, N, Cv), o_pair (B, N, H, c_z) and attention (B, H, N, N), the last two empty where there is none.

    Of queries, keys (B, H, N, C), scaled; values (B, H, N, Cv); points (B, H, N, 3P); weights (H,) of half the squared
    distances; pair (B, N, N, c_z), in any dtype, and the weights of its bias (c_z, H), scaled; and mask (B, N).
    """
    o, o_pair, attention = _outputs(queries, values, pair, with_attention)
    for example in range(len(queries)):
        block = _Blocks(example, queries, keys, values, query_points, key_points, weights, pair, bias, mask)
        for rows in block.rows(block_size):
            pair_rows = block.pair_rows(rows)
            weight = block.attention(rows, block.bias_logits(pair_rows))
            o[example, :, rows] = torch.bmm(weight, block.values)
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
    """Gradients to the first eight inputs of `_attend`, empty where there is no such input or none is wanted."""
    inputs = (queries, keys, values, query_points, key_points, weights, pair, bias)
    gradients = _gradients(*inputs, with_d_pair)
    d_queries, d_keys, d_values, d_query_points, d_key_points, d_weights, d_pair, d_bias = gradients
    heads = queries.shape[1]
    for example in range(len(queries)):
        block = _Blocks(example, *inputs, mask)
        points = _PointGradients(block)
        for rows in block.rows(block_size):
            pair_rows = block.pair_rows(rows)
            both: Any = None
            if pair_rows is not None:
                # [W_bᵀ; dO_pair] of each row against its pair: the bias and what the softmax is told, in one product.
                on_pair = block.beside_bias(d_o_pair[example, rows])
                both = block.scratch("both", (len(on_pair), on_pair.shape[1], pair_rows.shape[1]))
                torch.bmm(on_pair, pair_rows.transpose(1, 2), out=both)
                both = both.transpose(0, 1)
            weight = block.attention(rows, None if bias is None else both[:heads])
            rows_d_o = d_o[example, :, rows].contiguous()
            d_logits = block.scratch("d_logits", weight.shape)
            torch.bmm(rows_d_o, block.values.transpose(1, 2), out=d_logits)
            if both is not None:
                d_logits += both[-heads:]
            if with_attention:
                d_logits += d_attention[example, :, rows]
            d_logits -= torch.sum(weight * d_logits, -1, keepdim=True)
            d_logits *= weight
            d_values[example].baddbmm_(weight.transpose(1, 2), rows_d_o)
            d_queries[example, :, rows] = torch.bmm(d_logits, block.keys)
            d_keys[example].baddbmm_(d_logits.transpose(1, 2), block.queries[:, rows])
            points.add(rows, d_logits)
            if pair_rows is None:
                continue
            if bias is not None:
                d_bias += torch.bmm(d_logits.transpose(0, 1), pair_rows).sum(0).T
            if with_d_pair:
                # [dL; P]ᵀ [W_bᵀ; dO_pair], again in one.
                if bias is not None:
                    both[:heads] = d_logits
                both[-heads:] = weight
                to_pair = both.permute(1, 2, 0)
                if d_pair.dtype == weight.dtype:
                    torch.bmm(to_pair, on_pair, out=d_pair[example, rows])
                else:
                    d_pair[example, rows] = torch.bmm(to_pair, on_pair).to(d_pair.dtype)
        points.into(d_query_points[example], d_key_points[example], d_weights)
    return gradients


class _Blocks:
    """One example's inputs as its blocks need them, and memory that the blocks share."""

    def __init__(
        self,
        example: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        query_points: Tensor,
        key_points: Tensor,
        weights: Tensor,
        pair: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        each = (queries, keys, values, query_points, key_points)
        self.queries, self.keys, self.values, self.query_points, self.key_points = (x[example] for x in each)
        self.weights, self.pair = weights, None if pair is None else pair[example]
        self.bias = None if bias is None else bias.T.contiguous()
        self.in_float64 = queries.dtype == torch.float32 and queries.device.type == "cpu"
        self.buffers: dict[str, Tensor] = {}
        left, right = self.queries, self.keys
        if mask is not None:  # one more channel: 1e5·m_i·(m_j − 1), exactly zero where the key is valid
            row = mask[example][None, :, None].expand(len(left), -1, 1)
            left, right = torch.cat([left, row], -1), torch.cat([right, 1e5 * (row - 1)], -1)
        self.left, self.right = left, right.transpose(1, 2).contiguous()
        if self.in_float64:
            self.wide_queries, self.wide_keys = self.query_points.double(), self.key_points.double()
            weight = weights.double()[:, None, None]
            length2 = [torch.sum(x * x, -1, keepdim=True) for x in (self.wide_queries, self.wide_keys)]
            one = torch.ones_like(length2[0])
            self.wide_left = torch.cat([self.wide_queries, -0.5 * length2[0], -0.5 * one], -1) * weight
            self.wide_right = torch.cat([self.wide_keys, one, length2[1]], -1).transpose(1, 2).contiguous()

    def rows(self, block_size: int) -> list[slice]:
        """The blocks' query rows; 0 for the default."""
        number, width = self.queries.shape[1], 0 if self.pair is None else self.pair.shape[-1]
        on_gpu = self.queries.device.type == "cuda"
        block_size = block_size or default_block_size(number, len(self.queries), width, on_gpu=on_gpu)
        return [slice(start, min(start + block_size, number)) for start in range(0, number, block_size)]

    def scratch(self, name: str, shape: Sequence[int]) -> Tensor:
        """Memory that blocks use one after the other."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.queries.new_empty(size)
        return self.buffers[name][:size].view(shape)

    def pair_rows(self, rows: slice) -> Tensor | None:
        """The pair of the rows, in the dtype of the arithmetic."""
        return None if self.pair is None else self.pair[rows].to(self.queries.dtype)

    def bias_logits(self, pair_rows: Tensor | None) -> Tensor | None:
        """The pair's part of the rows' logits, (H, b, N)."""
        if self.bias is None or pair_rows is None:
            return None
        number, keys, _ = pair_rows.shape
        logits = self.scratch("bias", (number, len(self.bias), keys))
        torch.bmm(self.bias.expand(number, -1, -1), pair_rows.transpose(1, 2), out=logits)
        return logits.transpose(0, 1)

    def beside_bias(self, rows: Tensor) -> Tensor:
        """[W_bᵀ; rows] of each query, (b, 2H, c_z); rows alone without a bias."""
        rows = rows.to(self.queries.dtype)
        return rows if self.bias is None else torch.cat([self.bias.expand(len(rows), -1, -1), rows], 1)

    def attention(self, rows: slice, bias_logits: Tensor | None) -> Tensor:
        """Softmax of the rows' logits, (H, b, N)."""
        left = self.left[:, rows]
        shape = (*left.shape[:2], self.right.shape[-1])
        logits = torch.bmm(left, self.right, out=self.scratch("logits", shape))
        if bias_logits is not None:
            logits += bias_logits
        if self.in_float64:
            logits += torch.bmm(self.wide_left[:, rows], self.wide_right)
        else:
            distance2 = torch.zeros_like(logits)
            for offset in self.offsets(rows):
                distance2.addcmul_(offset, offset)
            logits.addcmul_(distance2, self.weights[:, None, None], value=-0.5)
        weight = torch.softmax(logits, -1, out=self.scratch("weight", shape))
        return torch.threshold_(weight, SMALLEST_WEIGHT, 0.0)

    def offsets(self, rows: slice) -> Iterator[Tensor]:
        """Differences q − k, one coordinate of one point after the other, (H, b, N)."""
        for q, k in zip(self.query_points[:, rows].unbind(-1), self.key_points.unbind(-1), strict=True):
            yield q[:, :, None] - k[:, None, :]


class _PointGradients:
    """Gradients to points and their weights, summed over blocks, in the arithmetic of the distances."""

    def __init__(self, block: _Blocks) -> None:
        self.block = block
        if block.in_float64:
            ones = torch.ones_like(block.wide_keys[..., :1])
            self.queries, self.keys = (torch.cat([x, ones], -1) for x in (block.wide_queries, block.wide_keys))
        else:
            self.queries, self.keys = block.query_points, block.key_points
        self.by_query, self.by_key = torch.zeros_like(self.queries), torch.zeros_like(self.keys)
        self.by_weight = block.weights.new_zeros(block.weights.shape)

    def add(self, rows: slice, d_logits: Tensor) -> None:
        """Of one block, by ∂L/∂q = −w·(q − k)."""
        if self.block.in_float64:
            wide = d_logits.double()
            self.by_query[:, rows] = torch.bmm(wide, self.keys)
            self.by_key.baddbmm_(wide.transpose(1, 2), self.queries[:, rows])
            return
        for i, offset in enumerate(self.block.offsets(rows)):
            moved = d_logits * offset
            self.by_query[:, rows, i] = -moved.sum(-1)
            self.by_key[..., i] += moved.sum(1)
            self.by_weight -= 0.5 * torch.sum(moved * offset, (1, 2))

    def into(self, d_queries: Tensor, d_keys: Tensor, d_weights: Tensor) -> None:
        """Writes the gradients to points and adds those to weights."""
        weights = self.block.weights[:, None, None]
        if not self.block.in_float64:
            d_queries.copy_(weights * self.by_query)
            d_keys.copy_(weights * self.by_key)
            d_weights += self.by_weight
            return
        q, k = self.block.wide_queries, self.block.wide_keys
        from_keys, row_sum = self.by_query[..., :-1], self.by_query[..., -1:]
        from_queries, column_sum = self.by_key[..., :-1], self.by_key[..., -1:]
        d_queries.copy_(weights * (from_keys - q * row_sum))
        d_keys.copy_(weights * (from_queries - k * column_sum))
        products = 2 * q * from_keys - q * q * row_sum - k * k * column_sum
        d_weights += 0.5 * torch.sum(products, (1, 2))


def _outputs(
    queries: Tensor, values: Tensor, pair: Tensor | None, with_attention: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `_attend` returns."""
    examples, heads, number, _ = queries.shape
    return (
        torch.empty_like(values),
        queries.new_empty(0 if pair is None else (examples, number, heads, pair.shape[-1])),
        queries.new_empty((examples, heads, number, number) if with_attention else 0),
    )


def _gradients(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_points: Tensor,
    key_points: Tensor,
    weights: Tensor,
    pair: Tensor | None,
    bias: Tensor | None,
    with_d_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `_attend_backward` returns; zero where blocks add to it."""
    return (
        torch.empty_like(queries),
        torch.zeros_like(keys),
        torch.zeros_like(values),
        torch.empty_like(query_points),
        torch.empty_like(key_points),
        torch.zeros_like(weights),
        queries.new_empty(0) if pair is None or not with_d_pair else torch.empty_like(pair),
        queries.new_empty(0) if bias is None else torch.zeros_like(bias),
    )


@_attend.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _outputs(queries, values, rest[3], rest[-1])


@_attend_backward.register_fake
def _(
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
) -> tuple[Tensor, ...]:
    return _gradients(queries, keys, values, query_points, key_points, weights, pair, bias, with_d_pair)


def one_by_one(operator: Callable, info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple]:
    """An operator under vmap: its examples one after the other, for each is large and none need be copied."""
    each = [
        operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(xs) for xs in zip(*each, strict=True))
    return outputs, (0,) * len(outputs)


_attend.register_vmap(partial(one_by_one, _attend))
_attend_backward.register_vmap(partial(one_by_one, _attend_backward))

_AttendBackward = without_derivative(_attend_backward, ONLY_REVERSE_MODE)
