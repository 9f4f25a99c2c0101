"""The structure module's losses: FAPE, torsions, violations and lDDT (Jumper et al. 2021, Suppl. 1.9 and 1.11.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float

from ipa_bridge.config import LossConfig
from ipa_bridge.tuples import by_name
from ipa_jax.losses.ambiguity import RenamedAtoms, rename_ambiguous_atoms, rename_ambiguous_frames
from ipa_jax.losses.fape import backbone_loss, backbone_term, frame_aligned_point_error, sidechain_loss, sidechain_term
from ipa_jax.losses.lddt import lddt, plddt_loss
from ipa_jax.losses.target import Comparison, StructureTarget, structure_target
from ipa_jax.losses.torsions import angle_norm_loss, angle_norm_term, chi_term, supervised_chi_loss
from ipa_jax.losses.violations import (
    BondViolations,
    ClashViolations,
    StructuralViolations,
    ViolationMetrics,
    WithinResidueViolations,
    between_residue_bond_loss,
    between_residue_clash_loss,
    extreme_ca_ca_distance_violations,
    find_structural_violations,
    structural_violation_loss,
    violation_metrics,
    violation_term,
    within_residue_violations,
)
from ipa_jax.side_chains import check_aatype
from ipa_jax.structure_module import StructureModuleOutput

__all__ = [
    "TERMS",
    "BondViolations",
    "ClashViolations",
    "RenamedAtoms",
    "StructuralViolations",
    "StructureModuleLoss",
    "StructureTarget",
    "ViolationMetrics",
    "WithinResidueViolations",
    "angle_norm_loss",
    "backbone_loss",
    "between_residue_bond_loss",
    "between_residue_clash_loss",
    "extreme_ca_ca_distance_violations",
    "find_structural_violations",
    "frame_aligned_point_error",
    "lddt",
    "plddt_loss",
    "rename_ambiguous_atoms",
    "rename_ambiguous_frames",
    "sidechain_loss",
    "structural_violation_loss",
    "structure_module_loss",
    "structure_target",
    "supervised_chi_loss",
    "violation_metrics",
    "within_residue_violations",
]


@by_name
class StructureModuleLoss(NamedTuple):
    """The weighted sum and its unweighted terms. `fape` is the backbone's error in the last layer."""

    loss: Float[Array, "*B"]
    backbone: Float[Array, "*B"]
    fape: Float[Array, "*B"]
    sidechain_fape: Float[Array, "*B"]
    chi: Float[Array, "*B"]
    angle_norm: Float[Array, "*B"]
    violation: Float[Array, "*B"]


TERMS: dict[str, Callable[[Comparison], dict[str, Array]]] = {
    "backbone": backbone_term,
    "sidechain_fape": sidechain_term,
    "chi": chi_term,
    "angle_norm": angle_norm_term,
    "violation": violation_term,
}
"""Terms of the loss by field of `StructureModuleLoss`. Each returns that field, and any further field that it fills."""


def structure_module_loss(
    output: StructureModuleOutput,
    target: StructureTarget,
    *,
    use_clamped_fape: float | Float[Array, "*B"] = LossConfig.use_clamped_fape,
    sidechain_weight: float = LossConfig.sidechain_weight,
    chi_weight: float = LossConfig.chi_weight,
    angle_norm_weight: float = LossConfig.angle_norm_weight,
    violation_weight: float = LossConfig.violation_weight,
    chunk_size: int | None = None,
) -> StructureModuleLoss:
    """All losses on the structure module, weighted as in AlphaFold (Suppl. eq. 7; without pLDDT).

    Args:
        output: predictions of the structure module.
        target: the true structure, see `structure_target`. It is converted to the prediction's dtype, and its ambiguous
            atoms are renamed.
        use_clamped_fape: as in `backbone_loss`.
        sidechain_weight: weight of the side chains' FAPE; the backbone's weight is 1 minus this.
        chi_weight: weight of the error of torsions.
        angle_norm_weight: weight of the error of torsion vectors' lengths.
        violation_weight: weight of structural violations; AlphaFold's is 0 in initial training and 1 in fine-tuning.
        chunk_size: frames or residues computed at a time in every quadratic term; None for all at once.

    Raises:
        ValueError: shapes that do not fit each other, or a chunk_size below 1.
    """
    check_aatype(target.aatype, target.mask)
    atom14 = output.atom14[-1]
    target = target._replace(
        group_frames=target.group_frames.astype(atom14.dtype),
        atom14=target.atom14.astype(atom14.dtype),
        chi=target.chi.astype(atom14.dtype),
    )
    renamed = rename_ambiguous_atoms(atom14, target.atom14, target.atom14_mask, target.aatype, chunk_size=chunk_size)
    true_frames = rename_ambiguous_frames(
        target.group_frames, target.aatype, renamed.alternative_is_better, mask=target.mask
    )
    target = target._replace(group_frames=true_frames, atom14=renamed.atom14, atom14_mask=renamed.mask)
    compared = Comparison(output, target, use_clamped_fape, chunk_size)
    found = {field: x for term in TERMS.values() for field, x in term(compared).items()}
    weights = {
        "backbone": 1 - sidechain_weight,
        "sidechain_fape": sidechain_weight,
        "chi": chi_weight,
        "angle_norm": angle_norm_weight,
        "violation": violation_weight,
    }
    weighted = [weights[field] * found[field] for field in TERMS]
    return StructureModuleLoss(sum(weighted[1:], weighted[0]), **found)
