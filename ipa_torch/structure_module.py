"""The structure module (Jumper et al. 2021, Suppl. Alg. 20) with AlphaFold's parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ipa_bridge.checks import (
    check_arrays,
    check_config,
    check_rigids,
    check_structure_module_inputs,
)
from ipa_bridge.config import Implementation, StructureModuleConfig
from ipa_bridge.parameters import haiku_name
from ipa_bridge.tuples import by_name
from ipa_torch.attention import check_implementation
from ipa_torch.dtypes import at_least_float32
from ipa_torch.invariant_point_attention import InvariantPointAttention
from ipa_torch.layers import Initializer, LayerNorm, Linear, Module, transition
from ipa_torch.rigid import Rigid
from ipa_torch.side_chains import MultiRigidSidechain, check_aatype, frames_to_atom14, torsion_angles_to_frames


@by_name
class StructureModuleOutput(NamedTuple):
    """Predictions of all layers, stacked along the first axis; the last one is the module's prediction.

    Attributes:
        rigids: backbone frames, (L, *B, N), translations in Å.
        frames: the eight rigid groups, (L, *B, N, 8), in Å.
        angles: unit (sin, cos) of pre-ω, φ, ψ, χ1–χ4.
        unnormalized_angles: the same vectors before normalisation.
        atom14: positions in Å; zero where the residue has no such atom.
        act: single representation.
    """

    rigids: Rigid
    frames: Rigid
    angles: Float[Tensor, "L *B N 7 2"]
    unnormalized_angles: Float[Tensor, "L *B N 7 2"]
    atom14: Float[Tensor, "L *B N 14 3"]
    act: Float[Tensor, "L *B N c_s"]


class FoldIteration(Module):
    """One layer: attention, transition, backbone update, torsion angles (Alg. 20, lines 5–14).

    Args:
        config: widths and variants; see `StructureModuleConfig`.
        implementation: implementation of the attention; see `point_attention`.
        skip_connection: add the initial activations after the transition.
    """

    skip_connection = False
    """Modules pickled before there was one have no such attribute."""

    def __init__(
        self,
        config: StructureModuleConfig,
        *,
        implementation: Implementation | None = None,
        skip_connection: bool = False,
    ) -> None:
        check_config(config, StructureModuleConfig)
        check_implementation(implementation)
        super().__init__()
        self.config = c = config
        self.skip_connection = skip_connection
        width, wide = c.num_channel, c.num_channel * c.transition_factor
        final: Initializer = "zeros" if c.ipa.zero_init else "linear"
        within = replace(c.ipa, frame_unit=None)  # the structure module has scaled the frames
        self.invariant_point_attention = InvariantPointAttention(within, implementation=implementation)
        self.attention_layer_norm = LayerNorm(width)
        for i in range(c.num_layer_in_transition):
            first, last = i == 0, i == c.num_layer_in_transition - 1
            inputs, outputs = width if first else wide, width if last else wide
            self.add_module(haiku_name("transition", i), Linear(inputs, outputs, initializer=final if last else "relu"))
        self.transition_layer_norm = LayerNorm(width)
        if c.ipa.layout == "monomer":
            self.affine_update = Linear(width, 6, initializer=final, full_precision=True)
        else:
            self.quat_rigid = QuatRigid(width, initializer=final)
        self.rigid_sidechain = MultiRigidSidechain(c)

    def forward(
        self,
        act: Float[Tensor, "*B N c_s"],
        pair: Float[Tensor, "*B N N c_z"],
        rigids: Rigid,
        initial_act: Float[Tensor, "*B N c_s"],
        mask: Shaped[Tensor, "*B N"] | None = None,
        *,
        update_mask: Shaped[Tensor, "*B N"] | None = None,
    ) -> tuple[Float[Tensor, "*B N c_s"], Rigid, Float[Tensor, "*B N 7 2"], Float[Tensor, "*B N 7 2"]]:
        """Updated activations and frames, and torsion angles as unit vectors and before normalisation.

        Args:
            act: single representation.
            pair: pair representation that the attention reads.
            rigids: backbone frames, (*B, N), in units of config.position_scale Å.
            initial_act: single representation at the module's start, which the side chains read.
            mask: 1 or True where a residue is valid.
            update_mask: 1 or True where a residue's frame may change; None if all may.
        """
        act = act + self.invariant_point_attention(act, pair, rigids, mask)  # line 6
        act = self.attention_layer_norm(self._dropout(act))  # line 7
        act = act + transition(act, self._transition_layers())  # lines 8–9
        act = self.transition_layer_norm(self._dropout(act))
        act = act + initial_act if self.skip_connection else act
        rigids = rigids.compose(self._backbone_update(act, update_mask))  # line 10
        angles, unnormalized_angles = self.rigid_sidechain(act, initial_act)
        return act, rigids, angles, unnormalized_angles

    def _transition_layers(self) -> list[nn.Module]:
        return [self.get_submodule(haiku_name("transition", i)) for i in range(self.config.num_layer_in_transition)]

    def _backbone_update(self, act: Float[Tensor, "*B N c_s"], update_mask: Shaped[Tensor, "*B N"] | None) -> Rigid:
        """Alg. 23: the quaternion (1, b, c, d), normalised, and a translation, in the residue's own frame."""
        update = self.affine_update(act) if self.config.ipa.layout == "monomer" else self.quat_rigid(act)
        if update_mask is not None:
            update = update * update_mask.to(update.dtype)[..., None]
        quaternion = torch.cat([torch.ones_like(update[..., :1]), update[..., :3]], -1)
        return Rigid.from_quaternion(quaternion, update[..., 3:])

    def _dropout(self, act: Float[Tensor, "*B N c_s"]) -> Float[Tensor, "*B N c_s"]:
        return F.dropout(act, self.config.dropout, self.training)


