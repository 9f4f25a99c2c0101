"""The same attention as `streamed`, in GPU kernels that read the pair once forward and once backward.

The kernels (`ipa_torch.attention.kernels`) exchange the logits of one chunk of query rows, which stay in the GPU's
cache. Apart from the pair and its gradient, no N×N array is held. Arithmetic is in float32.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ipa_bridge.tiling import Sizes, chunks, stride, unsupported
from ipa_torch.attention.derivatives import one_by_one, wants_gradients, without_derivative
from ipa_torch.attention.masks import HIDDEN
from ipa_torch.attention.operands import Operands, unpack

OLDEST_TRITON = (3, 6)
"""Oldest version that the kernels were tested with."""


def _installed_triton() -> tuple[int, ...] | None:
    """Triton's version, or None if it is not installed. Does not import Triton, which would load a compiler."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    except (importlib.metadata.PackageNotFoundError, ValueError):  # a local build, assumed to be new enough
        return OLDEST_TRITON


_TRITON = _installed_triton()

INTERPRETED = False
"""If True, Triton interprets the kernels, on any device. For tests only, which also set TRITON_INTERPRET=1."""


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
    allowed: Float[Tensor, "*B Q N"] | None = None,
    logit_terms: int,
    distance_epsilon: float | None = None,
    block_size: int | None = None,
    return_attention: bool = False,
) -> tuple[
    Float[Tensor, "*B N H Cv"],
    Float[Tensor, "*B N H Pv 3"],
    Float[Tensor, "*B N H c_z"] | None,
    None,
]:
    """Outputs o, o_points and o_pair, and None in place of the attention; all tensors but `pair` are float32.

    Raises:
        NotImplementedError: the kernels do not support these arguments or this device; the message gives the reason.
    """
    if block_size is not None:
        raise NotImplementedError(f"implementation 'fused' has no blocks: leave block_size None, got {block_size}")
    if return_attention:
        raise NotImplementedError("implementation 'fused' cannot return the attention; implementation='streamed' can")
    arrays = (q, k, v, q_points, k_points, v_points, pair, pair_bias_weight, point_weights, mask, allowed)
    operands = Operands.from_inputs(*arrays, logit_terms)
    reason = None
    if allowed is not None and allowed.shape[-2] != 1:
        reason = "no pair_mask was expected, which its kernels do not read"
    elif distance_epsilon is not None:
        reason = "distance_form 'squared' was expected, which is the only one in its kernels"
    operands = _with_hidden_keys(operands)
    reason = reason or unsupported(_sizes(operands), _name(q), None if pair is None else _name(pair))
    reason = reason or _no_place_to_run(q.device.type)
    if reason:
        raise NotImplementedError(f"implementation='fused': {reason}; implementation='streamed' has no such limit")
    if wants_gradients(operands) or not torch.compiler.is_compiling():
        o, o_pair, _ = _Attend.apply(*operands[:-1])
    else:  # Dynamo cannot trace an autograd function if no input needs a gradient.
        o, o_pair, _ = _attend(*operands[:-1])
    return *unpack(o, v, v_points), None if pair is None else o_pair.reshape(*v.shape[:-1], pair.shape[-1]), None


def _with_hidden_keys(operands: Operands) -> Operands:
    """Operands as the kernels take them: a pair has a bias, and a channel of queries and keys stands for the key mask.

    The channel adds 0 to the logits of a visible key and HIDDEN to those of a hidden one.
    """
    queries, keys, pair, bias = operands.queries, operands.keys, operands.pair, operands.bias
    if pair is not None and bias is None:
        bias = queries.new_zeros(pair.shape[-1], queries.shape[1])
    if operands.allowed is not None:
        hidden = ((1 - operands.allowed[:, :1, :, None]) * HIDDEN).expand(*keys.shape[:-1], 1)
        queries = torch.cat([queries, torch.ones_like(hidden)], -1)
        keys = torch.cat([keys, hidden], -1)
    return operands._replace(queries=queries, keys=keys, bias=bias, allowed=None)


