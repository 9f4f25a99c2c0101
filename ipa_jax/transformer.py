"""Blocks of attention and transition, and a transformer of them whose frames move from layer to layer."""

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
    """What the last layer predicts.

    Attributes:
        act: the single representation.
        rigids: the residues' frames, (*B, N), in the unit of those that came in.
        points: a point per residue in the global frame; None where config.predict_points is False.
    """

    act: Float[Array, "*B N c_s"]
    rigids: Rigid
    points: Float[Array, "*B N 3"] | None


class IPABlock(hk.Module):
    """Attention and transition, each with a residual connection and a layer norm (Suppl. Alg. 20, lines 6–9).

    With the parameters' names of AlphaFold's fold iteration. Invariant: moving all frames alike changes nothing.

    Args:
        config: the widths and forms; see `IPABlockConfig`.
        implementation: of the attention, see `point_attention`.
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
        """The next activations, in their dtype.

        Args:
            act: single representation.
            pair: pair representation; None where config.ipa.pair_channel is None.
            rigids: frames of the residues, (*B, N); see `InvariantPointAttention`.
            mask: 1 or True where a residue is valid.
            is_training: apply dropout, with haiku's rng.

        Raises:
            ValueError: shapes that do not fit the config or each other.
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
    """Blocks with weights of their own, after each of which every residue's frame moves.

    Equivariant: where the frames that come in are moved alike, those that come out move with them.

    Args:
        config: the widths and forms; see `IPATransformerConfig`.
        implementation: of the attention, see `point_attention`.
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
        """The last layer's activations, frames and, if the config says so, points.

        Args:
            single: single representation, or tokens where config.num_token is a number.
            pair: pair representation; None where config.ipa.pair_channel is None.
            rigids: frames to start from, (*B, N); None for the identity everywhere.
            mask: 1 or True where a residue is valid; valid residues ignore all others in every layer.
            is_training: apply dropout, with haiku's rng. A Python bool: `jax.jit` wants it among static_argnames.

        Raises:
            ValueError: shapes that do not fit the config or each other; tokens that are no integers, or outside the
                vocabulary where the mask is 1 (told on CPU and in no trace).
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
        dtype = at_least_float32(act.dtype)  # whatever the start frames' is
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

    Both take what `IPATransformer.__call__` takes; apply's rng may be None where is_training is False.
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
