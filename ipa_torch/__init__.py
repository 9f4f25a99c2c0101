"""Invariant point attention and the structure module in PyTorch; the twin of ipa_jax."""

try:
    import torch as _  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("ipa_torch needs PyTorch: pip install 'ipa-twins[torch]'", name=error.name) from error

from ipa_bridge.version import __version__
from ipa_torch.attention import point_attention
from ipa_torch.confidence import PredictedLDDT, predicted_lddt
from ipa_torch.invariant_point_attention import InvariantPointAttention
from ipa_torch.layers import LayerNorm, Linear
from ipa_torch.losses import (
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
from ipa_torch.replace import register_adapter, replace_ipa, restore_ipa, unregister_adapter
from ipa_torch.rigid import Rigid
from ipa_torch.side_chains import (
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
from ipa_torch.structure_module import FoldIteration, StructureModule, StructureModuleOutput
from ipa_torch.transformer import IPABlock, IPATransformer, IPATransformerOutput

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
    "register_adapter",
    "rename_ambiguous_atoms",
    "rename_ambiguous_frames",
    "replace_ipa",
    "restore_ipa",
    "sidechain_loss",
    "structural_violation_loss",
    "structure_module_loss",
    "structure_target",
    "supervised_chi_loss",
    "torsion_angles_to_frames",
    "unregister_adapter",
    "violation_metrics",
    "within_residue_violations",
]
