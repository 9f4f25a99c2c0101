"""Blocks of attention and transition, and a transformer of such blocks that updates frames after each."""

from __future__ import annotations

from typing import NamedTuple

import haiku as hk
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ipa_bridge.checks import check_arrays, check_config, check_floating, check_rigids, check_shape, check_tokens
from ipa_bridge.config import Implementation, IPABlockConfig, IPATransformerConfig
from ipa_bridge.tuples import by_name
from ipa_jax.attention import check_implementation
from ipa_jax.dtypes import at_least_float32
from ipa_jax.invariant_point_attention import InvariantPointAttention
from ipa_jax.layers import Initializer, LayerNorm, Linear, dropout, transition, with_rng
from ipa_jax.rigid import Rigid
from ipa_jax.values import integers_outside


@by_name
class IPATransformerOutput(NamedTuple):
    """Predictions of the last layer.

    Attributes:
        act: single representation.
        rigids: frames of the residues, (*B, N), in the unit of the input frames.
        points: a point per residue in the global frame; None where config.predict_points is False.
    """

    act: Float[Array, "*B N c_s"]
    rigids: Rigid
    points: Float[Array, "*B N 3"] | None


class IPABlock(hk.Module):
    """Attention and transition, each with a residual connection and a layer norm (Suppl. Alg. 20, lines 6–9).

    Parameters have the names of AlphaFold's fold iteration. Invariant: moving all frames alike changes no output.

    Args:
        config: widths and variants; see `IPABlockConfig`.
        implementation: implementation of the attention; see `point_attention`.
        name: haiku name.
    """

    def __init__(
        self, config: IPABlockConfig, *, implementation: Implementation | None = None, name: str = "ipa_block"
    ) -> None:
        check_config(config, IPABlockConfig)
        check_implementation(implementation)
        super().__init__(name=name)
        self.config = config
        self.implementation = implementation

    def __call__(
        self,
        act: Float[Array, "*B N c_s"],
        pair: Float[Array, "*B N N c_z"] | None,
        rigids: Rigid,
        mask: Shaped[Array, "*B N"] | None = None,
        *,
        is_training: bool = False,
    ) -> Float[Array, "*B N c_s"]:
        """Updated activations, in their dtype.

        Args:
            act: single representation.
            pair: pair representation; None where config.ipa.pair_channel is None.
            rigids: frames of the residues, (*B, N); see `InvariantPointAttention`.
            mask: 1 or True where a residue is valid.
            is_training: apply dropout, with haiku's rng.

        Raises:
            ValueError: shapes do not fit the config or each other.
        """
        check_floating(act=act)
        act = jnp.asarray(act)
        c = self.config
        ipa = InvariantPointAttention(c.ipa, implementation=self.implementation)
        attention_layer_norm = LayerNorm(name="attention_layer_norm")
        transition_layer_norm = LayerNorm(name="transition_layer_norm")
        update = ipa(act if c.post_norm else attention_layer_norm(act), pair, rigids, mask)
        act = self._dropout(act + update, c.attention_dropout, is_training)
        act = attention_layer_norm(act) if c.post_norm else act
        act = act + transition(act if c.post_norm else transition_layer_norm(act), self._transition_layers())
        act = self._dropout(act, c.transition_dropout, is_training)
        return transition_layer_norm(act) if c.post_norm else act

    @hk.name_like("__call__")
    def _transition_layers(self) -> list[Linear]:
        c = self.config
        final: Initializer = "zeros" if c.ipa.zero_init else "linear"
        width, hidden = c.transition_factor * c.num_channel, range(c.num_layer_in_transition - 1)
        return [
            *(Linear(width, initializer="relu", name="transition") for _ in hidden),
            Linear(c.num_channel, initializer=final, name="transition"),
        ]

    @hk.name_like("__call__")
    def _dropout(self, act: Float[Array, "*B N c_s"], rate: float, is_training: bool) -> Float[Array, "*B N c_s"]:
        return dropout(hk.next_rng_key(), rate, act) if is_training and rate else act


