"""Both frameworks behind the same calls, numpy in and numpy out, so that one test serves both."""

from __future__ import annotations

import contextlib
import functools
from functools import cache, cached_property
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest

from ipa_bridge.weights import canonical_from_haiku, canonical_from_torch
from ipa_bridge.weights.tensors import numpy_array, torch_tensor
from ipa_parity.frameworks import jax_point_attention
from ipa_parity.structure_module.stages import named_layers, target_of


def torch_is_at_least(version: str) -> bool:
    """True if PyTorch is installed in at least this version."""
    try:
        installed = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False
    return tuple(map(int, installed.split(".")[:2])) >= tuple(map(int, version.split(".")))


def needs_torch(version: str) -> pytest.MarkDecorator:
    """Skips a test that an older PyTorch's Dynamo cannot trace (see docs/versions.md)."""
    return pytest.mark.skipif(not torch_is_at_least(version), reason=f"needs the Dynamo of PyTorch {version}")


MASKS = ("mask", "key_mask", "pair_mask")


class Jax:
    """JAX, with `ipa_jax` where Haiku is installed."""

    name = "jax"

    def __init__(self):
        self.jax = pytest.importorskip("jax")
        self.apply_structure_module = cache(
            lambda config: self.jax.jit(self.package.transform_structure_module(config).apply)
        )
        self.structure_module_gradients = cache(self._structure_module_gradients)

    @cached_property
    def package(self):
        pytest.importorskip("haiku")
        import ipa_jax

        return ipa_jax

    @cached_property
    def Rigid(self):
        return self.package.Rigid

    @cached_property
    def attend(self):
        """The attention's core, which needs no Haiku."""
        return jax_point_attention()

    @cached_property
    def geometry(self):
        """Rigids, and every function of atoms and frames, compiled."""
        names = [name for name in self.package.__all__ if "atom" in name or "frames" in name]
        compiled = {name: self.jax.jit(getattr(self.package, name)) for name in names}
        return SimpleNamespace(Rigid=self.Rigid, **compiled)

    def array(self, x):
        return None if x is None else self.jax.numpy.asarray(x)

    def at_hand(self, x):
        """Inputs that are not arrays of the framework, as a user may pass them."""
        return x

    def numpy(self, x):
        return np.asarray(x)

    def jit(self, function):
        return self.jax.jit(function)

    def vmap(self, function):
        return self.jax.vmap(function)

    def transforms(self, *inputs):
        """Transformations under which a function sees no values."""
        return (self.jax.jit,)

    def shapes(self, function):
        """Only traces a function, because compiling takes longer than running; returns no outputs."""
        self.jax.eval_shape(function)
        return []

    def gradient(self, function, *arrays):
        """Gradients of a function of the framework's arrays that returns a scalar."""
        return [np.asarray(x) for x in self.jax.jit(self.jax.grad(function, tuple(range(len(arrays)))))(*arrays)]

    def gradients_of_sum(self, function, *arrays):
        """Gradients of the sum of a function's output, zero where it does not depend on an array."""
        grads = self.jax.grad(lambda *xs: function(*xs).sum(), tuple(range(len(arrays))))(*map(self.array, arrays))
        return [np.asarray(x) for x in grads]

    def ipa(self, case, *inputs):
        """The attention of a case, on the given inputs."""
        return self.package.transform_ipa(case.config).apply(case.weights.to_haiku(), *inputs)

    def on_gpu(self):
        return self

    def as_kernels_need(self, arrays):
        """Uses 64-bit numbers for float64 only; with them the interpreter mixes integer types, which JAX refuses."""
        return self.jax.enable_x64(arrays["q"].dtype == np.float64)

    def run_attention(self, arrays, cotangents, **options):
        """Outputs of the core, and gradients to every array but the masks."""
        arrays = {name: self.array(x) for name, x in arrays.items()}
        masks = {name: arrays.pop(name) for name in MASKS if name in arrays}

        def scalar(arrays):
            outputs = [x for x in self.attend(**arrays, **masks, **options) if x is not None]
            weighted = (x * self.array(c).astype(x.dtype) for x, c in zip(outputs, cotangents, strict=False))
            return sum(x.sum() for x in weighted), outputs

        gradients, outputs = self.jax.jit(self.jax.grad(scalar, has_aux=True))(arrays)
        return [np.asarray(x) for x in outputs], {n: np.asarray(x) for n, x in gradients.items() if x is not None}

    def run_structure_module(self, case, *, rigids=None, update_mask=None):
        """Predictions of every layer, by stage."""
        params, single, pair, aatype, mask, rigids, update_mask = self.arguments(case, rigids, update_mask)
        apply = self.apply_structure_module(case.config)
        output = apply(params, None, single, pair, aatype, mask, rigids=rigids, update_mask=update_mask)
        return named_layers(self.jax.tree.map(np.asarray, output))

    def run_structure_module_eagerly(self, case):
        params, *inputs, _, _ = self.arguments(case, None, None)
        return self.package.transform_structure_module(case.config).apply(params, None, *inputs)

    def loss_and_gradients(self, case, start):
        """The whole loss, and its gradients to representations, start frames and every parameter."""
        params, single, pair, aatype, mask, rigids, _ = self.arguments(case, start, None)
        target = target_of(self.package, case, self.array)
        gradients = self.structure_module_gradients(case.config)
        value, found = gradients(params, single, pair, rigids, aatype, mask, target)
        params, single, pair, rigids = self.jax.tree.map(np.asarray, found)
        named = canonical_from_haiku(params, case.weights.root)
        return float(value), {"single": single, "pair": pair, **rigids._asdict(), **named}

    def _structure_module_gradients(self, config):
        apply = self.package.transform_structure_module(config).apply

        def loss(params, single, pair, rigids, aatype, mask, target):
            output = apply(params, None, single, pair, aatype, mask, rigids=rigids)
            return self.package.structure_module_loss(output, target).loss

        return self.jax.jit(self.jax.value_and_grad(loss, (0, 1, 2, 3)))

    def arguments(self, case, rigids, update_mask):
        """A structure module's parameters and inputs."""
        arrays = (case.single, case.pair, case.aatype, case.mask)
        rigids = None if rigids is None else self.Rigid(*map(self.array, rigids))
        params = self.jax.tree.map(self.array, case.weights.to_haiku())
        return params, *map(self.array, arrays), rigids, self.array(update_mask)


