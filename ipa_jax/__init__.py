"""Invariant point attention and the structure module in JAX and Haiku; the twin of ipa_torch."""

from ipa_jax.attention import point_attention
from ipa_jax.confidence import PredictedLDDT, predicted_lddt, transform_predicted_lddt
from ipa_jax.invariant_point_attention import InvariantPointAttention, transform_ipa
from ipa_jax.layers import LayerNorm, Linear
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
    "transform_ipa",
    "transform_predicted_lddt",
    "transform_structure_module",
]
