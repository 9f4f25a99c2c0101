"""Invariant point attention and the structure module in JAX and Haiku; the twin of ipa_torch."""

try:
    import haiku as _  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("ipa_jax needs JAX and Haiku: pip install 'ipa-twins[jax]'", name=error.name) from error

from ipa_bridge.version import __version__
from ipa_jax.attention import point_attention
from ipa_jax.confidence import PredictedLDDT, predicted_lddt, transform_predicted_lddt
from ipa_jax.invariant_point_attention import InvariantPointAttention, transform_ipa
from ipa_jax.layers import LayerNorm, Linear
from ipa_jax.losses import (
    BondViolations,
    ClashViolations,
    RenamedAtoms,
    StructuralViolations,
    StructureModuleLoss,
    StructureTarget,
    ViolationMetrics,
    WithinResidueViolations,
    angle_norm_loss,
    backbone_loss,
    between_residue_bond_loss,
    between_residue_clash_loss,
    extreme_ca_ca_distance_violations,
    find_structural_violations,
    frame_aligned_point_error,
    lddt,
    plddt_loss,
    rename_ambiguous_atoms,
    rename_ambiguous_frames,
    sidechain_loss,
    structural_violation_loss,
    structure_module_loss,
    structure_target,
    supervised_chi_loss,
    violation_metrics,
    within_residue_violations,
)
from ipa_jax.replace import replace_alphafold_ipa
from ipa_jax.rigid import Rigid
from ipa_jax.side_chains import (
    GroupFrames,
    MultiRigidSidechain,
    TorsionAngles,
    atom14_to_atom37,
    atom37_to_atom14,
    atom37_to_frames,
    atom37_to_torsion_angles,
    frames_to_atom14,
    torsion_angles_to_frames,
)
from ipa_jax.structure_module import FoldIteration, StructureModule, StructureModuleOutput, transform_structure_module
from ipa_jax.transformer import IPABlock, IPATransformer, IPATransformerOutput, transform_ipa_transformer

__all__ = [
    "BondViolations",
    "ClashViolations",
    "FoldIteration",
    "GroupFrames",
    "IPABlock",
    "IPATransformer",
    "IPATransformerOutput",
    "InvariantPointAttention",
    "LayerNorm",
    "Linear",
    "MultiRigidSidechain",
    "PredictedLDDT",
    "RenamedAtoms",
    "Rigid",
    "StructuralViolations",
    "StructureModule",
    "StructureModuleLoss",
    "StructureModuleOutput",
    "StructureTarget",
    "TorsionAngles",
    "ViolationMetrics",
    "WithinResidueViolations",
    "__version__",
    "angle_norm_loss",
    "atom14_to_atom37",
    "atom37_to_atom14",
    "atom37_to_frames",
    "atom37_to_torsion_angles",
    "backbone_loss",
    "between_residue_bond_loss",
    "between_residue_clash_loss",
    "extreme_ca_ca_distance_violations",
    "find_structural_violations",
    "frame_aligned_point_error",
    "frames_to_atom14",
    "lddt",
    "plddt_loss",
    "point_attention",
    "predicted_lddt",
    "rename_ambiguous_atoms",
    "rename_ambiguous_frames",
    "replace_alphafold_ipa",
    "sidechain_loss",
    "structural_violation_loss",
    "structure_module_loss",
    "structure_target",
    "supervised_chi_loss",
    "torsion_angles_to_frames",
    "transform_ipa",
    "transform_ipa_transformer",
    "transform_predicted_lddt",
    "transform_structure_module",
    "violation_metrics",
    "within_residue_violations",
]
