"""The local distance difference test and its prediction (Jumper et al. 2021, Suppl. 1.9.6 and Alg. 29)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ipa_bridge.checks import check_shape
from ipa_bridge.config import LossConfig
from ipa_jax.dtypes import at_least_float32
from ipa_jax.losses.numerics import distances


def lddt(
    predicted: Float[Array, "*B N 3"],
    true: Float[Array, "*B N 3"],
    mask: Shaped[Array, "*B N"],
    *,
    cutoff: float = LossConfig.lddt_cutoff,
    per_residue: bool = False,
) -> Float[Array, "*B"] | Float[Array, "*B N"]:
    """Local distance difference test of one point per residue, without its checks of stereochemistry; 0 to 1.

    A residue without neighbours, masked ones too, scores 1. There is no gradient.

    Args:
        predicted: Å, as a rule Cα.
        true: Å.
        mask: 1 or True where the true point is known.
        cutoff: Å, how far apart the true points of a pair may lie to count.
        per_residue: each residue's score instead of all pairs' together.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_shape("predicted", predicted, (*mask.shape, 3), "mask")
    check_shape("true", true, (*mask.shape, 3), "mask")
    dtype = at_least_float32(predicted.dtype, true.dtype)
    predicted, true = (jax.lax.stop_gradient(x.astype(dtype)) for x in (predicted, true))
    mask = mask.astype(dtype)
    true_distance = distances(true, true)
    weight = (true_distance < cutoff).astype(dtype) * mask[..., :, None] * mask[..., None, :]
    weight = weight * (1 - jnp.eye(mask.shape[-1], dtype=dtype))
    error = jnp.abs(true_distance - distances(predicted, predicted))
    limits = LossConfig.lddt_thresholds
    score = sum((error < limit).astype(dtype) for limit in limits) / len(limits)
    axes = (-1,) if per_residue else (-1, -2)
    # In AlphaFold's order: pLDDT's bins are so narrow that the last bit decides.
    epsilon = LossConfig.lddt_epsilon
    return 1 / (epsilon + jnp.sum(weight, axes)) * (epsilon + jnp.sum(weight * score, axes))


def plddt_loss(
    logits: Float[Array, "*B N bins"],
    predicted_ca: Float[Array, "*B N 3"],
    true_ca: Float[Array, "*B N 3"],
    mask: Shaped[Array, "*B N"],
    *,
    resolution: Float[Array, "*B"] | None = None,
    min_resolution: float = LossConfig.min_resolution,
    max_resolution: float = LossConfig.max_resolution,
) -> Float[Array, "*B"]:
    """Cross entropy of the predicted against the actual Cα lDDT (Suppl. 1.9.6, eq. 40–41, and Alg. 29).

    Args:
        logits: of equal bins between 0 and 1; AlphaFold has 50.
        predicted_ca: Å.
        true_ca: Å.
        mask: 1 or True where the true Cα is known.
        resolution: of the experiment, Å; the loss is 0 out of the limits (NMR and distillation count as 0 Å).
        min_resolution: Å.
        max_resolution: Å.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    num_bin = logits.shape[-1]
    check_shape("logits", logits, (*mask.shape, num_bin), "mask")
    score = lddt(predicted_ca, true_ca, mask, per_residue=True)
    index = jnp.minimum(jnp.floor(score * num_bin).astype(jnp.int32), num_bin - 1)
    log_probability = jax.nn.log_softmax(logits.astype(at_least_float32(logits.dtype)))
    error = -jnp.take_along_axis(log_probability, index[..., None], -1)[..., 0]
    weight = mask.astype(error.dtype)
    loss = jnp.sum(weight * error, -1) / (jnp.sum(weight, -1) + LossConfig.plddt_epsilon)
    if resolution is None:
        return loss
    return jnp.where((resolution >= min_resolution) & (resolution <= max_resolution), loss, 0)