class Torch:
    """PyTorch, and `ipa_torch`."""

    name = "torch"

    def __init__(self, device="cpu"):
        self.torch, self.device = pytest.importorskip("torch"), device
        import ipa_torch

        self.package, self.Rigid, self.attend = ipa_torch, ipa_torch.Rigid, ipa_torch.point_attention
        self.geometry = ipa_torch  # functions of atoms and frames

    def array(self, x):
        return None if x is None else torch_tensor(x).to(self.device)

    def at_hand(self, x):
        """Inputs that are not arrays of the framework, as a user may pass them."""
        return self.array(x)

    def numpy(self, x):
        return numpy_array(x)

    def jit(self, function):
        return self.torch.compile(function, fullgraph=True, backend="aot_eager")

    def vmap(self, function):
        return self.torch.func.vmap(function)

    def transforms(self, *inputs):
        """Transformations under which a function sees no values: compilation and export."""

        def exported(function):
            module = type("Module", (self.torch.nn.Module,), {"forward": lambda _, *xs: function(*xs)})()
            return self.torch.export.export(module, inputs).module()

        compiled = functools.partial(self.torch.compile, fullgraph=True, backend="eager")
        return (compiled, exported) if torch_is_at_least("2.8") else (compiled,)

    def shapes(self, function):
        """The outputs that are not integers."""
        outputs = self.torch.utils._pytree.tree_leaves(function())
        return [x.numpy() for x in outputs if x is not None and "int" not in str(x.dtype)]

    def gradient(self, function, *arrays):
        """Gradients of a function of the framework's arrays that returns a scalar."""
        leaves = [x.clone().requires_grad_() for x in arrays]
        return [x.numpy() for x in self.torch.autograd.grad(function(*leaves), leaves)]

    def gradients_of_sum(self, function, *arrays):
        """Gradients of the sum of a function's output, zero where it does not depend on an array."""
        leaves = [self.array(x).requires_grad_() for x in arrays]
        grads = self.torch.autograd.grad(function(*leaves).sum(), leaves, allow_unused=True, materialize_grads=True)
        return [x.detach().numpy() for x in grads]

    def ipa(self, case, *inputs):
        """The attention of a case, on the given inputs."""
        module = self.package.InvariantPointAttention(case.config)
        module.load_state_dict(case.weights.to_torch())
        return module(*inputs)

    def on_gpu(self):
        return Torch("cuda")

    def tensors(self, arrays):
        return {name: self.array(x) for name, x in arrays.items()}

    @contextlib.contextmanager
    def as_kernels_need(self, arrays):
        """Fills all unwritten memory with NaN."""
        was = self.torch.are_deterministic_algorithms_enabled()
        self.torch.use_deterministic_algorithms(True, warn_only=self.device != "cpu")
        try:
            yield
        finally:
            self.torch.use_deterministic_algorithms(was)

    def run_attention(self, arrays, cotangents, **options):
        """Outputs of the core, and gradients to every array but the masks."""
        tensors = self.tensors(arrays)
        leaves = {n: x.requires_grad_() for n, x in tensors.items() if x is not None and n not in MASKS}
        outputs = [x for x in self.attend(**tensors, **options) if x is not None]
        scalar = sum((x * self.array(c).to(x.dtype)).sum() for x, c in zip(outputs, cotangents, strict=False))
        found = self.torch.autograd.grad(scalar, list(leaves.values()))
        return [self.numpy(x) for x in outputs], {n: self.numpy(x) for n, x in zip(leaves, found, strict=True)}

    def run_structure_module(self, case, *, rigids=None, update_mask=None):
        """Predictions of every layer, by stage."""
        single, pair, aatype, mask, rigids, update_mask = self.arguments(case, rigids, update_mask)
        with self.torch.no_grad():
            output = self.structure_module(case)(single, pair, aatype, mask, rigids=rigids, update_mask=update_mask)
        return named_layers(self.torch.utils._pytree.tree_map(lambda x: x.numpy(), output))

    def run_structure_module_eagerly(self, case):
        return self.run_structure_module(case)

    def loss_and_gradients(self, case, start):
        """The whole loss, and its gradients to representations, start frames and every parameter."""
        single, pair, aatype, mask, rigids, _ = self.arguments(case, start, None)
        module = self.structure_module(case)
        parameters = dict(module.named_parameters())
        leaves = [x.requires_grad_() for x in (single, pair, *rigids)] + list(parameters.values())
        target = target_of(self.package, case, self.array)
        loss = self.package.structure_module_loss(module(single, pair, aatype, mask, rigids=rigids), target).loss
        gradients = [x.numpy() for x in self.torch.autograd.grad(loss, leaves)]
        inputs = dict(zip(("single", "pair", "rotation", "translation"), gradients[:4], strict=True))
        named = canonical_from_torch(dict(zip(parameters, gradients[4:], strict=True)), case.config)
        return loss.item(), {**inputs, **named}

    def structure_module(self, case):
        module = self.package.StructureModule(case.config).eval().to(self.array(case.single).dtype)
        module.load_state_dict(case.weights.to_torch())
        return module

    def arguments(self, case, rigids, update_mask):
        """A structure module's inputs."""
        arrays = (case.single, case.pair, case.aatype, case.mask)
        rigids = None if rigids is None else self.Rigid(*map(self.array, rigids))
        return *map(self.array, arrays), rigids, self.array(update_mask)


@cache
def one_of(kind):
    """One object for all tests, so that JAX compiles each function once."""
    return kind()
