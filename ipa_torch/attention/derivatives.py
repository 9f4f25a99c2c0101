"""Derivatives of operators with a backward of their own: first ones in reverse mode; others are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ONLY_REVERSE_MODE = (
    "this implementation has first derivatives in reverse mode only; implementation='reference' has all others"
)


def wants_gradients(inputs: Sequence[Any]) -> bool:
    """True where backward will be asked for a gradient to any of these."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def without_derivative(operator: Callable) -> Any:
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
            raise NotImplementedError(ONLY_REVERSE_MODE)

    return Once


def one_by_one(operator: Callable, info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple]:
    """An operator under vmap: its examples one after the other, for each is large and none need be copied."""
    each = [
        operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(xs) for xs in zip(*each, strict=True))
    return outputs, (0,) * len(outputs)