class IPATransformer(hk.Module):
    """Blocks with separate weights, each followed by an update of all frames.

    Equivariant: if all input frames are moved alike, the output frames move with them.

    Args:
        config: widths and variants; see `IPATransformerConfig`.
        implementation: implementation of the attention; see `point_attention`.
        name: haiku name.
    """

    def __init__(
        self,
        config: IPATransformerConfig,
        *,
        implementation: Implementation | None = None,
        name: str = "ipa_transformer",
    ) -> None:
        check_config(config, IPATransformerConfig)
        check_implementation(implementation)
        super().__init__(name=name)
        self.config = config
        self.implementation = implementation

    def __call__(
        self,
        single: Float[Array, "*B N c_s"] | Int[Array, "*B N"],
        pair: Float[Array, "*B N N c_z"] | None = None,
        rigids: Rigid | None = None,
        mask: Shaped[Array, "*B N"] | None = None,
        *,
        is_training: bool = False,
    ) -> IPATransformerOutput:
        """Activations, frames and, with config.predict_points, points of the last layer.

        Args:
            single: single representation, or integer tokens if config.num_token is not None.
            pair: pair representation; None where config.ipa.pair_channel is None.
            rigids: initial frames, (*B, N); None for the identity.
            mask: 1 or True where a residue is valid; valid residues ignore all others in every layer.
            is_training: apply dropout, with haiku's rng. A Python bool: `jax.jit` needs it in static_argnames.

        Raises:
            ValueError: shapes do not fit the config or each other, or tokens are not integers or are outside the
                vocabulary where the mask is 1. Values are checked only on CPU, outside traces.
        """
        c = self.config
        check_arrays(single=single, pair=pair, mask=mask)
        single = jnp.asarray(single)
        if rigids is not None:
            check_rigids(rigids)
        check_tokens(c, single)
        if c.num_token is not None:
            if mask is not None:
                check_shape("mask", mask, single.shape, "single")
            check_tokens(c, single, integers_outside(single, c.num_token - 1, mask))
        act = single
        if c.num_token is not None:
            embedding = hk.Embed(
                c.num_token, c.num_channel, w_init=hk.initializers.RandomNormal(), name="token_embedding"
            )
            act = embedding(single)
        dtype = at_least_float32(act.dtype)  # independent of the initial frames' dtype
        rigids = Rigid.identity(act.shape[:-1], dtype=dtype) if rigids is None else rigids.astype(dtype)
        initializer: Initializer = "zeros" if c.ipa.zero_init else "linear"
        for _ in range(c.num_layer):
            frozen = rigids.stop_rotation_gradient() if c.detach_rotations else rigids
            block = IPABlock(c.block, implementation=self.implementation)
            act = block(act, pair, frozen, mask, is_training=is_training)
            affine_update = Linear(6, initializer=initializer, full_precision=True, name="affine_update")
            rigids = self._moved(affine_update(act), rigids, frozen)
        points = None
        if c.predict_points:
            points = rigids.apply(Linear(3, full_precision=True, name="predicted_points")(act))
        return IPATransformerOutput(act, rigids, points)

    def _moved(self, step: Float[Array, "*B N 6"], rigids: Rigid, frozen: Rigid) -> Rigid:
        """Alg. 23 in each residue's own frame: the quaternion (1, b, c, d), normalised, and a translation."""
        quaternion = jnp.concatenate([jnp.ones_like(step[..., :1]), step[..., :3]], -1)
        turn = Rigid.from_quaternion(quaternion, jnp.zeros_like(step[..., 3:]))
        turned = turn.invert().compose(rigids) if self.config.original_composition_order else rigids.compose(turn)
        return Rigid(turned.rotation, frozen.apply(step[..., 3:]))


def transform_ipa_transformer(
    config: IPATransformerConfig, *, implementation: Implementation | None = None
) -> hk.Transformed:
    """An IPA transformer as a pair of pure functions, init(rng, …) and apply(params, rng, …).

    Both take the arguments of `IPATransformer.__call__`; apply's rng may be None where is_training is False.
    """

    def forward(
        single: Float[Array, "*B N c_s"] | Int[Array, "*B N"],
        pair: Float[Array, "*B N N c_z"] | None = None,
        rigids: Rigid | None = None,
        mask: Shaped[Array, "*B N"] | None = None,
        *,
        is_training: bool = False,
    ) -> IPATransformerOutput:
        transformer = IPATransformer(config, implementation=implementation)
        return transformer(single, pair, rigids, mask, is_training=is_training)

    check_config(config, IPATransformerConfig)
    check_implementation(implementation)
    return with_rng(hk.transform(forward), "single, pair, rigids, mask")
