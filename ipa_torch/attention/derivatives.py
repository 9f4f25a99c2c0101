"""Limits operators that have their own backward to first derivatives in reverse mode; others raise an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ONLY_REVERSE_MODE = (
    "this implementation has first derivatives in reverse mode only; implementation='reference' has all others"
)


def wants_gradients(inputs: Sequence[Any]) -> bool:
    """True if any of these inputs needs a gradient."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def without_derivative(operator: Callable) -> Any:
    """Wraps an operator in an autograd function whose own derivative raises NotImplementedError."""

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
    """Rule for `vmap` of an operator: runs the examples, which are large, one after the other without copying them."""
    each = [
        operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(xs) for xs in zip(*each, strict=True))
    return outputs, (0,) * len(outputs)
