"""Compares outputs and gradients of AlphaFold's attention before and after it is replaced, on random input."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.replacement import RESIDUES
from ipa_bridge.tolerance import bound
from ipa_bridge.weights import Weights
from ipa_jax.replace.recognise import Recognised

_Params = dict[str, dict[str, Any]]


def compare_with_original(attention: Recognised, replacement: Any) -> float:
    """Largest difference from AlphaFold's outputs over their largest value, in epsilons of float32.

    Gradients to activations, frames and parameters are compared too, and lengths of zero, which show the ε.

    Raises:
        ValueError: outputs or gradients differ more than rounding explains, or the attention cannot be run.
    """
    where = attention.module.__name__
    # Multimer's geometry asserts float32. With x64 on, its own constants are float64 and fail that.
    try:
        with (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.default_matmul_precision("highest"),
        ):
            expected, actual = (_run(attention, kind) for kind in (attention.original, replacement))
    except Exception as error:
        raise ValueError(
            f"{where}: its InvariantPointAttention could not be compared before and after on random input: "
            f"{type(error).__name__}: {error}; pass verify=False to replace it without comparison"
        ) from error
    apart = {}
    for part, x in expected.items():
        # The gradient of this bias is zero: what is left of its terms is judged by the gradient of its weights.
        scale = expected[part.replace("bias", "weights")] if part.endswith("attention_2d/bias") else x
        apart[part] = _apart(actual[part] - x, scale)
        explained = bound("gradient" if part.startswith("gradient") else "out", "float32")
        if not apart[part] <= explained:
            raise ValueError(
                f"{where}: its InvariantPointAttention has the parameters of AlphaFold's attention but computes "
                f"another function: {part}: {apart[part]:.3g} eps of float32 apart on random input, where rounding "
                f"explains {explained}; nothing was replaced; to replace others, name them in modules="
            )
    return apart["outputs"]


def _apart(difference: np.ndarray, scale: np.ndarray) -> float:
    """The largest difference over the largest magnitude (over 1 if that is zero), in epsilons of float32."""
    largest = float(np.abs(scale).max()) or 1.0
    return float(np.abs(difference).max()) / largest / float(np.finfo(np.float32).eps)


def _run(attention: Recognised, kind: Any) -> dict[str, np.ndarray]:
    """Outputs of valid residues, all gradients, and outputs where every length is zero, of one class."""
    config = attention.config
    rng = np.random.default_rng(0)
    valid = rng.random(RESIDUES) > 0.1
    drawn = [rng.standard_normal((RESIDUES, *x)) for x in ((config.num_channel,), (RESIDUES, config.pair_channel or 0))]
    arrays = tuple(x.astype(np.float32) for x in (*drawn, *random_frames(rng, (RESIDUES,), spread=1.5)))
    cotangent = (rng.standard_normal((RESIDUES, config.num_channel)) * valid[:, None]).astype(np.float32)
    params = Weights.random(config).to_haiku()

    def forward(single: Array, pair: Array, rotation: Array, translation: Array) -> Array:
        frames = _alphafold_frames(attention, rotation, translation)
        built = kind(config, SimpleNamespace(zero_init=False), name="invariant_point_attention")
        return built(single, pair, jnp.asarray(valid[:, None], jnp.float32), frames)

    transformed: Any = hk.without_apply_rng(hk.transform(forward))

    def differentiate(params: _Params, arrays: tuple[Array, ...]) -> Any:
        out, pullback = jax.vjp(lambda p, x: transformed.apply(p, *x), params, arrays)
        return out, pullback(jnp.asarray(cotangent))

    compiled = jax.jit(differentiate)
    out, (to_params, to_arrays) = compiled(params, arrays)
    single, pair, rotation, translation = arrays
    lengths, _ = compiled(_without_values(params), (single, 0 * pair, rotation, 0 * translation))
    found = {"outputs": out[valid], "outputs where points have no length but their ε": lengths[valid]}
    found |= {
        f"gradient to {x}": y for x, y in zip(("single", "pair", "rotations", "translations"), to_arrays, strict=True)
    }
    found |= {f"gradient to {path}/{leaf}": y for path, leaves in to_params.items() for leaf, y in leaves.items()}
    return {part: np.asarray(x, np.float64) for part, x in found.items()}


def _without_values(params: _Params) -> _Params:
    """Parameters with which all values and value points are zero, and outputs only read lengths."""

    def is_zero(path: str, leaf: str) -> bool:
        name = path.rpartition("invariant_point_attention/")[2]
        return name.startswith(("kv_", "v_")) or (name, leaf) == ("output_projection", "bias")

    return {
        path: {leaf: np.zeros_like(x) if is_zero(path, leaf) else x for leaf, x in leaves.items()}
        for path, leaves in params.items()
    }


def _alphafold_frames(attention: Recognised, rotation: Array, translation: Array) -> Any:
    """The frames in the class that the attention takes, which its module or its class's module has imported."""
    monomer = attention.config.layout == "monomer"
    name = "quat_affine" if monomer else "geometry"
    defining = (sys.modules.get(x.__module__) for x in type.mro(attention.original))
    frames = next((vars(x)[name] for x in (attention.module, *defining) if x and name in vars(x)), None)
    if frames is None:
        raise ValueError(f"{name} was expected among the names of {attention.module.__name__}, for its frames")
    if monomer:
        return frames.QuatAffine(None, translation, rotation=rotation, unstack_inputs=True)
    return frames.Rigid3Array(frames.Rot3Array.from_array(rotation), frames.Vec3Array.from_array(translation))
