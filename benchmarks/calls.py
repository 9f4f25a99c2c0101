"""Calls of an implementation on fixed inputs, forwards and backwards, in either framework.

Backwards means gradients of the outputs' squared sum to what an implementation's inputs and parameters are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ipa_bridge.weights.tensors import torch_tensor

FORWARD, BACKWARD = "forward", "forward + backward"
DIRECTIONS = (FORWARD, BACKWARD)

Call = Callable[[], Any]
"""It returns when its result is there; on a GPU, PyTorch's when its work is launched."""

Calls = Mapping[str, Callable[[], Call]]
"""By direction, what makes a call ready."""


def torch_calls(forward: Callable[[], Sequence[Any]], leaves: Sequence[Any]) -> Calls:
    """A function that returns outputs, and what gradients are taken of, None aside."""
    import torch

    wanted = [x for x in leaves if x is not None]

    def backward() -> Any:
        return torch.autograd.grad(sum((x.float() ** 2).sum() for x in forward()), wanted, allow_unused=True)

    inference = torch.no_grad()(forward)
    return {FORWARD: lambda: inference, BACKWARD: lambda: backward}


def jax_calls(forward: Callable[..., Any], leaves: tuple[Any, ...], others: tuple[Any, ...] = ()) -> Calls:
    """A function of what gradients are taken of and of what not, under jit."""
    import jax

    def call(leaves: tuple[Any, ...], others: tuple[Any, ...]) -> Any:
        return forward(*leaves, *others)

    def loss(leaves: tuple[Any, ...], others: tuple[Any, ...]) -> Any:
        return sum((x.astype("float32") ** 2).sum() for x in jax.tree.leaves(call(leaves, others)))

    inputs = jax.device_put((leaves, others))
    return {FORWARD: partial(CompiledByJax, call, *inputs), BACKWARD: partial(CompiledByJax, jax.grad(loss), *inputs)}


class CompiledByJax:
    """A call of a function that is compiled, which knows what memory XLA planned."""

    def __init__(self, function: Callable[..., Any], *inputs: Any) -> None:
        import jax

        self.inputs = inputs
        self.compiled = jax.jit(function).lower(*inputs).compile()

    @property
    def planned_bytes(self) -> int:
        """Bytes of temporaries and outputs; 0 where XLA does not say."""
        plan = self.compiled.memory_analysis()
        return int(plan.temp_size_in_bytes + plan.output_size_in_bytes) if plan else 0

    def launch(self) -> Any:
        """Calls, without waiting for the result."""
        return self.compiled(*self.inputs)

    def __call__(self) -> Any:
        """Calls, and waits."""
        import jax

        return jax.block_until_ready(self.launch())


def as_torch(x: Any) -> Any:
    """A tensor of the same memory; one of PyTorch's as it is."""
    import torch

    return x if isinstance(x, torch.Tensor) else torch_tensor(x)


def as_jax(x: Any) -> Any:
    """An array of the same memory, of a tensor of PyTorch's; anything else as it is."""
    if not hasattr(x, "detach"):
        return x
    import jax

    return jax.dlpack.from_dlpack(x.detach().contiguous())
