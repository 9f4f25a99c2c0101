"""The local distance difference test and its prediction (Jumper et al. 2021, Suppl. 1.9.6 and Alg. 29)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ipa_bridge.checks import check_shape
from ipa_bridge.config import LossConfig
from ipa_torch.dtypes import at_least_float32
from ipa_torch.layers import take
from ipa_torch.losses.numerics import distances


def lddt(
    predicted: Float[Tensor, "*B N 3"],
    true: Float[Tensor, "*B N 3"],
    mask: Shaped[Tensor, "*B N"],
    *,
    cutoff: float = LossConfig.lddt_cutoff,
    per_residue: bool = False,
) -> Float[Tensor, "*B"] | Float[Tensor, "*B N"]:
    """Local distance difference test of one point per residue, from 0 to 1, without checks of stereochemistry.

    A residue with no other within the cutoff scores 1, and so does a masked residue. No gradient passes.

    Args:
        predicted: positions in Å, usually of Cα.
        true: positions in Å.
        mask: 1 or True where the true point is known.
        cutoff: Å; a pair counts if its true points are less than this apart.
        per_residue: return each residue's score instead of one score over all pairs.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_shape("predicted", predicted, (*mask.shape, 3), "mask")
    check_shape("true", true, (*mask.shape, 3), "mask")
    dtype = at_least_float32(predicted.dtype, true.dtype)
    predicted, true = (x.detach().to(dtype) for x in (predicted, true))
    mask = mask.to(dtype)
    true_distance = distances(true, true)
    weight = (true_distance < cutoff).to(dtype) * mask[..., :, None] * mask[..., None, :]
    weight = weight * (1 - torch.eye(mask.shape[-1], dtype=dtype, device=true.device))
    error = torch.abs(true_distance - distances(predicted, predicted))
    limits = LossConfig.lddt_thresholds
    score = sum((error < limit).to(dtype) for limit in limits) / len(limits)
    axes = (-1,) if per_residue else (-1, -2)
    # Operations in AlphaFold's order, because the last bit of a score can decide its bin in pLDDT.
    epsilon = LossConfig.lddt_epsilon
    return 1 / (epsilon + torch.sum(weight, axes)) * (epsilon + torch.sum(weight * score, axes))


def plddt_loss(
    logits: Float[Tensor, "*B N bins"],
    predicted_ca: Float[Tensor, "*B N 3"],
    true_ca: Float[Tensor, "*B N 3"],
    mask: Shaped[Tensor, "*B N"],
    *,
    resolution: Float[Tensor, "*B"] | None = None,
    min_resolution: float = LossConfig.min_resolution,
    max_resolution: float = LossConfig.max_resolution,
) -> Float[Tensor, "*B"]:
    """Cross entropy between predicted and actual Cα lDDT (Suppl. 1.9.6, eq. 40–41, and Alg. 29).

    Args:
        logits: logits of equal bins between 0 and 1; AlphaFold has 50.
        predicted_ca: Å.
        true_ca: Å.
        mask: 1 or True where the true Cα is known.
        resolution: resolution of the experiment, Å; 0 for NMR structures and self-distillation. Outside the limits the
            loss is 0.
        min_resolution: Å.
        max_resolution: Å.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    num_bin = logits.shape[-1]
    check_shape("logits", logits, (*mask.shape, num_bin), "mask")
    score = lddt(predicted_ca, true_ca, mask, per_residue=True)
    index = torch.clamp(torch.floor(score * num_bin).to(torch.int64), max=num_bin - 1)
    log_probability = torch.log_softmax(logits.to(at_least_float32(logits.dtype)), -1)
    error = -take(log_probability, index[..., None], -1)[..., 0]
    weight = mask.to(error.dtype)
    loss = torch.sum(weight * error, -1) / (torch.sum(weight, -1) + LossConfig.plddt_epsilon)
    if resolution is None:
        return loss
    return torch.where((resolution >= min_resolution) & (resolution <= max_resolution), loss, 0)
