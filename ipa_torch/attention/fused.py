"""The streamed attention's function in GPU kernels that read the pair once, and once more backwards.

Between kernels lie the logits of a chunk of query rows, in the GPU's cache; nothing else of N×N is held. Arithmetic is
float32's (see `ipa_bridge.kernels.point_attention`). On a CPU the kernels run in Triton's interpreter, for tests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ipa_bridge.kernels import INTERPRETED, Sizes, chunks, stride, unsupported
from ipa_torch.attention.streamed import (
    ONLY_REVERSE_MODE,
    one_by_one,
    scaled,
    unpacked,
    wants_gradients,
    without_derivative,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None


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
) -> tuple[
    Float[Tensor, "*B N H Cv"],
    Float[Tensor, "*B N H Pv 3"],
    Float[Tensor, "*B N H c_z"] | None,
    None,
]:
    """Outputs; all tensors but `pair` in float32.

    Raises:
        NotImplementedError: the kernels cannot do this, and why.
    """
    inputs = scaled(q, k, v, q_points, k_points, v_points, pair, pair_bias_weight, point_weights, mask)
    queries, _, values, query_points, _, _, flat_pair, _, _ = inputs
    sizes = _sizes(queries, values, query_points, flat_pair)
    reason = unsupported(sizes, _name(q), None if pair is None else _name(pair)) or _no_place_to_run(q.device.type)
    if reason:
        raise NotImplementedError(f"implementation='fused': {reason}; implementation='streamed' has no such limit")
    if wants_gradients(inputs) or not torch.compiler.is_compiling():
        o, o_pair, _ = _Attend.apply(*inputs)
    else:  # Dynamo has no place for an autograd function without gradients.
        o, o_pair, _ = _attend(*inputs)
    return *unpacked(o, v, v_points), None if pair is None else o_pair.reshape(*v.shape[:-1], pair.shape[-1]), None


def _no_place_to_run(device: str) -> str | None:
    """Why kernels cannot run on a device; None where they can."""
    if not HAS_TRITON:
        return "the package triton was expected, which is not installed"
    if device != "cuda" and not INTERPRETED:
        return f"tensors on a CUDA device were expected; got {device}"
    return None


def _kernels() -> ModuleType:
    """What launches them, with which Triton is imported."""
    return importlib.import_module("ipa_bridge.kernels.launching")


class _Attend(torch.autograd.Function):
    """The fused core with its derivative, which has none of its own; nor is there a forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `_attend`."""
        return _attend(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Backward needs the inputs, and the outputs to take sums over rows from them."""
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        """First derivatives, of what needs one."""
        needed = ctx.needs_input_grad
        differentiate = _attend_backward if torch.compiler.is_compiling() else _AttendBackward.apply
        gradients = (*differentiate(*cotangents[:2], *ctx.saved_tensors, needed[6]), None)
        return tuple(x if wanted else None for x, wanted in zip(gradients, needed, strict=True))


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
    """Sums o (B, H, N, Cv), o_pair (B, N, H, c_z), empty without a pair, and log Σ exp of the logits (B, H, N).

    Of what the streamed attention's operator takes.
    """
    o, o_pair, log_sum = _outputs(queries, values, pair)
    sizes = _sizes(queries, values, query_points, pair)
    arrays = _arrays(queries, keys, values, query_points, key_points, weights, pair, bias, mask)
    run = partial(_kernels().run, sizes=sizes, **_options(pair, mask))
    logits = queries.new_empty(_room(sizes))
    own = {**arrays, "o": o, "o_pair": o_pair, "log_sum": log_sum, "logits": logits, "out": logits}
    with torch.cuda.device_of(queries):
        for chunk in chunks(sizes):
            for kernel in ("logits", "attend_to_pair", "attend"):
                run(kernel, own, chunk=chunk)
    return o, o_pair, log_sum


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
    """Gradients to the first eight inputs of `_attend`, empty where there is no such input or none is wanted."""
    gradients = _gradients((queries, keys, values, query_points, key_points, weights, pair, bias), with_d_pair)
    d_queries, d_keys, d_values, d_query_points, d_key_points, d_weights, d_pair, d_bias = gradients
    sizes = _sizes(queries, values, query_points, pair)
    arrays = _arrays(queries, keys, values, query_points, key_points, weights, pair, bias, mask)
    d_o, d_o_pair = d_o.contiguous(), d_o_pair.contiguous()
    inner = torch.sum(d_o * o, -1)
    if pair is not None:
        inner += torch.sum(d_o_pair * o_pair, -1).transpose(1, 2)
    by_query = torch.empty_like(log_sum)
    arrays |= {
        "d_o": d_o,
        "d_o_pair": d_o_pair,
        "log_sum": log_sum,
        "inner": inner.contiguous(),
        "d_queries": d_queries,
        "d_keys": d_keys,
        "d_values": d_values,
        "d_query_points": d_query_points,
        "d_key_points": d_key_points,
        "d_weights": by_query,
        "d_pair": d_pair,
    }
    run = partial(_kernels().run, sizes=sizes, **_options(pair, mask, backward=True, d_pair=with_d_pair))
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
    """Of any chunk."""
    return max((chunk.examples * chunk.rows for chunk in chunks(sizes)), default=0)


