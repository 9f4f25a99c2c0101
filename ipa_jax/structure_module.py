"""The structure module (Jumper et al. 2021, Suppl. Alg. 20) with AlphaFold's parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ipa_bridge.checks import (
    check_arrays,
    check_config,
    check_rigids,
    check_structure_module_inputs,
)
from ipa_bridge.config import Implementation, StructureModuleConfig
from ipa_bridge.tuples import by_name
from ipa_jax.attention import check_implementation
from ipa_jax.dtypes import at_least_float32, varying_alike
from ipa_jax.invariant_point_attention import InvariantPointAttention
from ipa_jax.layers import Initializer, LayerNorm, Linear, dropout, transition, with_rng
from ipa_jax.rigid import Rigid
from ipa_jax.side_chains import MultiRigidSidechain, check_aatype, frames_to_atom14, torsion_angles_to_frames


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
    angles: Float[Array, "L *B N 7 2"]
    unnormalized_angles: Float[Array, "L *B N 7 2"]
    atom14: Float[Array, "L *B N 14 3"]
    act: Float[Array, "L *B N c_s"]


class FoldIteration(hk.Module):
    """One layer: attention, transition, backbone update, torsion angles (Alg. 20, lines 5–14).

    Args:
        config: widths and variants; see `StructureModuleConfig`.
        implementation: implementation of the attention; see `point_attention`.
        skip_connection: add the initial activations after the transition.
        name: haiku name.
    """

    def __init__(
        self,
        config: StructureModuleConfig,
        *,
        implementation: Implementation | None = None,
        skip_connection: bool = False,
        name: str = "fold_iteration",
    ) -> None:
        check_config(config, StructureModuleConfig)
        check_implementation(implementation)
        super().__init__(name=name)
        self.config = config
        self.implementation = implementation
        self.skip_connection = skip_connection

    def __call__(
        self,
        act: Float[Array, "*B N c_s"],
        pair: Float[Array, "*B N N c_z"],
        rigids: Rigid,
        initial_act: Float[Array, "*B N c_s"],
        mask: Shaped[Array, "*B N"] | None = None,
        *,
        update_mask: Shaped[Array, "*B N"] | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "*B N c_s"], Rigid, Float[Array, "*B N 7 2"], Float[Array, "*B N 7 2"]]:
        """Updated activations and frames, and torsion angles as unit vectors and before normalisation.

        Args:
            act: single representation.
            pair: pair representation that the attention reads.
            rigids: backbone frames, (*B, N), in units of config.position_scale Å.
            initial_act: single representation at the module's start, which the side chains read.
            mask: 1 or True where a residue is valid.
            update_mask: 1 or True where a residue's frame may change; None if all may.
            dropout_key: key for dropout; None for no dropout.
        """
        within = replace(self.config.ipa, frame_unit=None)  # the structure module has scaled the frames
        ipa = InvariantPointAttention(within, implementation=self.implementation)
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        act = act + ipa(act, pair, rigids, mask)  # line 6
        act = LayerNorm(name="attention_layer_norm")(dropout(keys[0], self.config.dropout, act))  # line 7
        act = act + transition(act, self._transition_layers())  # lines 8–9
        act = LayerNorm(name="transition_layer_norm")(dropout(keys[1], self.config.dropout, act))
        act = act + initial_act if self.skip_connection else act
        rigids = rigids.compose(self._backbone_update(act, update_mask))  # line 10
        angles, unnormalized_angles = MultiRigidSidechain(self.config)(act, initial_act)
        return act, rigids, angles, unnormalized_angles

    @hk.name_like("__call__")
    def _transition_layers(self) -> list[Linear]:
        c = self.config
        final: Initializer = "zeros" if c.ipa.zero_init else "linear"
        hidden = range(c.num_layer_in_transition - 1)
        return [
            *(Linear(c.num_channel * c.transition_factor, initializer="relu", name="transition") for _ in hidden),
            Linear(c.num_channel, initializer=final, name="transition"),
        ]

    @hk.name_like("__call__")
    def _backbone_update(self, act: Float[Array, "*B N c_s"], update_mask: Shaped[Array, "*B N"] | None) -> Rigid:
        """Alg. 23: the quaternion (1, b, c, d), normalised, and a translation, in the residue's own frame."""
        final: Initializer = "zeros" if self.config.ipa.zero_init else "linear"
        if self.config.ipa.layout == "monomer":
            update = Linear(6, initializer=final, full_precision=True, name="affine_update")(act)
        else:
            update = QuatRigid(initializer=final)(act)
        if update_mask is not None:
            update = update * update_mask.astype(update.dtype)[..., None]
        quaternion = jnp.concatenate([jnp.ones_like(update[..., :1]), update[..., :3]], -1)
        return Rigid.from_quaternion(quaternion, update[..., 3:])


