"""Compares the outputs of AlphaFold's attention before and after it is replaced, on random input."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import haiku as hk
import jax
import numpy as np
from jaxtyping import Array

from ipa_bridge.config import IPAConfig, Layout
from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.replacement import RESIDUES
from ipa_bridge.tolerance import bound
from ipa_bridge.weights import Weights


def compare_with_original(where: str, original: Any, replacement: Any, config: IPAConfig) -> float:
    """Largest difference from AlphaFold's outputs over their largest value, in epsilons of float32.

    Raises:
        ValueError: outputs differ more than rounding explains, or the attention cannot be run.
    """
    rng = np.random.default_rng(0)
    frames = random_frames(rng, (RESIDUES,), spread=1.5)
    valid = rng.random(RESIDUES) > 0.1
    drawn = [rng.standard_normal((RESIDUES, config.num_channel))]
    drawn += [rng.standard_normal((RESIDUES, RESIDUES, config.pair_channel or 0))]
    arrays = [x.astype(np.float32) for x in (*drawn, valid[:, None], *frames)]
    params = Weights.random(config).to_haiku()

    def run(attention: Any) -> np.ndarray:
        def forward(single: Array, pair: Array, mask: Array, rotation: Array, translation: Array) -> Array:
            return attention(config, SimpleNamespace(zero_init=False))(
                single, pair, mask, _alphafold_frames(where, config.layout, rotation, translation)
            )

        transformed: Any = hk.without_apply_rng(hk.transform(forward))
        return np.asarray(jax.jit(transformed.apply)(params, *arrays), np.float64)[valid]

    # Multimer's geometry asserts float32. With x64 on, its own constants are float64 and fail that.
    try:
        with (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.default_matmul_precision("highest"),
        ):
            expected, actual = run(original), run(replacement)
    except Exception as error:
        raise ValueError(
            f"{where}: its InvariantPointAttention could not be compared before and after on random input: "
            f"{type(error).__name__}: {error}; pass verify=False to replace it without comparison"
        ) from error
    apart = float(np.abs(actual - expected).max() / np.abs(expected).max() / np.finfo(np.float32).eps)
    explained = bound("out", "float32")
    if not apart <= explained:
        raise ValueError(
            f"{where}: its InvariantPointAttention has the parameters of AlphaFold's attention but computes another "
            f"function: {apart:.3g} eps of float32 apart on random input, where rounding explains "
            f"{explained}; nothing was replaced"
        )
    return apart


def _alphafold_frames(where: str, layout: Layout, rotation: Array, translation: Array) -> Any:
    """The frames in the class that AlphaFold's attention takes."""
    package = where.rpartition(".")[0]
    if layout == "monomer":
        quat_affine = importlib.import_module(f"{package}.quat_affine")
        return quat_affine.QuatAffine(None, translation, rotation=rotation, unstack_inputs=True)
    geometry = importlib.import_module(f"{package}.geometry")
    rotations, vectors = geometry.Rot3Array.from_array(rotation), geometry.Vec3Array.from_array(translation)
    return geometry.Rigid3Array(rotations, vectors)
