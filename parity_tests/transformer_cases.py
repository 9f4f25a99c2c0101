"""Blocks and transformers, inputs for them, and their runs in both frameworks."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from ipa_bridge.config import IPABlockConfig, IPATransformerConfig
from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.weights import Weights
from ipa_bridge.weights.tensors import numpy_dtype, torch_tensor
from ipa_parity.attention.cases import ODD, ODD_MULTIMER, ODD_NO_PAIR
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.report import compare

FRAMEWORKS = ("jax", "torch")
BLOCKS = {
    "post-norm": IPABlockConfig(ipa=ODD, transition_factor=2),
    "pre-norm": IPABlockConfig(ipa=ODD_MULTIMER, post_norm=False, num_layer_in_transition=2),
    "no pair": IPABlockConfig(ipa=ODD_NO_PAIR, num_layer_in_transition=1),
    "lucidrains": IPABlockConfig.lucidrains(16, heads=3, ff_mult=2),
    "lucidrains pre-norm": IPABlockConfig.lucidrains(16, heads=3, post_norm=False, require_pairwise_repr=False),
}
TRANSFORMERS = {
    "plain": IPATransformerConfig(block=BLOCKS["post-norm"], num_layer=2),
    "tokens and points": IPATransformerConfig(
        block=BLOCKS["no pair"], num_layer=2, num_token=5, predict_points=True, detach_rotations=False
    ),
    "original order": IPATransformerConfig.lucidrains(
        16, depth=3, heads=3, num_tokens=7, predict_points=True, original_composition_order=True
    ),
    "pre-norm blocks": IPATransformerConfig(block=BLOCKS["pre-norm"], num_layer=2, predict_points=True),
}
RESIDUES = 9


def framework(name: str) -> str:
    if name not in installed_frameworks():
        pytest.skip(f"{name} is not installed")
    return name


def draw(config, shape=(RESIDUES,), seed=0, dtype="float64") -> dict:
    """Weights, and inputs by name, rounded to a dtype."""
    rng, to = np.random.default_rng(seed), numpy_dtype(dtype)
    ipa = config.ipa
    single = rng.standard_normal((*shape, ipa.num_channel)).astype(to)
    if getattr(config, "num_token", None) is not None:
        single = rng.integers(0, config.num_token, shape)
    pair = rng.standard_normal((*shape, shape[-1], ipa.pair_channel)).astype(to) if ipa.pair_channel else None
    rotation, translation = (x.astype(to) for x in random_frames(rng, shape, spread=2.0))
    mask = rng.random(shape) > 0.2
    mask[..., shape[-1] // 2], mask[..., 0] = False, True
    return {
        "weights": Weights.random(config, seed=seed + 1).astype(to),
        "single": single,
        "pair": pair,
        "rotation": rotation,
        "translation": translation,
        "mask": mask,
    }


def run(framework: str, config, inputs: dict, *, gradients: bool = False) -> dict[str, np.ndarray]:
    """Outputs by name, and gradients of their squared sum to parameters and frames."""
    weights, arrays = inputs["weights"], [inputs[x] for x in ("single", "pair", "rotation", "translation", "mask")]
    return (run_jax if framework == "jax" else run_torch)(config, weights, arrays, gradients)


def run_jax(config, weights, arrays, gradients):
    import jax

    arrays = [None if x is None else jax.numpy.asarray(x) for x in arrays]
    params = jax.tree.map(jax.numpy.asarray, weights.to_haiku())
    outputs, gradient = compiled_by_jax(config)
    found = jax.tree.map(np.asarray, outputs(params, *arrays))
    if gradients:
        by_module, *by_frames = gradient(params, *arrays)
        again = Weights.from_haiku(jax.tree.map(np.asarray, by_module), config=config)
        found |= {f"gradient/{name}": x for name, x in again.arrays.items()}
        found |= {f"gradient/{x}": np.asarray(y) for x, y in zip(("rotation", "translation"), by_frames, strict=True)}
    return found


@cache
def compiled_by_jax(config):
    """Functions for outputs and for gradients of their squared sum; cached, because JAX compiles slowly."""
    import haiku as hk
    import jax

    import ipa_jax

    if isinstance(config, IPATransformerConfig):
        transformed = ipa_jax.transform_ipa_transformer(config)
    else:
        transformed = hk.transform(lambda *xs: ipa_jax.IPABlock(config)(*xs))

    def outputs(params, single, pair, rotation, translation, mask):
        found = transformed.apply(params, None, single, pair, ipa_jax.Rigid(rotation, translation), mask)
        if not isinstance(config, IPATransformerConfig):
            return {"act": found}
        named = {"act": found.act, "rotation": found.rigids.rotation, "translation": found.rigids.translation}
        return named | ({} if found.points is None else {"points": found.points})

    loss = lambda *xs: sum((x**2).sum() for x in outputs(*xs).values())  # noqa: E731
    return jax.jit(outputs), jax.jit(jax.grad(loss, (0, 3, 4)))


def run_torch(config, weights, arrays, gradients):
    import torch

    import ipa_torch

    single, pair, rotation, translation, mask = (None if x is None else torch_tensor(x) for x in arrays)
    whole = isinstance(config, IPATransformerConfig)
    module = (ipa_torch.IPATransformer if whole else ipa_torch.IPABlock)(config).eval()
    module.to(next(iter(weights.to_torch().values())).dtype).load_state_dict(weights.to_torch())
    rotation.requires_grad_(), translation.requires_grad_()
    out = module(single, pair, ipa_torch.Rigid(rotation, translation), mask)
    found = {"act": out}
    if whole:
        found = {"act": out.act, "rotation": out.rigids.rotation, "translation": out.rigids.translation}
        found |= {} if out.points is None else {"points": out.points}
    arrays = {
        name: x.detach().float().numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()
        for name, x in found.items()
    }
    if gradients:
        sum((x**2).sum() for x in found.values()).backward()
        grads = {name: x.grad for name, x in module.named_parameters()}
        arrays |= {f"gradient/{name}": x for name, x in Weights.from_torch(grads, config=config).arrays.items()}
        arrays |= {"gradient/rotation": rotation.grad.numpy(), "gradient/translation": translation.grad.numpy()}
    return arrays


def assert_close(actual, expected, mask, dtype):
    """Asserts that every stage is within the tolerance table in valid residues."""
    assert actual.keys() == expected.keys()
    for stage, x in expected.items():
        gradient = stage.startswith("gradient/")
        meaningful = None
        if not gradient:
            meaningful = np.broadcast_to(mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim)), x.shape)
        row = compare(
            actual[stage],
            x,
            case="transformer",
            stage=stage,
            dtype=dtype,
            subject="one",
            reference="other",
            meaningful=meaningful,
        )
        zero = gradient and not np.abs(x).max() > 1e-12
        assert zero or row.passed, str(row)
