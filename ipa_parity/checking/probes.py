"""Inputs that tell right attentions from wrong ones, and what a right one makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins import Structure
from ipa_bridge.weights import Weights
from ipa_parity.attention.cases import Case, make_case
from ipa_parity.attention.stages import Arrays, run_oracle
from ipa_parity.checking.formula import NUMPY, Backend, Formula, Inputs, compute, jax_backend, torch_backend
from ipa_parity.frameworks import installed_frameworks

RESIDUES = 17
"""Length of the random inputs: an odd number, so that no two axes are alike."""


@dataclass(frozen=True)
class Probe:
    """One input in one dtype, with the oracle's results."""

    case: Case
    dtype: str

    @property
    def name(self) -> str:
        """The case's name."""
        return self.case.name

    @cached_property
    def rounded(self) -> Case:
        """The case, rounded to the dtype."""
        return self.case.astype(self.dtype)

    @cached_property
    def truth(self) -> Arrays:
        """The oracle's stages."""
        return run_oracle(self.rounded)

    @cached_property
    def conditioning(self) -> float:
        """Factor on the bounds: coordinates take more bits the further they are from the origin."""
        points = np.abs(self.truth["points"]).max()
        largest = np.abs(self.case.translation).max() / self.case.config.position_scale
        return 1.0 + float(largest / points) if points else 1.0

    def compute(self, formula: Formula) -> Arrays:
        """Stages of another formula, in float64."""
        parameters = {name: x.astype(np.float64) for name, x in self.rounded.weights.arrays.items()}
        return compute(formula, parameters, self.case.config, self.inputs(np.asarray, np.float64), NUMPY)

    def inputs(self, array: Any, dtype: Any) -> Inputs:
        """The inputs of a formula."""
        case = self.rounded
        arrays = (case.single, case.pair, case.rotation, case.translation, case.mask)
        return Inputs(*(None if x is None else array(x.astype(dtype)) for x in arrays))

    def gradients(self, formula: Formula) -> Arrays:
        """Gradients of Σ cotangent·out of a formula in float64, through PyTorch or JAX."""
        through = _through_torch if "torch" in installed_frameworks() else _through_jax
        return through(self, formula)


def _through_torch(probe: Probe, formula: Formula) -> Arrays:
    import torch

    def leaf(x: np.ndarray) -> Any:
        return torch.from_numpy(np.array(x, np.float64)).requires_grad_()

    inputs = probe.inputs(leaf, np.float64)
    parameters = {name: leaf(x) for name, x in probe.rounded.weights.arrays.items()}
    out = compute(formula, parameters, probe.case.config, inputs, torch_backend())["out"]
    leaves = _leaves(inputs, parameters)
    cotangent = torch.from_numpy(probe.rounded.cotangent.astype(np.float64))
    found = torch.autograd.grad(
        (out * cotangent).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {f"gradient/{name}": x.numpy() for name, x in zip(leaves, found, strict=True)}


def _through_jax(probe: Probe, formula: Formula) -> Arrays:
    import jax

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        inputs = probe.inputs(jax.numpy.asarray, np.float64)
        parameters = {name: jax.numpy.asarray(x.astype(np.float64)) for name, x in probe.rounded.weights.arrays.items()}
        cotangent = probe.rounded.cotangent.astype(np.float64)
        backend: Backend = jax_backend()

        def loss(leaves: Mapping[str, Any]) -> Any:
            given = inputs._replace(**{name: x for name, x in leaves.items() if name in Inputs._fields})
            named = {name: leaves[name] for name in parameters}
            return (compute(formula, named, probe.case.config, given, backend)["out"] * cotangent).sum()

        found = jax.grad(loss)(_leaves(inputs, parameters))
        return {f"gradient/{name}": np.asarray(x) for name, x in found.items()}


def _leaves(inputs: Inputs, parameters: Mapping[str, Any]) -> dict[str, Any]:
    given = inputs._asdict()
    del given["mask"]
    return {name: x for name, x in given.items() if x is not None} | dict(parameters)


def make_probes(
    config: IPAConfig,
    *,
    seed: int = 0,
    weights: Weights | None = None,
    structure: Structure | None = None,
    masked: bool = True,
) -> Iterator[Case]:
    """Inputs for an attention with this config, the ordinary one first.

    Args:
        config: the attention's config.
        seed: seed of all random numbers.
        weights: the attention's weights; None for seeded ones, with point weights of both signs.
        structure: a protein to add.
        masked: False for an attention without a mask.
    """
    given = weights or _seeded(config, seed)

    def case(name: str, shape: tuple[int, ...] = (RESIDUES,), **options: Any) -> Case:
        made = make_case(name, config, shape, seed=seed, weights=given, **options)
        mask = made.mask if masked else np.ones_like(made.mask)
        return replace(made, mask=mask, cotangent=made.cotangent * mask[..., None])

    yield case("random frames")
    yield _near_zero(case("points near zero"))
    yield case("far from the origin", offset=1000.0)
    yield case("a batch", (2, 11))
    if structure is not None:
        yield case("the structure", structure=structure)


def _seeded(config: IPAConfig, seed: int) -> Weights:
    weights = Weights.random(config, seed=seed + 1, dtype=np.float64)
    gamma = np.random.default_rng(seed).uniform(0.4, 1.6, config.num_head)
    if config.point_weight_form == "softplus":
        gamma[::2] *= -1
    return replace(weights, arrays={**weights.arrays, "trainable_point_weights": gamma})


def _near_zero(case: Case) -> Case:
    """The case with value points about as long as the root of ε, and lengths that count as much as without it."""
    config = case.config
    epsilon = config.norm_epsilon or 1e-8
    small = math.sqrt(epsilon) if config.norm_form == "add" else epsilon
    arrays = dict(case.weights.arrays)
    for name, x in arrays.items():
        if name.startswith("kv_point_local"):
            by_head = x.reshape(*x.shape[:-1], 3, config.num_head, -1)
            factor = np.where(np.arange(by_head.shape[-1]) < config.num_point_qk, 1.0, small)
            arrays[name] = (by_head * factor).reshape(x.shape)
        elif name.startswith("v_point_projection"):
            arrays[name] = small * x
    first = config.num_head * (config.num_scalar_v + 3 * config.num_point_v)
    last = first + config.num_head * config.num_point_v
    output = np.array(arrays["output_projection/weights"])
    output[first:last] /= small
    arrays["output_projection/weights"] = output
    return replace(case, weights=replace(case.weights, arrays=arrays), translation=np.zeros_like(case.translation))