class QuatRigid(hk.Module):
    """Projection to the six numbers of a backbone update, with AlphaFold-Multimer's parameter name."""

    def __init__(self, *, initializer: Initializer = "zeros", name: str = "quat_rigid") -> None:
        super().__init__(name=name)
        self.initializer = initializer

    def __call__(self, act: Float[Array, "*B N c_s"]) -> Float[Array, "*B N 6"]:
        """Projects the activations, in at least float32."""
        return Linear(6, initializer=self.initializer, full_precision=True, name="rigid")(act)


class StructureModule(hk.Module):
    """Predicts frames, torsions and atoms from representations, layer by layer (Alg. 20).

    Parameters have AlphaFold's haiku names and shapes, so its published parameters load unchanged. Frames stay in at
    least float32. No gradient passes through rotations between layers, unless config.detach_rotations is False.

    Args:
        config: widths and variants; see `StructureModuleConfig`.
        implementation: implementation of the attention; see `point_attention`.
        name: haiku name.
    """

    def __init__(
        self,
        config: StructureModuleConfig,
        *,
        implementation: Implementation | None = None,
        name: str = "structure_module",
    ) -> None:
        check_config(config, StructureModuleConfig)
        check_implementation(implementation)
        super().__init__(name=name)
        self.config = config
        self.implementation = implementation

    def __call__(
        self,
        single: Float[Array, "*B N single"],
        pair: Float[Array, "*B N N pair"],
        aatype: Int[Array, "*B N"],
        mask: Shaped[Array, "*B N"] | None = None,
        *,
        rigids: Rigid | None = None,
        update_mask: Shaped[Array, "*B N"] | None = None,
        is_training: bool = False,
    ) -> StructureModuleOutput:
        """Every layer's prediction.

        Args:
            single: single representation; config.input_channels gives its width and the pair's.
            pair: pair representation.
            aatype: 0–19 in AlphaFold's order, or 20 for unknown; any integer where the mask is 0.
            mask: 1 or True where a residue is valid; valid residues ignore all others.
            rigids: backbone frames to start from, (*B, N), in Å; None for AlphaFold's start, the identity for all.
            update_mask: 1 or True where a residue's frame may change; None if all may.
            is_training: apply dropout, with haiku's rng. A Python bool: `jax.jit` needs it in static_argnames.

        Raises:
            ValueError: shapes do not fit the config or each other, or aatype is not 0–20 at a valid residue.
        """
        c = self.config
        check_arrays(single=single, pair=pair, aatype=aatype, mask=mask, update_mask=update_mask)
        single, pair = jnp.asarray(single), jnp.asarray(pair)
        if rigids is not None:
            check_rigids(rigids)
        check_structure_module_inputs(c, single, pair, aatype, mask, rigids, update_mask)
        check_aatype(aatype, mask)
        initial_act = LayerNorm(name="single_layer_norm")(single) if c.input_norm else single  # line 1
        edges = LayerNorm(name="pair_layer_norm")(pair) if c.input_norm else pair  # line 2
        if c.pair_input_channel is not None:
            edges = Linear(c.embedded_pair_channel, name="pair_projection")(edges).astype(pair.dtype)
        act = Linear(c.num_channel, name="initial_projection")(initial_act)  # line 3, in the parameters' dtype
        dtype = at_least_float32(*(x.dtype for x in (single, pair, act)))  # independent of the initial frames' dtype
        act = act.astype(single.dtype)
        initial_act = act if c.project_initial_act else initial_act
        rigids = Rigid.identity(aatype.shape, dtype=dtype) if rigids is None else rigids.astype(dtype)
        rigids = rigids.scale_translation(1 / c.position_scale)
        skips = [c.skip_connection and i < c.num_layer - 1 for i in range(1 if c.tied_layers else c.num_layer)]
        layers = [FoldIteration(c, implementation=self.implementation, skip_connection=skip) for skip in skips]
        keys = hk.next_rng_keys(c.num_layer) if is_training and c.dropout else None

        def fold(fold_iteration: FoldIteration, carry: tuple[Array, Rigid], key: Array | None) -> tuple:
            act, rigids = carry
            pair = with_distances(edges, rigids, mask) if c.distance_channel else edges
            act, rigids, *angles = fold_iteration(
                act, pair, rigids, initial_act, mask, update_mask=update_mask, dropout_key=key
            )
            after = rigids.stop_rotation_gradient() if c.detach_rotations else rigids  # line 20
            return (act, after), (act, rigids, *angles)

        if c.tied_layers:
            (fold_iteration,) = layers
            reads = (edges, initial_act, mask, update_mask, keys, fold_iteration.params_dict())
            carry = varying_alike((act, rigids), reads)
            _, outputs = hk.scan(lambda carry, key: fold(fold_iteration, carry, key), carry, keys, c.num_layer)
        else:
            carry, each = (act, rigids), []
            for i, layer in enumerate(layers):
                carry, output = fold(layer, carry, None if keys is None else keys[i])
                each.append(output)
            outputs = jax.tree.map(lambda *xs: jnp.stack(xs), *each)
        act, rigids, angles, unnormalized_angles = outputs
        rigids = rigids.scale_translation(c.position_scale)
        aatype = jnp.broadcast_to(aatype, (c.num_layer, *aatype.shape))
        frames = torsion_angles_to_frames(rigids, angles, aatype, mask=mask)  # Alg. 24
        atom14 = frames_to_atom14(frames, aatype, mask=mask)
        return StructureModuleOutput(rigids, frames, angles, unnormalized_angles, atom14, act)