def _room(sizes: Sizes) -> int:
    """Of a chunk's logits; the next one has the same."""
    return _most_queries(sizes) * sizes.heads * stride(sizes)


def _sizes(queries: Tensor, values: Tensor, query_points: Tensor, pair: Tensor | None) -> Sizes:
    examples, heads, number, channels = queries.shape
    width = 0 if pair is None else pair.shape[-1]
    return Sizes(examples, number, heads, channels, query_points.shape[-1], values.shape[-1], width)


def _arrays(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_points: Tensor,
    key_points: Tensor,
    weights: Tensor,
    pair: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
) -> dict[str, Tensor | None]:
    """The kernels' arguments that are the same for all of them, contiguous."""
    named = {
        "queries": queries,
        "keys": keys,
        "values": values,
        "query_points": query_points,
        "key_points": key_points,
        "weights": weights,
        "pair": pair,
        "bias": None if bias is None else bias.T,
        "mask": mask,
    }
    unused = dict.fromkeys(("d_o", "d_attention"))
    return {**unused, **{name: None if x is None else x.contiguous() for name, x in named.items()}}


def _options(
    pair: Tensor | None, mask: Tensor | None, *, backward: bool = False, d_pair: bool = False
) -> dict[str, Any]:
    return {
        "pair_dtype": None if pair is None else _name(pair),
        "has_mask": mask is not None,
        "backward": backward,
        "d_pair": d_pair,
    }


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _outputs(queries: Tensor, values: Tensor, pair: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `_attend` returns."""
    examples, heads, number, _ = queries.shape
    return (
        values.new_empty(values.shape),
        queries.new_empty(0 if pair is None else (examples, number, heads, pair.shape[-1])),
        queries.new_empty(examples, heads, number),
    )


def _gradients(
    inputs: Sequence[Tensor | None], with_d_pair: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `_attend_backward` returns; zero where chunks add to it."""
    adds = (False, True, True, False, True, True, False, True)
    wanted = (*inputs[:6], inputs[6] if with_d_pair else None, inputs[7])
    queries: Any = inputs[0]
    return tuple(  # type: ignore[return-value]
        queries.new_empty(0) if x is None else x.new_zeros(x.shape) if add else x.new_empty(x.shape)
        for x, add in zip(wanted, adds, strict=True)
    )


@_attend.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _outputs(queries, values, rest[3])


@_attend_backward.register_fake
def _(d_o: Tensor, d_o_pair: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _gradients(rest[:8], rest[-1])


_attend.register_vmap(partial(one_by_one, _attend))
_attend_backward.register_vmap(partial(one_by_one, _attend_backward))

_AttendBackward = without_derivative(_attend_backward, ONLY_REVERSE_MODE)
