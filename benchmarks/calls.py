"""Calls of an implementation on fixed inputs, forward only or with backward, in either framework.

The backward pass computes gradients of the sum of squared outputs to the implementation's inputs and parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ipa_bridge.weights.tensors import torch_tensor

FORWARD, BACKWARD = "forward", "forward + backward"
DIRECTIONS = (FORWARD, BACKWARD)

Call = Callable[[], Any]
"""A call returns when its result is ready; with PyTorch on a GPU it returns as soon as its work is launched."""

Calls = Mapping[str, Callable[[], Call]]
"""For each direction, a function that prepares a call."""


def torch_calls(forward: Callable[[], Sequence[Any]], leaves: Sequence[Any]) -> Calls:
    """Calls of `forward`, which returns outputs, and of its gradients to the leaves that are not None."""
    import torch

    wanted = [x for x in leaves if x is not None]

    def backward() -> Any:
        return torch.autograd.grad(sum((x.float() ** 2).sum() for x in forward()), wanted, allow_unused=True)

    inference = torch.no_grad()(forward)
    return {FORWARD: lambda: inference, BACKWARD: lambda: backward}


def jax_calls(forward: Callable[..., Any], leaves: tuple[Any, ...], others: tuple[Any, ...] = ()) -> Calls:
    """Calls under jit of `forward(*leaves, *others)`, and of its gradients to the leaves."""
    import jax

    def call(leaves: tuple[Any, ...], others: tuple[Any, ...]) -> Any:
        return forward(*leaves, *others)

    def loss(leaves: tuple[Any, ...], others: tuple[Any, ...]) -> Any:
        return sum((x.astype("float32") ** 2).sum() for x in jax.tree.leaves(call(leaves, others)))

    inputs = jax.device_put((leaves, others))
    return {FORWARD: partial(CompiledByJax, call, *inputs), BACKWARD: partial(CompiledByJax, jax.grad(loss), *inputs)}


class CompiledByJax:
    """A call of a compiled function, with the memory that XLA planned for it."""

    def __init__(self, function: Callable[..., Any], *inputs: Any) -> None:
        import jax

        self.inputs = inputs
        self.compiled = jax.jit(function).lower(*inputs).compile()

    @property
    def planned_bytes(self) -> int:
        """Bytes of temporaries and outputs; 0 where XLA does not report them."""
        plan = self.compiled.memory_analysis()
        return int(plan.temp_size_in_bytes + plan.output_size_in_bytes) if plan else 0

    def launch(self) -> Any:
        """Starts the call without waiting for its result."""
        return self.compiled(*self.inputs)

    def __call__(self) -> Any:
        """Runs the call and waits for its result."""
        import jax

        return jax.block_until_ready(self.launch())


def as_torch(x: Any) -> Any:
    """A tensor that shares the array's memory; a tensor is returned as it is."""
    import torch

    return x if isinstance(x, torch.Tensor) else torch_tensor(x)


def as_jax(x: Any) -> Any:
    """A JAX array that shares a tensor's memory; anything but a tensor is returned as it is."""
    if not hasattr(x, "detach"):
        return x
    import jax

    return jax.dlpack.from_dlpack(x.detach().contiguous())
