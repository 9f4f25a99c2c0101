"""Invariant point attention (Jumper et al. 2021, Suppl. Alg. 22) with AlphaFold's parameters."""

from __future__ import annotations

from typing import Literal, overload

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from ipa_bridge.checks import (
    check_arrays,
    check_config,
    check_ipa_inputs,
    check_rigids,
    may_be_in_angstroms,
    warn_if_in_angstroms,
)
from ipa_bridge.config import Implementation, IPAConfig
from ipa_jax.attention import check_implementation, masks, point_attention
from ipa_jax.dtypes import at_least_float32
from ipa_jax.layers import Initializer, Linear, initial_frequencies, rotate_by_index, without_rng
from ipa_jax.numerics import safe_sqrt
from ipa_jax.rigid import Rigid
from ipa_jax.values import at_hand

Projections = tuple[Array, Array, Array, Array, Array, Array]
"""q, k and v, then query, key and value points."""


class InvariantPointAttention(hk.Module):
    """Attention over residues, the pair representation and points in the residues' frames.

    Parameters have AlphaFold's haiku names and shapes, so its published parameters load unchanged. Point projections,
    frames, distances, the softmax and the sums weighted by it run in at least float32 at full precision.

    Args:
        config: widths and variants; see `IPAConfig`.
        implementation: implementation of the attention; see `point_attention`.
        name: haiku name.
    """

    def __init__(
        self,
        config: IPAConfig,
        *,
        implementation: Implementation | None = None,
        name: str = "invariant_point_attention",
    ) -> None:
        check_config(config, IPAConfig)
        check_implementation(implementation)
        super().__init__(name=name)
        self.config = config
        self.implementation = implementation

    @overload
    def __call__(
        self,
        single: Float[Array, "*B N c_s"],
        pair: Float[Array, "*B N N c_z"] | None,
        rigids: Rigid,
        mask: Shaped[Array, "*B N"] | None = None,
        *,
        key_mask: Shaped[Array, "*B N"] | None = None,
        pair_mask: Shaped[Array, "*B N N"] | None = None,
        return_attention: Literal[False] = False,
    ) -> Float[Array, "*B N c_s"]: ...

    @overload
    def __call__(
        self,
        single: Float[Array, "*B N c_s"],
        pair: Float[Array, "*B N N c_z"] | None,
        rigids: Rigid,
        mask: Shaped[Array, "*B N"] | None = None,
        *,
        key_mask: Shaped[Array, "*B N"] | None = None,
        pair_mask: Shaped[Array, "*B N N"] | None = None,
        return_attention: Literal[True],
    ) -> tuple[Float[Array, "*B N c_s"], Float[Array, "*B H N N"]]: ...

    @overload
    def __call__(
        self,
        single: Float[Array, "*B N c_s"],
        pair: Float[Array, "*B N N c_z"] | None,
        rigids: Rigid,
        mask: Shaped[Array, "*B N"] | None = None,
        *,
        key_mask: Shaped[Array, "*B N"] | None = None,
        pair_mask: Shaped[Array, "*B N N"] | None = None,
        return_attention: bool = False,
    ) -> Float[Array, "*B N c_s"] | tuple[Float[Array, "*B N c_s"], Float[Array, "*B H N N"]]: ...

    def __call__(
        self,
        single: Float[Array, "*B N c_s"],
        pair: Float[Array, "*B N N c_z"] | None,
        rigids: Rigid,
        mask: Shaped[Array, "*B N"] | None = None,
        *,
        key_mask: Shaped[Array, "*B N"] | None = None,
        pair_mask: Shaped[Array, "*B N N"] | None = None,
        return_attention: bool = False,
    ) -> Float[Array, "*B N c_s"] | tuple[Float[Array, "*B N c_s"], Float[Array, "*B H N N"]]:
        """The update of the single representation, in its dtype (Alg. 22, lines 1–11).

        Args:
            single: single representation.
            pair: pair representation; None where config.pair_channel is None.
            rigids: frames of the residues, (*B, N), in units of config.frame_unit (AlphaFold's presets: 10 or 20 Å;
                FrameDiff's: 1 Å). `ipa_bridge.Structure.rigids` returns a protein's frames in this unit. Moving all
                frames by one rigid motion does not change the output. Frames are converted to the widest dtype of
                single and pair, at least float32.
            mask: 1 or True where a residue is valid. Valid residues ignore masked ones; masked residues attend to all.
                The inputs of masked residues must be finite, too.
            key_mask: 1 or True where a residue may be attended to. It holds for masked queries too.
            pair_mask: 1 or True where residue i (row) may attend to residue j (column). A residue that may attend to
                none gets sums of zero (lines 8–10).
            return_attention: also return the attention weights, heads first.

        Raises:
            ValueError: shapes do not fit the config or each other.

        Warns:
            UserWarning: a protein's frames seem to be in Å although config.frame_unit is 10 Å or more. Checked only on
                CPU, outside traces and transforms, where values can be read. Nucleic acids in Å are not detected.
        """
        check_arrays(single=single, pair=pair, mask=mask, key_mask=key_mask, pair_mask=pair_mask)
        single, pair = jnp.asarray(single), None if pair is None else jnp.asarray(pair)
        check_rigids(rigids)
        check_ipa_inputs(self.config, single, pair, rigids.rotation, rigids.translation, mask)
        _check_unit(self.config, rigids, mask)
        dtype = at_least_float32(*(x.dtype for x in (single, pair) if x is not None))
        rigids = centre(rigids.astype(at_least_float32(dtype, *(x.dtype for x in rigids))), mask).astype(dtype)
        if self.config.position_scale != 1:
            rigids = rigids.scale_translation(1 / self.config.position_scale)
        pair_bias_weight, weights = self.logit_weights(single.dtype)
        o, o_points, o_pair, *attention = point_attention(
            *self.project(single, rigids),
            pair,
            pair_bias_weight=pair_bias_weight,
            point_weights=weights,
            mask=mask,
            key_mask=key_mask,
            pair_mask=pair_mask,
            logit_terms=self.config.num_logit_terms,
            distance_form=self.config.distance_form,
            distance_epsilon=self.config.distance_epsilon,
            implementation=self.implementation,
            return_attention=return_attention,
        )
        o_points = masks.zero_where_blind(rigids.apply_inverse(o_points), mask, key_mask, pair_mask)
        read = features(self.config, o, o_points, self._pair_values(o_pair))
        initializer: Initializer = "zeros" if self.config.zero_init else "linear"
        output_projection = Linear(self.config.num_channel, initializer=initializer, name="output_projection")
        output = output_projection(read).astype(single.dtype)  # line 11
        return (output, *attention) if return_attention else output

    @hk.name_like("__call__")
    def project(self, single: Float[Array, "*B N c_s"], rigids: Rigid) -> Projections:
        """Lines 1–3: q, k, v (*B, N, H, C) and query, key and value points (*B, N, H, P, 3) in the global frame.

        All are in the dtype of the frames.
        """
        monomer = self.config.layout == "monomer"
        projections = self._project_monomer(single) if monomer else self._project_multimer(single)
        q, k, v, q_points, k_points, v_points = (x.astype(rigids.translation.dtype) for x in projections)
        if self.config.rotary_embedding:
            width = self.config.num_scalar_qk
            frequencies = hk.get_parameter(
                "rotary_frequencies",
                (width // 2,),
                at_least_float32(single.dtype),
                lambda shape, dtype: initial_frequencies(width).astype(dtype),
            )
            q, k = (rotate_by_index(x, frequencies) for x in (q, k))
        return q, k, v, rigids.apply(q_points), rigids.apply(k_points), rigids.apply(v_points)

    @hk.name_like("__call__")
    def logit_weights(self, dtype: DTypeLike = jnp.float32) -> tuple[Float[Array, "c_z H"] | None, Float[Array, " H"]]:
        """Weight that projects the pair to a bias per head (line 4), and point weights, softplus(γ) (line 7) or γ.

        The weight is None without a pair, and if the pair gives no bias.
        """
        pair_bias_weight = None
        if self.config.pair_channel is not None and self.config.pair_bias:
            attention_2d = Linear(self.config.num_head, use_bias=self.config.attention_2d_bias, name="attention_2d")
            # Its bias adds a constant to all logits of a head, which cancels in the softmax. It is a parameter because
            # AlphaFold has it.
            pair_bias_weight, _ = attention_2d.parameters(self.config.pair_channel, dtype)
        gamma = hk.get_parameter(
            "trainable_point_weights",
            (self.config.num_head,),
            at_least_float32(dtype),
            hk.initializers.Constant(self.config.point_weight_init),
        )
        return pair_bias_weight, point_weights(self.config, gamma)

    @hk.name_like("__call__")
    def _pair_values(self, o_pair: Float[Array, "*B N H c_z"] | None) -> Float[Array, "*B N H c"] | None:
        """The attended pair as it is read: projected, if there is a projection. It is linear, so may follow the sum."""
        if o_pair is None or self.config.pair_value_channel is None:
            return o_pair
        if not self.config.pair_value_per_head:
            return Linear(self.config.pair_value_channel, name="down_z")(o_pair)
        shape = (self.config.num_head, self.config.pair_value_channel)
        per_head = Linear(shape, use_bias=False, name="pair_value")(o_pair)
        return jnp.swapaxes(jnp.diagonal(per_head, axis1=-3, axis2=-2), -1, -2)

    @hk.name_like("__call__")
    def _project_monomer(self, single: Float[Array, "*B N c_s"]) -> Projections:
        c = self.config

        def scalars(name: str, width: int) -> Array:
            return Linear(c.num_head * width, use_bias=c.scalar_bias, name=name)(single)

        def points(name: str, number: int) -> Array:
            return Linear(3 * c.num_head * number, use_bias=c.point_bias, full_precision=True, name=name)(single)

        q, kv = scalars("q_scalar", c.num_scalar_qk), scalars("kv_scalar", c.num_scalar_qk + c.num_scalar_v)
        q_points = points("q_point_local", c.num_point_qk)
        return unpack_monomer(c, q, kv, q_points, points("kv_point_local", c.num_point_qk + c.num_point_v))

    @hk.name_like("__call__")
    def _project_multimer(self, single: Float[Array, "*B N c_s"]) -> Projections:
        c = self.config

        def scalars(letter: str, width: int) -> Array:
            shape = (c.num_head, width)
            return Linear(shape, use_bias=c.scalar_bias, name=f"{letter}_scalar_projection")(single)

        def points(letter: str, number: int) -> Array:
            name = f"{letter}_point_projection"
            return PointProjection(c.num_head, number, use_bias=c.point_bias, name=name)(single)

        return (
            scalars("q", c.num_scalar_qk),
            scalars("k", c.num_scalar_qk),
            scalars("v", c.num_scalar_v),
            points("q", c.num_point_qk),
            points("k", c.num_point_qk),
            points("v", c.num_point_v),
        )


class PointProjection(hk.Module):
    """Points of each head in the local frame, in AlphaFold-Multimer's order: per head, coordinate-major."""

    def __init__(self, num_head: int, num_point: int, *, use_bias: bool = True, name: str = "point_projection") -> None:
        super().__init__(name=name)
        self.num_head = num_head
        self.num_point = num_point
        self.use_bias = use_bias

    def __call__(self, single: Float[Array, "*B N c_s"]) -> Float[Array, "*B N H P 3"]:
        """Projects the single representation, in at least float32."""
        shape = (self.num_head, 3 * self.num_point)
        points = Linear(shape, use_bias=self.use_bias, full_precision=True, name="point_projection")(single)
        return jnp.swapaxes(points.reshape(*points.shape[:-1], 3, self.num_point), -1, -2)


def transform_ipa(config: IPAConfig, *, implementation: Implementation | None = None) -> hk.Transformed:
    """Invariant point attention as a pair of pure functions, init(rng, …) and apply(params, …).

    Both take the arguments of `InvariantPointAttention.__call__`. The attention has no dropout, so apply takes no rng.

    Raises:
        ValueError: apply is called with an rng, or with None in its place.
    """

    def forward(
        single: Float[Array, "*B N c_s"],
        pair: Float[Array, "*B N N c_z"] | None,
        rigids: Rigid,
        mask: Shaped[Array, "*B N"] | None = None,
        *,
        key_mask: Shaped[Array, "*B N"] | None = None,
        pair_mask: Shaped[Array, "*B N N"] | None = None,
        return_attention: bool = False,
    ) -> Float[Array, "*B N c_s"] | tuple[Float[Array, "*B N c_s"], Float[Array, "*B H N N"]]:
        ipa = InvariantPointAttention(config, implementation=implementation)
        hidden = {"key_mask": key_mask, "pair_mask": pair_mask}
        return ipa(single, pair, rigids, mask, **hidden, return_attention=return_attention)

    check_config(config, IPAConfig)
    check_implementation(implementation)
    return without_rng(hk.transform(forward), "single, pair, rigids, mask")


def unpack_monomer(config: IPAConfig, q: Array, kv: Array, q_points: Array, kv_points: Array) -> Projections:
    """Splits the monomer's four projections (*B, N, channels) into six, with heads apart and coordinates last."""
    batch, h = q.shape[:-1], config.num_head
    q, kv = (x.reshape(*batch, h, x.shape[-1] // h) for x in (q, kv))
    q_points, kv_points = (
        jnp.moveaxis(x.reshape(*batch, 3, h, x.shape[-1] // (3 * h)), -3, -1) for x in (q_points, kv_points)
    )
    k, v = jnp.split(kv, [config.num_scalar_qk], -1)
    k_points, v_points = jnp.split(kv_points, [config.num_point_qk], -2)
    return q, k, v, q_points, k_points, v_points


def features(
    config: IPAConfig,
    o: Float[Array, "*B N H Cv"],
    o_points: Float[Array, "*B N H Pv 3"],
    o_pair: Float[Array, "*B N H c_z"] | None,
) -> Float[Array, "*B N features"]:
    """Input of line 11's projection: o, local points by coordinate, their lengths, o_pair; heads outermost in each."""
    x, y, z = jnp.moveaxis(o_points, -1, 0)
    parts = (o, x, y, z, lengths(config, o_points), *(() if o_pair is None else (o_pair,)))
    return jnp.concatenate([jax.lax.collapse(part, part.ndim - 2) for part in parts], -1)


def point_weights(config: IPAConfig, gamma: Float[Array, " H"]) -> Float[Array, " H"]:
    """Weights of the heads' points, from γ."""
    gamma = gamma.astype(at_least_float32(gamma.dtype))
    return jax.nn.softplus(gamma) if config.point_weight_form == "softplus" else gamma


def lengths(config: IPAConfig, points: Float[Array, "*B 3"]) -> Float[Array, "*B"]:
    """Lengths of points by config.norm_form; the gradient is finite even if a length is zero."""
    length2 = jnp.sum(points * points, -1)
    if config.norm_form == "add":
        return safe_sqrt(length2) if config.norm_epsilon == 0 else jnp.sqrt(length2 + config.norm_epsilon)
    return jnp.sqrt(jnp.maximum(length2, config.norm_epsilon**2))


def centre(rigids: Rigid, mask: Shaped[Array, "*B N"] | None) -> Rigid:
    """Translates all frames so that their masked mean is the origin, which keeps far coordinates precise.

    The attention does not change when all frames move alike, so no gradient passes through the mean.
    """
    translation = rigids.translation
    weight = jnp.ones_like(translation[..., :1]) if mask is None else mask[..., None].astype(translation.dtype)
    total = jnp.sum(weight, -2, keepdims=True)
    mean = jnp.sum(weight * translation, -2, keepdims=True) / jnp.maximum(total, 1)
    # XLA may compute the mean again where it is used, and sum in another order. Rounded to 11 bits, all agree.
    mean = jax.lax.reduce_precision(jax.lax.stop_gradient(mean), jnp.finfo(mean.dtype).nexp, 10)
    return Rigid(rigids.rotation, translation - mean)


def _check_unit(config: IPAConfig, rigids: Rigid, mask: Shaped[Array, "*B N"] | None) -> None:
    """Warns of frames in Å, where values can be read: on CPU, outside traces and transforms."""
    if not may_be_in_angstroms(config):
        return
    if at_hand(rigids.translation, mask, jnp.zeros(())):  # under jit a constant is a tracer
        valid = None if mask is None else np.asarray(mask)
        warn_if_in_angstroms(config, np.asarray(rigids.translation), valid)
