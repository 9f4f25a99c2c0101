"""Runs one attention of a trained model: the real class, and ours in PyTorch and Haiku on its converted weights.

An attention's inputs are float32 numbers that reach it in its own model. The reference is the real class in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import haiku as hk
import jax
import numpy as np
import torch

import ipa_jax
import ipa_torch
from ipa_bridge.config import IPAConfig
from ipa_bridge.weights import Weights, canonical_from_haiku, canonical_from_torch
from ipa_bridge.weights.dialects import find_dialect

LEAVES = ("single", "rotation", "translation", "pair")
"""Inputs to which gradients are taken; a layer may have no pair."""

WITHOUT_GRADIENT = ("rotary_frequencies", "attention_2d/bias")
"""Parameters that the real classes do not train: frequencies are cached, and the bias cancels in the softmax."""

MASKS = ("mask", "key_mask", "pair_mask")


@dataclass
class Call:
    """One call of an attention, in our conventions."""

    leaves: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    extra: dict[str, Any]
    """Further arguments of the real class, such as neighbours or residue indices."""


@dataclass
class Result:
    """An attention's output, and gradients to inputs and to parameters by our names."""

    out: np.ndarray
    gradients: dict[str, np.ndarray]


def cotangent(call: Call) -> np.ndarray:
    """Random weights of the output in the scalar whose gradients are compared."""
    return np.random.default_rng(0).standard_normal(call.leaves["single"].shape).astype(np.float32)


def run_theirs(layer: torch.nn.Module, call: Call, weights: Weights, dialect: str, run: Any) -> Result:
    """The real class, or the same layer with our attention swapped in, in the dtype of its parameters."""
    names = {theirs: ours for ours, (theirs, _) in find_dialect(dialect).names(weights.config).items()}
    state = dict(layer.named_parameters())
    parameters = {name: x for name, x in state.items() if name in names and x.requires_grad}
    dtype = next(layer.parameters()).dtype
    leaves = {name: torch.from_numpy(x).to(dtype).requires_grad_() for name, x in call.leaves.items()}
    out = run(layer, leaves, call.extra)
    found = _torch_gradients(out, call, {**leaves, **parameters})
    every = {name: found.get(name, np.zeros(state[name].shape)) for name in names}
    return Result(_numpy(out), _gradients(found, canonical_from_torch(every, weights.config, dialect)))


def run_torch(call: Call, weights: Weights, dtype: torch.dtype) -> Result:
    """Our module in PyTorch."""
    module = ipa_torch.InvariantPointAttention(weights.config).to(dtype)
    module.load_state_dict(weights.to_torch())
    leaves = {name: torch.from_numpy(x).to(dtype).requires_grad_() for name, x in call.leaves.items()}
    masks = {name: torch.from_numpy(x) for name, x in call.masks.items()}
    rigids = ipa_torch.Rigid(leaves["rotation"], leaves["translation"])
    distances = one_hot(call)
    pair = leaves["pair"] if distances is None else torch.from_numpy(distances).to(dtype)
    out = module(leaves["single"], pair, rigids, **masks)
    parameters = dict(module.named_parameters())
    found = _torch_gradients(out, call, {**leaves, **parameters})
    return Result(_numpy(out), _gradients(found, canonical_from_torch(found, weights.config)))


def run_haiku(call: Call, weights: Weights, dtype: torch.dtype) -> Result:
    """Our module in Haiku, on the parameters that `Weights.to_haiku` returns."""
    wide = np.dtype(str(dtype).removeprefix("torch."))
    params = weights.astype(wide).to_haiku()
    leaves = {name: x.astype(wide) for name, x in call.leaves.items()}
    pair = one_hot(call)
    fixed = None if pair is None else pair.astype(wide)
    out, (to_params, to_leaves) = _haiku(weights.config)(
        params, leaves, fixed, call.masks, cotangent(call).astype(wide)
    )
    named = canonical_from_haiku(jax.tree.map(np.asarray, to_params), weights.root)
    return Result(np.asarray(out), _gradients({name: np.asarray(x) for name, x in to_leaves.items()}, named))


def one_hot(call: Call) -> np.ndarray | None:
    """The pair that stands for distances along the chain, if the layer reads them instead of a pair."""
    if "res_idx" not in call.extra:
        return None
    indices = call.extra["res_idx"]
    return np.eye(128, dtype=np.float32)[(indices[:, None, :] - indices[:, :, None]) % 128]


@cache
def _haiku(config: IPAConfig) -> Any:
    ipa = ipa_jax.transform_ipa(config)

    @jax.jit
    def run(params: hk.Params, leaves: Any, fixed: Any, masks: Any, weight: Any) -> Any:
        def forward(params: hk.Params, leaves: Any) -> jax.Array:
            rigids = ipa_jax.Rigid(leaves["rotation"], leaves["translation"])
            pair = leaves["pair"] if fixed is None else fixed
            return ipa.apply(params, leaves["single"], pair, rigids, **masks)

        out, pull = jax.vjp(forward, params, leaves)
        return out, pull(weight)

    return run


def _torch_gradients(out: torch.Tensor, call: Call, leaves: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    scalar = (out * torch.from_numpy(cotangent(call)).to(out.dtype)).sum()
    found = torch.autograd.grad(scalar, [*leaves.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, map(_numpy, found), strict=True))


def _gradients(by_leaf: dict[str, np.ndarray], by_parameter: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    inputs = {name: by_leaf[name] for name in LEAVES if name in by_leaf}
    return inputs | {name: x for name, x in by_parameter.items() if not name.endswith(WITHOUT_GRADIENT)}


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy()
