"""The losses under the frameworks' transformations, and their memory."""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import needs_torch
from loss_cases import clashes, lddt, plddt, sidechain, total, violations
from loss_frameworks import GRADIENT, LOSS, Jax, Torch, assert_close, inputs, one_of
from loss_problems import cast, synthetic_problem


def test_jax_chunks_keep_memory_linear():
    """No intermediate of forward and backward is as large as frames × points."""
    framework = one_of(Jax)
    jax = framework.jax
    p, chunk = inputs(framework, synthetic_problem()), 4
    n, losses = p.mask.shape[0], framework.losses

    def largest(chunk_size):
        def scalar(atom14):
            x = p._replace(atom14=atom14)
            return sidechain(losses, x, chunk_size=chunk_size) + clashes(losses, x, chunk_size=chunk_size).loss

        return max(sizes(jax.make_jaxpr(jax.grad(scalar))(p.atom14).jaxpr))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (int(np.prod(v.aval.shape)) for v in equation.outvars)
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from sizes(inner)

    assert largest(None) >= 8 * n * 14 * n * 9
    assert largest(chunk) <= 14 * chunk * 14 * n * 9
    assert largest(1000) == largest(None)


def test_torch_chunks_keep_memory_linear():
    """No tensor in forward or backward is as large as frames × points, nor are all saved tensors together."""
    framework = one_of(Torch)
    torch = framework.torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            tensors = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
            self.number = max([self.number, *(x.numel() for x in tensors)])
            return output

    p, chunk, losses = inputs(framework, synthetic_problem()), 4, framework.losses
    n = p.mask.shape[0]

    def measure(chunk_size):
        atom14, kept = p.atom14.clone().requires_grad_(), []
        x = p._replace(atom14=atom14)

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor

        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = sidechain(losses, x, chunk_size=chunk_size) + clashes(losses, x, chunk_size=chunk_size).loss
            loss.backward()
        return largest.number, sum(kept)

    whole, whole_kept = measure(None)
    largest, kept = measure(chunk)
    assert whole >= 8 * n * 14 * n * 3
    assert largest <= 14 * chunk * 14 * n * 9
    assert kept < whole_kept / 20


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.exhaustive)])
@needs_torch("2.11")
def test_torch_compiles_whole(backend):
    """Dynamo compiles them into one graph; the slower test also traces the backward pass ahead of time."""
    framework = one_of(Torch)
    torch = framework.torch

    def everything(x):
        losses = framework.losses
        of_structure = total(losses, x, chains=True, chunk_size=11)
        return of_structure, lddt(losses, x), plddt(losses, x)

    p = synthetic_problem()
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    expected = framework.call(lambda _, x: everything(x), p)
    assert_close(framework.call(lambda _, x: compiled(x), p), expected, LOSS)
    expected = framework.gradients(lambda _, x: everything(x), p)
    assert_close(framework.gradients(lambda _, x: compiled(x), p), expected, GRADIENT)


def test_torch_autocast_changes_nothing():
    framework = one_of(Torch)
    p = cast(synthetic_problem(), "float32")
    expected = [framework.call(function, p) for function in (total, violations, lddt, plddt)]
    with framework.torch.autocast("cpu", dtype=framework.torch.bfloat16):
        actual = [framework.call(function, p) for function in (total, violations, lddt, plddt)]
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 0)