def _no_place_to_run(device: str) -> str | None:
    """Reason why the kernels cannot run on a device, or None if they can."""
    if _TRITON is None:
        return "the package triton is needed and is not installed"
    if _TRITON < OLDEST_TRITON:
        oldest, got = (".".join(map(str, x)) for x in (OLDEST_TRITON, _TRITON))
        return f"triton {oldest} or later was expected, as PyTorch 2.11 installs it; got {got}"
    if device != "cuda" and not INTERPRETED:
        return f"tensors on a CUDA device were expected; got {device}"
    return None


def _kernels() -> ModuleType:
    """The module of the kernels, imported here because it imports Triton."""
    return importlib.import_module("ipa_torch.attention.kernels")


class _Attend(torch.autograd.Function):
    """The fused attention with its first derivative in reverse mode; it has no other derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `_attend`."""
        return _attend(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Saves inputs and outputs for backward, which computes sums over rows from the outputs."""
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        """Gradients to the inputs that need one, None for the others."""
        wanted = Operands(*ctx.needs_input_grad)
        differentiate = _attend_backward if torch.compiler.is_compiling() else _AttendBackward.apply
        gradients = (*differentiate(*cotangents[:2], *ctx.saved_tensors, wanted.pair), None)
        return tuple(x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad, strict=True))


@torch.library.custom_op("ipa_twins::fused_attend", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs o (B, H, N, Cv), o_pair (B, N, H, c_z) or empty without a pair, and log Σ exp of the logits (B, H, N).

    Takes the fields of `Operands`.
    """
    operands = Operands(queries, keys, values, query_points, key_points, weights, pair, bias, mask)
    o, o_pair, lse = _outputs(operands)
    sizes = _sizes(operands)
    arrays = _arrays(operands)
    run = _launch(operands, sizes)
    logits = queries.new_empty(_room(sizes))
    arrays |= {"o": o, "o_pair": o_pair, "lse": lse, "logits": logits, "out": logits}
    with torch.cuda.device_of(queries):
        for chunk in chunks(sizes):
            for kernel in ("logits", "attend_to_pair", "attend"):
                run(kernel, arrays, chunk=chunk)
    return o, o_pair, lse


@torch.library.custom_op("ipa_twins::fused_attend_backward", mutates_args=())
def _attend_backward(
    d_o: Tensor,
    d_o_pair: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_points: Tensor,
    key_points: Tensor,
    weights: Tensor,
    pair: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    o: Tensor,
    o_pair: Tensor,
    log_sum: Tensor,
    with_d_pair: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to the first eight inputs of `_attend`, empty where the input is None or needs no gradient."""
    operands = Operands(queries, keys, values, query_points, key_points, weights, pair, bias, mask)
    gradients = _gradients(operands, with_d_pair)
    d_queries, d_keys, d_values, d_query_points, d_key_points, d_weights, d_pair, d_bias = gradients
    sizes = _sizes(operands)
    arrays = _arrays(operands)
    d_o, d_o_pair = d_o.contiguous(), d_o_pair.contiguous()
    delta = torch.sum(d_o * o, -1)
    if pair is not None:
        delta += torch.sum(d_o_pair * o_pair, -1).transpose(1, 2)
    by_query = torch.empty_like(log_sum)
    arrays |= {
        "d_o": d_o,
        "d_o_pair": d_o_pair,
        "lse": log_sum,
        "delta": delta.contiguous(),
        "d_queries": d_queries,
        "d_keys": d_keys,
        "d_values": d_values,
        "d_query_points": d_query_points,
        "d_key_points": d_key_points,
        "d_weights": by_query,
        "d_pair": d_pair,
    }
    run = _launch(operands, sizes, backward=True, d_pair=with_d_pair)
    logits, attention = (queries.new_empty(_room(sizes)) for _ in range(2))
    by_row = queries.new_empty(0 if bias is None else (_most_queries(sizes), sizes.heads, sizes.pair_channel))
    arrays |= {"logits": logits, "out": logits, "d_attention": attention, "d_bias": by_row}
    arrays |= {"d_logits": logits, "attention": attention}
    with torch.cuda.device_of(queries):
        for chunk in chunks(sizes):
            for kernel in ("logits", "pair_gradients", "query_gradients", "key_gradients"):
                run(kernel, arrays, chunk=chunk)
            if bias is not None:
                d_bias += by_row[: chunk.examples * chunk.rows].sum(0).T
    d_weights += by_query.sum((0, 2))
    return gradients


def _most_queries(sizes: Sizes) -> int:
    """Number of queries in the largest chunk."""
    return max((chunk.examples * chunk.rows for chunk in chunks(sizes)), default=0)


def _room(sizes: Sizes) -> int:
    """Number of elements in a buffer for one chunk's logits; all chunks reuse it."""
    return _most_queries(sizes) * sizes.heads * stride(sizes)


def _sizes(operands: Operands) -> Sizes:
    examples, heads, number, channels = operands.queries.shape
    width = 0 if operands.pair is None else operands.pair.shape[-1]
    return Sizes(examples, number, heads, channels, operands.query_points.shape[-1], operands.values.shape[-1], width)


def _arrays(operands: Operands) -> dict[str, Tensor | None]:
    """Arguments that all kernels share, as contiguous tensors."""
    by_head = operands._replace(bias=None if operands.bias is None else operands.bias.T)
    unused = dict.fromkeys(("d_o", "d_attention"))
    return {**unused, **{name: None if x is None else x.contiguous() for name, x in by_head._asdict().items()}}


def _launch(operands: Operands, sizes: Sizes, *, backward: bool = False, d_pair: bool = False) -> Callable:
    """Function that launches a kernel, given its name, its arrays and a chunk."""
    return partial(
        _kernels().run,
        sizes=sizes,
        pair_dtype=None if operands.pair is None else _name(operands.pair),
        has_mask=operands.mask is not None,
        backward=backward,
        d_pair=d_pair,
        interpret=INTERPRETED,
    )


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _outputs(operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Allocates the outputs of `_attend`."""
    queries, values, pair = operands.queries, operands.values, operands.pair
    examples, heads, number, _ = queries.shape
    return (
        values.new_empty(values.shape),
        queries.new_empty(0 if pair is None else (examples, number, heads, pair.shape[-1])),
        queries.new_empty(examples, heads, number),
    )


def _gradients(
    operands: Operands, with_d_pair: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocates the outputs of `_attend_backward`; zeros where chunks add to them."""
    queries, pair, bias = operands.queries, operands.pair, operands.bias
    return (
        queries.new_empty(queries.shape),
        operands.keys.new_zeros(operands.keys.shape),
        operands.values.new_zeros(operands.values.shape),
        operands.query_points.new_empty(operands.query_points.shape),
        operands.key_points.new_zeros(operands.key_points.shape),
        operands.weights.new_zeros(operands.weights.shape),
        queries.new_empty(0) if pair is None or not with_d_pair else pair.new_empty(pair.shape),
        queries.new_empty(0) if bias is None else bias.new_zeros(bias.shape),
    )


@_attend.register_fake
def _(*operands: Any) -> tuple[Tensor, ...]:
    return _outputs(Operands(*operands))


@_attend_backward.register_fake
def _(d_o: Tensor, d_o_pair: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *operands, _, _, _, with_d_pair = inputs
    return _gradients(Operands(*operands), with_d_pair)


_attend.register_vmap(partial(one_by_one, _attend))
_attend_backward.register_vmap(partial(one_by_one, _attend_backward))

_AttendBackward = without_derivative(_attend_backward)
