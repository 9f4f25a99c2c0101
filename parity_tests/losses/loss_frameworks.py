"""Each framework's losses: numpy in, numpy out; and how close two answers must be."""

from __future__ import annotations

import importlib
from functools import cache, partial

import numpy as np
import pytest
from loss_problems import LAYERED, PREDICTED, Frames, Problem, cotangent

from ipa_bridge.tolerance import bound, epsilon
from ipa_bridge.weights.tensors import torch_tensor

DTYPES = ("float32", "float64")


def allowed(stage, dtype="float64"):
    """Error that the tolerance table allows, relative to the largest value."""
    return bound(stage, dtype) * epsilon(dtype)


LOSS, GRADIENT = allowed("loss"), allowed("gradient")


class Jax:
    """numpy in, numpy out, through ipa_jax.losses, under jit."""

    def __init__(self):
        self.jax = pytest.importorskip("jax")
        pytest.importorskip("haiku")
        self.losses = importlib.import_module("ipa_jax.losses")
        self.rigid = importlib.import_module("ipa_jax").Rigid

        self.cache = {}

    def array(self, x):
        return self.jax.numpy.asarray(x)

    def numpy(self, tree):
        return [np.asarray(x) for x in self.jax.tree.leaves(tree)]

    def compiled(self, function, make):
        """The function that `make` returns, compiled once."""
        if (function, make) not in self.cache:
            self.cache[function, make] = self.jax.jit(make(self, function))
        return self.cache[function, make]

    def call(self, function, p):
        return self.numpy(self.compiled(function, Jax.bound)(inputs(self, p)))

    def bound(self, function):
        return partial(function, self.losses)

    def gradients(self, function, p):
        """Gradients of a random combination of the outputs to all parts of the prediction."""
        x = inputs(self, p)
        return self.numpy(self.compiled(function, Jax.gradient)([getattr(x, name) for name in PREDICTED], x))

    def gradient(self, function):
        def scalar(predicted, rest):
            x = rest._replace(**dict(zip(PREDICTED, predicted, strict=True)))
            leaves = self.jax.tree.leaves(function(self.losses, x))
            floats = [y for y in leaves if self.jax.numpy.issubdtype(y.dtype, self.jax.numpy.floating)]
            return sum((y * self.array(cotangent(i, y.shape)).astype(y.dtype)).sum() for i, y in enumerate(floats))

        return self.jax.grad(scalar)

    def vmapped(self, function, p):
        return self.numpy(self.compiled(function, Jax.vmap)(inputs(self, p)))

    def vmap(self, function):
        axes = Problem(*(1 if name in LAYERED else 0 for name in Problem._fields))
        return self.jax.vmap(partial(function, self.losses), (axes,))


class Torch:
    """numpy in, numpy out, through ipa_torch.losses."""

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        self.losses = importlib.import_module("ipa_torch.losses")
        self.rigid = importlib.import_module("ipa_torch").Rigid

    array = staticmethod(torch_tensor)

    def numpy(self, tree):
        return [x.detach().numpy() for x in self.torch.utils._pytree.tree_leaves(tree)]

    def call(self, function, p):
        return self.numpy(function(self.losses, inputs(self, p)))

    def gradients(self, function, p):
        """Gradients of a random combination of the outputs to all parts of the prediction."""
        x = inputs(self, p)
        leaves = self.torch.utils._pytree.tree_leaves([getattr(x, name) for name in PREDICTED])
        for leaf in leaves:
            leaf.requires_grad_()
        outputs = self.torch.utils._pytree.tree_leaves(function(self.losses, x))
        floats = [y for y in outputs if y.is_floating_point()]
        scalar = sum((y * self.array(cotangent(i, y.shape)).to(y.dtype)).sum() for i, y in enumerate(floats))
        if not (hasattr(scalar, "requires_grad") and scalar.requires_grad):
            return [np.zeros(leaf.shape) for leaf in leaves]
        return self.numpy(self.torch.autograd.grad(scalar, leaves, allow_unused=True, materialize_grads=True))

    def vmapped(self, function, p):
        axes = Problem(*(1 if name in LAYERED else 0 for name in Problem._fields))
        x = inputs(self, p)
        axes = Problem(*(self.rigid(a, a) if isinstance(v, Frames) else a for a, v in zip(axes, p, strict=True)))
        return self.numpy(self.torch.func.vmap(partial(function, self.losses), (axes,))(x))


def inputs(framework, p):
    return Problem(
        *(framework.rigid(*map(framework.array, x)) if isinstance(x, Frames) else framework.array(x) for x in p)
    )


@cache
def one_of(kind):
    """One object for all tests, so that JAX compiles each function once."""
    return kind()


def assert_close(actual, expected, relative):
    """Asserts that trees agree: floats relative to the largest value, everything else exactly."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, e = np.asarray(a), np.asarray(e)
        assert a.shape == e.shape, i
        if np.issubdtype(a.dtype, np.floating):
            error = np.abs(a.astype(np.float64) - e).max(initial=0.0)
            assert error <= relative * np.abs(e).max(initial=0.0), (i, error, np.abs(e).max())
        else:
            np.testing.assert_array_equal(a, e.astype(a.dtype))