class QuatRigid(Module):
    """Projection to the six numbers of a backbone update, with AlphaFold-Multimer's parameter name."""

    def __init__(self, num_channel: int, *, initializer: Initializer = "zeros") -> None:
        super().__init__()
        self.rigid = Linear(num_channel, 6, initializer=initializer, full_precision=True)

    def forward(self, act: Float[Tensor, "*B N c_s"]) -> Float[Tensor, "*B N 6"]:
        """Projects the activations, in at least float32."""
        return self.rigid(act)


class StructureModule(Module):
    """Predicts frames, torsions and atoms from representations, layer by layer (Alg. 20).

    Submodules have AlphaFold's haiku names, so its published parameters convert by a rule. Frames stay in at least
    float32, also under autocast. No gradient passes through rotations between layers, unless config.detach_rotations is
    False. Dropout acts in training mode.

    Args:
        config: widths and variants; see `StructureModuleConfig`.
        implementation: implementation of the attention; see `point_attention`.
    """

    def __init__(self, config: StructureModuleConfig, *, implementation: Implementation | None = None) -> None:
        check_config(config, StructureModuleConfig)
        check_implementation(implementation)
        super().__init__()
        self.config = c = config
        width, pair_width = c.input_channels
        if c.input_norm:
            self.single_layer_norm = LayerNorm(width)
        self.initial_projection = Linear(width, c.num_channel)
        if c.input_norm:
            self.pair_layer_norm = LayerNorm(pair_width)
        if c.pair_input_channel is not None:
            self.pair_projection = Linear(pair_width, c.embedded_pair_channel)
        for layer in range(1 if c.tied_layers else c.num_layer):
            skip = c.skip_connection and layer < c.num_layer - 1
            fold_iteration = FoldIteration(c, implementation=implementation, skip_connection=skip)
            self.add_module(haiku_name("fold_iteration", layer), fold_iteration)

    def forward(
        self,
        single: Float[Tensor, "*B N single"],
        pair: Float[Tensor, "*B N N pair"],
        aatype: Int[Tensor, "*B N"],
        mask: Shaped[Tensor, "*B N"] | None = None,
        *,
        rigids: Rigid | None = None,
        update_mask: Shaped[Tensor, "*B N"] | None = None,
    ) -> StructureModuleOutput:
        """Every layer's prediction.

        Args:
            single: single representation; config.input_channels gives its width and the pair's.
            pair: pair representation.
            aatype: 0–19 in AlphaFold's order, or 20 for unknown; any integer where the mask is 0.
            mask: 1 or True where a residue is valid; valid residues ignore all others.
            rigids: backbone frames to start from, (*B, N), in Å; None for AlphaFold's start, the identity for all.
            update_mask: 1 or True where a residue's frame may change; None if all may.

        Raises:
            ValueError: shapes do not fit the config or each other, or aatype is not 0–20 at a valid residue.
        """
        c = self.config
        check_arrays(Tensor, single=single, pair=pair, aatype=aatype, mask=mask, update_mask=update_mask)
        if rigids is not None:
            check_rigids(rigids, Tensor)
        check_structure_module_inputs(c, single, pair, aatype, mask, rigids, update_mask)
        check_aatype(aatype, mask)
        initial_act = self.single_layer_norm(single) if c.input_norm else single  # line 1
        edges = self.pair_layer_norm(pair) if c.input_norm else pair  # line 2
        edges = edges if c.pair_input_channel is None else self.pair_projection(edges).to(pair.dtype)
        act = self.initial_projection(initial_act)  # line 3, in the parameters' dtype
        dtype = at_least_float32(*(x.dtype for x in (single, pair, act)))  # independent of the initial frames' dtype
        act = act.to(single.dtype)
        initial_act = act if c.project_initial_act else initial_act
        if rigids is None:
            rigids = Rigid.identity(aatype.shape, dtype=dtype, device=single.device)
        rigids = rigids.astype(dtype).scale_translation(1 / c.position_scale)
        each = []
        for layer in range(c.num_layer):
            fold_iteration = self.get_submodule(haiku_name("fold_iteration", 0 if c.tied_layers else layer))
            pair = with_distances(edges, rigids, mask) if c.distance_channel else edges
            act, rigids, *angles = fold_iteration(act, pair, rigids, initial_act, mask, update_mask=update_mask)
            each.append((act, *rigids, *angles))
            rigids = rigids.stop_rotation_gradient() if c.detach_rotations else rigids  # line 20
        act, rotation, translation, angles, unnormalized_angles = (torch.stack(xs) for xs in zip(*each, strict=True))
        rigids = Rigid(rotation, translation).scale_translation(c.position_scale)
        aatype = aatype.expand(c.num_layer, *aatype.shape)
        frames = torsion_angles_to_frames(rigids, angles, aatype, mask=mask)  # Alg. 24
        atom14 = frames_to_atom14(frames, aatype, mask=mask)
        return StructureModuleOutput(rigids, frames, angles, unnormalized_angles, atom14, act)

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any
        __call__ = forward


def with_distances(
    pair: Float[Tensor, "*B N N c"], rigids: Rigid, mask: Shaped[Tensor, "*B N"] | None = None
) -> Float[Tensor, "*B N N c+1"]:
    """The pair with one more channel: the distance between the frames' origins, zero where the mask of either is.

    The gradient is zero where two origins coincide.
    """
    offset = rigids.translation[..., :, None, :] - rigids.translation[..., None, :, :]
    length2 = torch.sum(offset * offset, -1)
    apart = length2 > 0
    distance = torch.where(apart, torch.sqrt(torch.where(apart, length2, 1)), 0)
    if mask is not None:
        valid = mask.to(distance.dtype)
        distance = distance * (valid[..., :, None] * valid[..., None, :])
    return torch.cat([pair, distance[..., None].to(pair.dtype)], -1)
