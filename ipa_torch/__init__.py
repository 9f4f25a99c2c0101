"""Invariant point attention and the structure module in PyTorch; the twin of ipa_jax."""

from ipa_torch.attention import point_attention
from ipa_torch.confidence import PredictedLDDT, predicted_lddt
from ipa_torch.invariant_point_attention import InvariantPointAttention
from ipa_torch.layers import LayerNorm, Linear
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

__all__ = [
    "FoldIteration",
    "GroupFrames",
    "InvariantPointAttention",
    "LayerNorm",
    "Linear",
    "MultiRigidSidechain",
    "PredictedLDDT",
    "Rigid",
    "StructureModule",
    "StructureModuleOutput",
    "TorsionAngles",
    "atom14_to_atom37",
    "atom37_to_atom14",
    "atom37_to_frames",
    "atom37_to_torsion_angles",
    "frames_to_atom14",
    "point_attention",
    "predicted_lddt",
    "torsion_angles_to_frames",
]