def with_distances(
    pair: Float[Array, "*B N N c"], rigids: Rigid, mask: Shaped[Array, "*B N"] | None = None
) -> Float[Array, "*B N N c+1"]:
    """The pair with one more channel: the distance between the frames' origins, zero where the mask of either is.

    The gradient is zero where two origins coincide.
    """
    offset = rigids.translation[..., :, None, :] - rigids.translation[..., None, :, :]
    length2 = jnp.sum(offset * offset, -1)
    apart = length2 > 0
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, length2, 1)), 0)
    if mask is not None:
        valid = mask.astype(distance.dtype)
        distance = distance * (valid[..., :, None] * valid[..., None, :])
    return jnp.concatenate([pair, distance[..., None].astype(pair.dtype)], -1)


def transform_structure_module(
    config: StructureModuleConfig, *, implementation: Implementation | None = None
) -> hk.Transformed:
    """A structure module as a pair of pure functions, init(rng, …) and apply(params, rng, …).

    Both take the arguments of `StructureModule.__call__`; apply's rng may be None where is_training is False.
    """

    def forward(
        single: Float[Array, "*B N single"],
        pair: Float[Array, "*B N N pair"],
        aatype: Int[Array, "*B N"],
        mask: Shaped[Array, "*B N"] | None = None,
        *,
        rigids: Rigid | None = None,
        update_mask: Shaped[Array, "*B N"] | None = None,
        is_training: bool = False,
    ) -> StructureModuleOutput:
        module = StructureModule(config, implementation=implementation)
        return module(single, pair, aatype, mask, rigids=rigids, update_mask=update_mask, is_training=is_training)

    check_config(config, StructureModuleConfig)
    check_implementation(implementation)
    return with_rng(hk.transform(forward), "single, pair, aatype, mask")
