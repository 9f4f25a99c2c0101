"""Invariant point attention (Jumper et al. 2021, Suppl. Alg. 22) with AlphaFold's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ipa_bridge.checks import (
    check_arrays,
    check_config,
    check_ipa_inputs,
    check_rigids,
    may_be_in_angstroms,
    warn_if_in_angstroms,
)
from ipa_bridge.config import Implementation, IPAConfig
from ipa_torch.attention import check_implementation, masks, point_attention
from ipa_torch.dtypes import at_least_float32, without_autocast
from ipa_torch.layers import Linear, Module, initial_frequencies, rotate_by_index
from ipa_torch.numerics import safe_sqrt
from ipa_torch.rigid import Rigid
from ipa_torch.values import at_hand

Projections = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k and v, then query, key and value points."""


class InvariantPointAttention(Module):
    """Attention over residues, the pair representation and points in the residues' frames.

    Submodules have AlphaFold's haiku names, so its published parameters convert by a rule. Point projections,
    frames, distances, the softmax and the sums weighted by it run in at least float32, also under autocast.

    Args:
        config: widths and variants; see `IPAConfig`.
        implementation: implementation of the attention; see `point_attention`.
    """

    def __init__(self, config: IPAConfig, *, implementation: Implementation | None = None) -> None:
        check_config(config, IPAConfig)
        check_implementation(implementation)
        super().__init__()
        self.config = c = config
        self.implementation = implementation
        c_s, h = c.num_channel, c.num_head
        self.trainable_point_weights = nn.Parameter(torch.full((h,), c.point_weight_init))
        if c.layout == "monomer":
            self.q_scalar = Linear(c_s, h * c.num_scalar_qk, use_bias=c.scalar_bias)
            self.kv_scalar = Linear(c_s, h * (c.num_scalar_qk + c.num_scalar_v), use_bias=c.scalar_bias)
            self.q_point_local = Linear(c_s, 3 * h * c.num_point_qk, use_bias=c.point_bias, full_precision=True)
            self.kv_point_local = Linear(
                c_s, 3 * h * (c.num_point_qk + c.num_point_v), use_bias=c.point_bias, full_precision=True
            )
        else:
            self.q_scalar_projection = Linear(c_s, h * c.num_scalar_qk, use_bias=c.scalar_bias)
            self.k_scalar_projection = Linear(c_s, h * c.num_scalar_qk, use_bias=c.scalar_bias)
            self.v_scalar_projection = Linear(c_s, h * c.num_scalar_v, use_bias=c.scalar_bias)
            self.q_point_projection = PointProjection(c_s, h, c.num_point_qk, use_bias=c.point_bias)
            self.k_point_projection = PointProjection(c_s, h, c.num_point_qk, use_bias=c.point_bias)
            self.v_point_projection = PointProjection(c_s, h, c.num_point_v, use_bias=c.point_bias)
        if c.rotary_embedding:
            self.rotary_frequencies = nn.Parameter(initial_frequencies(c.num_scalar_qk))
        if c.pair_channel is not None and c.pair_bias:
            self.attention_2d = Linear(c.pair_channel, h, use_bias=c.attention_2d_bias)
        if c.pair_channel is not None and c.pair_value_channel is not None:
            if c.pair_value_per_head:
                self.pair_value = Linear(c.pair_channel, h * c.pair_value_channel, use_bias=False)
            else:
                self.down_z = Linear(c.pair_channel, c.pair_value_channel)
        self.output_projection = Linear(c.num_feature, c_s, initializer="zeros" if c.zero_init else "linear")

    def reset_parameters(self) -> None:
        """Initialises the parameters again, in the order of construction."""
        nn.init.constant_(self.trainable_point_weights, self.config.point_weight_init)
        if self.config.rotary_embedding:
            with torch.no_grad():
                self.rotary_frequencies.copy_(initial_frequencies(self.config.num_scalar_qk))
        super().reset_parameters()

    @overload
    def forward(
        self,
        single: Float[Tensor, "*B N c_s"],
        pair: Float[Tensor, "*B N N c_z"] | None,
        rigids: Rigid,
        mask: Shaped[Tensor, "*B N"] | None = None,
        *,
        key_mask: Shaped[Tensor, "*B N"] | None = None,
        pair_mask: Shaped[Tensor, "*B N N"] | None = None,
        return_attention: Literal[False] = False,
    ) -> Float[Tensor, "*B N c_s"]: ...

    @overload
    def forward(
        self,
        single: Float[Tensor, "*B N c_s"],
        pair: Float[Tensor, "*B N N c_z"] | None,
        rigids: Rigid,
        mask: Shaped[Tensor, "*B N"] | None = None,
        *,
        key_mask: Shaped[Tensor, "*B N"] | None = None,
        pair_mask: Shaped[Tensor, "*B N N"] | None = None,
        return_attention: Literal[True],
    ) -> tuple[Float[Tensor, "*B N c_s"], Float[Tensor, "*B H N N"]]: ...

    @overload
    def forward(
        self,
        single: Float[Tensor, "*B N c_s"],
        pair: Float[Tensor, "*B N N c_z"] | None,
        rigids: Rigid,
        mask: Shaped[Tensor, "*B N"] | None = None,
        *,
        key_mask: Shaped[Tensor, "*B N"] | None = None,
        pair_mask: Shaped[Tensor, "*B N N"] | None = None,
        return_attention: bool = False,
    ) -> Float[Tensor, "*B N c_s"] | tuple[Float[Tensor, "*B N c_s"], Float[Tensor, "*B H N N"]]: ...

    def forward(
        self,
        single: Float[Tensor, "*B N c_s"],
        pair: Float[Tensor, "*B N N c_z"] | None,
        rigids: Rigid,
        mask: Shaped[Tensor, "*B N"] | None = None,
        *,
        key_mask: Shaped[Tensor, "*B N"] | None = None,
        pair_mask: Shaped[Tensor, "*B N N"] | None = None,
        return_attention: bool = False,
    ) -> Float[Tensor, "*B N c_s"] | tuple[Float[Tensor, "*B N c_s"], Float[Tensor, "*B H N N"]]:
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
        check_rigids(rigids, Tensor)
        check_arrays(Tensor, single=single, pair=pair, mask=mask, key_mask=key_mask, pair_mask=pair_mask)
        check_ipa_inputs(self.config, single, pair, rigids.rotation, rigids.translation, mask)
        _check_unit(self.config, rigids, mask)
        dtype = at_least_float32(*(x.dtype for x in (single, pair) if x is not None))
        rigids = centre(rigids.astype(at_least_float32(dtype, *(x.dtype for x in rigids))), mask).astype(dtype)
        if self.config.position_scale != 1:
            rigids = rigids.scale_translation(1 / self.config.position_scale)
        pair_bias_weight, weights = self.logit_weights()
        attended = pair
        if pair is not None and pair_bias_weight is None and self.config.pair_bias:
            attended, pair_bias_weight = self._with_bias(pair)
        o, o_points, o_pair, *attention = point_attention(
            *self.project(single, rigids),
            attended,
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
        o_pair = o_pair if attended is pair else o_pair[..., : self.config.pair_channel]
        o_points = masks.zero_where_blind(rigids.apply_inverse(o_points), mask, key_mask, pair_mask)
        read = features(self.config, o, o_points, self._pair_values(o_pair))
        output = self.output_projection(read).to(single.dtype)  # line 11
        return (output, *attention) if return_attention else output

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any
        __call__ = forward

    def project(self, single: Float[Tensor, "*B N c_s"], rigids: Rigid) -> Projections:
        """Lines 1–3: q, k, v (*B, N, H, C) and query, key and value points (*B, N, H, P, 3) in the global frame.

        All are in the dtype of the frames.
        """
        monomer = self.config.layout == "monomer"
        projections = self._project_monomer(single) if monomer else self._project_multimer(single)
        q, k, v, q_points, k_points, v_points = (x.to(rigids.translation.dtype) for x in projections)
        if self.config.rotary_embedding:
            q, k = (rotate_by_index(x, self.rotary_frequencies) for x in (q, k))
        return q, k, v, rigids.apply(q_points), rigids.apply(k_points), rigids.apply(v_points)

    def logit_weights(self) -> tuple[Float[Tensor, "c_z H"] | None, Float[Tensor, " H"]]:
        """Weight that projects the pair to a bias per head (line 4), and point weights, softplus(γ) (line 7) or γ.

        The weight is None without a pair, and if the pair gives no bias. It is also None if attention_2d was wrapped,
        replaced or given hooks: then it must be called to know its output.
        """
        pair_bias_weight = None
        if self.config.pair_channel is not None and self.config.pair_bias and _is_as_made(self.attention_2d):
            pair_bias_weight = weight_without_bias(self.attention_2d)
        return pair_bias_weight, point_weights(self.config, self.trainable_point_weights)

    def _pair_values(self, o_pair: Float[Tensor, "*B N H c_z"] | None) -> Float[Tensor, "*B N H c"] | None:
        """The attended pair as it is read: projected, if there is a projection. It is linear, so may follow the sum."""
        if o_pair is None or self.config.pair_value_channel is None:
            return o_pair
        if not self.config.pair_value_per_head:
            return self.down_z(o_pair)
        per_head = self.pair_value(o_pair).unflatten(-1, (self.config.num_head, -1))
        return per_head.diagonal(dim1=-3, dim2=-2).transpose(-1, -2)

    def _with_bias(self, pair: Float[Tensor, "*B N N c_z"]) -> tuple[Float[Tensor, "*B N N c"], Float[Tensor, "c H"]]:
        """The pair with its biases appended as channels, and the weight that selects these. It copies the pair."""
        with without_autocast(pair.device.type):
            bias = self.attention_2d(pair)
        dtype = at_least_float32(pair.dtype, bias.dtype)
        heads = torch.eye(bias.shape[-1], dtype=dtype, device=pair.device)
        return torch.cat([pair.to(dtype), bias.to(dtype)], -1), F.pad(heads, (0, 0, pair.shape[-1], 0))

    def _project_monomer(self, single: Float[Tensor, "*B N c_s"]) -> Projections:
        packed = (
            self.q_scalar(single),
            self.kv_scalar(single),
            self.q_point_local(single),
            self.kv_point_local(single),
        )
        return unpack_monomer(self.config, *packed)

    def _project_multimer(self, single: Float[Tensor, "*B N c_s"]) -> Projections:
        h = self.config.num_head
        return (
            self.q_scalar_projection(single).unflatten(-1, (h, -1)),
            self.k_scalar_projection(single).unflatten(-1, (h, -1)),
            self.v_scalar_projection(single).unflatten(-1, (h, -1)),
            self.q_point_projection(single),
            self.k_point_projection(single),
            self.v_point_projection(single),
        )


class PointProjection(Module):
    """Points of each head in the local frame, in AlphaFold-Multimer's order: per head, coordinate-major."""

    def __init__(self, num_channel: int, num_head: int, num_point: int, *, use_bias: bool = True) -> None:
        super().__init__()
        self.num_head = num_head
        self.point_projection = Linear(num_channel, 3 * num_head * num_point, use_bias=use_bias, full_precision=True)

    def forward(self, single: Float[Tensor, "*B N c_s"]) -> Float[Tensor, "*B N H P 3"]:
        """Projects the single representation, in at least float32."""
        return self.point_projection(single).unflatten(-1, (self.num_head, 3, -1)).transpose(-1, -2)


def _is_as_made(linear: nn.Module) -> bool:
    """True if a call only multiplies by the weight, which may be parametrised, and adds the bias."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return type(linear).forward is Linear.forward and "forward" not in linear.__dict__ and not any(hooks)


def weight_without_bias(linear: nn.Linear) -> Float[Tensor, "c_z H"]:
    """The weight of the pair's projection to a bias per head.

    Its bias adds a constant to all logits of a head, which cancels in the softmax. It is a parameter because AlphaFold
    has it. Multiplied by zero, it stays in the graph: its gradient is 0 instead of None, as optimisers and
    DistributedDataParallel expect.
    """
    return linear.weight.T if linear.bias is None else linear.weight.T + 0 * linear.bias


def unpack_monomer(config: IPAConfig, q: Tensor, kv: Tensor, q_points: Tensor, kv_points: Tensor) -> Projections:
    """Splits the monomer's four projections (*B, N, channels) into six, with heads apart and coordinates last."""
    q, kv = (x.unflatten(-1, (config.num_head, -1)) for x in (q, kv))
    q_points, kv_points = (
        torch.movedim(x.unflatten(-1, (3, config.num_head, -1)), -3, -1) for x in (q_points, kv_points)
    )
    k, v = kv.split([config.num_scalar_qk, config.num_scalar_v], -1)
    k_points, v_points = kv_points.split([config.num_point_qk, config.num_point_v], -2)
    return q, k, v, q_points, k_points, v_points


def features(
    config: IPAConfig,
    o: Float[Tensor, "*B N H Cv"],
    o_points: Float[Tensor, "*B N H Pv 3"],
    o_pair: Float[Tensor, "*B N H c_z"] | None,
) -> Float[Tensor, "*B N features"]:
    """Input of line 11's projection: o, local points by coordinate, their lengths, o_pair; heads outermost in each."""
    x, y, z = o_points.unbind(-1)
    parts = (o, x, y, z, lengths(config, o_points), *(() if o_pair is None else (o_pair,)))
    return torch.cat([part.flatten(-2) for part in parts], -1)


def point_weights(config: IPAConfig, gamma: Float[Tensor, " H"]) -> Float[Tensor, " H"]:
    """Weights of the heads' points, from γ."""
    gamma = gamma.to(at_least_float32(gamma.dtype))
    return F.softplus(gamma) if config.point_weight_form == "softplus" else gamma


def lengths(config: IPAConfig, points: Float[Tensor, "*B 3"]) -> Float[Tensor, "*B"]:
    """Lengths of points by config.norm_form; the gradient is finite even if a length is zero."""
    length2 = torch.sum(points * points, -1)
    if config.norm_form == "add":
        return safe_sqrt(length2) if config.norm_epsilon == 0 else torch.sqrt(length2 + config.norm_epsilon)
    return torch.sqrt(torch.clamp(length2, min=config.norm_epsilon**2))


def centre(rigids: Rigid, mask: Shaped[Tensor, "*B N"] | None) -> Rigid:
    """Translates all frames so that their masked mean is the origin, which keeps far coordinates precise.

    The attention does not change when all frames move alike, so no gradient passes through the mean.
    """
    translation = rigids.translation
    weight = torch.ones_like(translation[..., :1]) if mask is None else mask[..., None].to(translation.dtype)
    total = torch.sum(weight, -2, keepdim=True)
    mean = torch.sum(weight * translation, -2, keepdim=True) / torch.clamp(total, min=1)
    return Rigid(rigids.rotation, translation - mean.detach())


def _check_unit(config: IPAConfig, rigids: Rigid, mask: Shaped[Tensor, "*B N"] | None) -> None:
    """Warns of frames in Å, where values can be read: on CPU, outside traces and transforms."""
    if not may_be_in_angstroms(config):
        return
    if at_hand(rigids.translation, mask) and torch._C._functorch.peek_interpreter_stack() is None:
        valid = None if mask is None else mask.detach().bool().numpy()
        warn_if_in_angstroms(config, rigids.translation.detach().float().numpy(), valid)
