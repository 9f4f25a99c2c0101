"""Losses on side-chain torsions and on the lengths of torsion vectors (Jumper et al. 2021, Suppl. Alg. 27)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ipa_bridge.checks import check_shape
from ipa_bridge.config import LossConfig
from ipa_bridge.proteins import residues
from ipa_torch.dtypes import at_least_float32
from ipa_torch.losses.numerics import masked_mean, norm
from ipa_torch.losses.target import Comparison
from ipa_torch.side_chains import check_aatype, lookup


def supervised_chi_loss(
    angles: Float[Tensor, "L *B N 7 2"],
    true_chi: Float[Tensor, "*B N 4 2"],
    chi_mask: Shaped[Tensor, "*B N 4"],
    aatype: Int[Tensor, "*B N"],
) -> Float[Tensor, "*B"]:
    """Mean squared error of side-chain torsions, under the better of two atom namings (Suppl. Alg. 27, lines 1–3).

    Args:
        angles: every layer's torsions as unit vectors (sin, cos), pre-ω, φ, ψ, χ1–χ4.
        true_chi: (sin, cos) of χ1–χ4.
        chi_mask: 1 or True where a torsion exists and is known.
        aatype: residue types, 0 to 20.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_shape("true_chi", true_chi, (*chi_mask.shape, 2), "chi_mask")
    check_shape("aatype", aatype, chi_mask.shape[:-1], "chi_mask")
    check_aatype(aatype, chi_mask.bool().any(-1))
    check_shape("angles", angles, (*angles.shape[:1], *chi_mask.shape[:-1], 7, 2), "chi_mask")
    dtype = at_least_float32(angles.dtype, true_chi.dtype)
    chi, true_chi, weight = angles[..., 3:, :].to(dtype), true_chi.to(dtype), chi_mask.to(dtype)
    sign = 1 - 2 * lookup(residues.CHI_PI_PERIODIC, aatype, dtype)
    errors = (torch.sum((chi - name) ** 2, -1) for name in (true_chi, sign[..., None] * true_chi))
    return masked_mean(torch.sum(torch.minimum(*errors), 0), weight, (-1, -2), repeats=angles.shape[0])


def angle_norm_loss(
    unnormalized_angles: Float[Tensor, "L *B N 7 2"],
    mask: Shaped[Tensor, "*B N"],
    *,
    epsilon: float = LossConfig.angle_norm_epsilon,
) -> Float[Tensor, "*B"]:
    """Mean deviation of torsion vectors from length 1 before normalisation (Suppl. Alg. 27, line 4).

    Args:
        unnormalized_angles: every layer's torsions as (sin, cos) before normalisation.
        mask: 1 or True where a residue is valid.
        epsilon: added to squared lengths.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_shape("unnormalized_angles", unnormalized_angles, (*unnormalized_angles.shape[:1], *mask.shape, 7, 2), "mask")
    dtype = at_least_float32(unnormalized_angles.dtype)
    error = torch.abs(norm(unnormalized_angles.to(dtype), epsilon) - 1)
    repeats = error.shape[0] * error.shape[-1]
    return masked_mean(torch.sum(error, (0, -1)), mask.to(dtype), -1, repeats=repeats)


def chi_term(compared: Comparison) -> dict[str, Tensor]:
    """`supervised_chi_loss` of every layer."""
    output, target, *_ = compared
    return {"chi": supervised_chi_loss(output.angles, target.chi, target.chi_mask, target.aatype)}


def angle_norm_term(compared: Comparison) -> dict[str, Tensor]:
    """`angle_norm_loss` of every layer."""
    output, target, *_ = compared
    return {"angle_norm": angle_norm_loss(output.unnormalized_angles, target.mask)}
