"""Blocks of attention and transition, and a transformer of such blocks that updates frames after each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ipa_bridge.checks import check_arrays, check_config, check_floating, check_rigids, check_shape, check_tokens
from ipa_bridge.config import Implementation, IPABlockConfig, IPATransformerConfig
from ipa_bridge.parameters import haiku_name
from ipa_bridge.tuples import by_name
from ipa_torch.attention import check_implementation
from ipa_torch.dtypes import at_least_float32
from ipa_torch.invariant_point_attention import InvariantPointAttention
from ipa_torch.layers import Initializer, LayerNorm, Linear, Module, transition
from ipa_torch.rigid import Rigid
from ipa_torch.values import integers_outside


@by_name
class IPATransformerOutput(NamedTuple):
    """Predictions of the last layer.

    Attributes:
        act: single representation.
        rigids: frames of the residues, (*B, N), in the unit of the input frames.
        points: a point per residue in the global frame; None where config.predict_points is False.
    """

    act: Float[Tensor, "*B N c_s"]
    rigids: Rigid
    points: Float[Tensor, "*B N 3"] | None


class IPABlock(Module):
    """Attention and transition, each with a residual connection and a layer norm (Suppl. Alg. 20, lines 6–9).

    Parameters have the names of AlphaFold's fold iteration. Invariant: moving all frames alike changes no output.

    Args:
        config: widths and variants; see `IPABlockConfig`.
        implementation: implementation of the attention; see `point_attention`.
    """

    def __init__(self, config: IPABlockConfig, *, implementation: Implementation | None = None) -> None:
        check_config(config, IPABlockConfig)
        check_implementation(implementation)
        super().__init__()
        self.config = c = config
        width, layers = c.num_channel, c.num_layer_in_transition
        final: Initializer = "zeros" if c.ipa.zero_init else "linear"
        self.invariant_point_attention = InvariantPointAttention(c.ipa, implementation=implementation)
        self.attention_layer_norm = LayerNorm(width)
        for i in range(layers):
            last = i == layers - 1
            inputs, outputs = (width if end else c.transition_factor * width for end in (i == 0, last))
            self.add_module(haiku_name("transition", i), Linear(inputs, outputs, initializer=final if last else "relu"))
        self.transition_layer_norm = LayerNorm(width)

    def forward(
        self,
        act: Float[Tensor, "*B N c_s"],
        pair: Float[Tensor, "*B N N c_z"] | None,
        rigids: Rigid,
        mask: Shaped[Tensor, "*B N"] | None = None,
    ) -> Float[Tensor, "*B N c_s"]:
        """Updated activations, in their dtype.

        Args:
            act: single representation.
            pair: pair representation; None where config.ipa.pair_channel is None.
            rigids: frames of the residues, (*B, N); see `InvariantPointAttention`.
            mask: 1 or True where a residue is valid.

        Raises:
            ValueError: shapes do not fit the config or each other.
        """
        check_arrays(Tensor, act=act, pair=pair, mask=mask)
        check_floating(act=act)
        c = self.config
        ipa = self.invariant_point_attention
        attention_layer_norm = self.attention_layer_norm
        transition_layer_norm = self.transition_layer_norm
        update = ipa(act if c.post_norm else attention_layer_norm(act), pair, rigids, mask)
        act = F.dropout(act + update, c.attention_dropout, self.training)
        act = attention_layer_norm(act) if c.post_norm else act
        act = act + transition(act if c.post_norm else transition_layer_norm(act), self._transition_layers())
        act = F.dropout(act, c.transition_dropout, self.training)
        return transition_layer_norm(act) if c.post_norm else act

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any
        __call__ = forward

    def _transition_layers(self) -> list[nn.Module]:
        return [getattr(self, haiku_name("transition", i)) for i in range(self.config.num_layer_in_transition)]


class IPATransformer(Module):
    """Blocks with separate weights, each followed by an update of all frames.

    Equivariant: if all input frames are moved alike, the output frames move with them.

    Args:
        config: widths and variants; see `IPATransformerConfig`.
        implementation: implementation of the attention; see `point_attention`.
    """

    def __init__(self, config: IPATransformerConfig, *, implementation: Implementation | None = None) -> None:
        check_config(config, IPATransformerConfig)
        check_implementation(implementation)
        super().__init__()
        self.config = c = config
        initializer: Initializer = "zeros" if c.ipa.zero_init else "linear"
        if c.num_token is not None:
            self.token_embedding = nn.Embedding(c.num_token, c.num_channel)
        for i in range(c.num_layer):
            self.add_module(haiku_name("ipa_block", i), IPABlock(c.block, implementation=implementation))
            update = Linear(c.num_channel, 6, initializer=initializer, full_precision=True)
            self.add_module(haiku_name("affine_update", i), update)
        if c.predict_points:
            self.predicted_points = Linear(c.num_channel, 3, full_precision=True)

    def forward(
        self,
        single: Float[Tensor, "*B N c_s"] | Int[Tensor, "*B N"],
        pair: Float[Tensor, "*B N N c_z"] | None = None,
        rigids: Rigid | None = None,
        mask: Shaped[Tensor, "*B N"] | None = None,
    ) -> IPATransformerOutput:
        """Activations, frames and, with config.predict_points, points of the last layer.

        Args:
            single: single representation, or integer tokens if config.num_token is not None.
            pair: pair representation; None where config.ipa.pair_channel is None.
            rigids: initial frames, (*B, N); None for the identity.
            mask: 1 or True where a residue is valid; valid residues ignore all others in every layer.

        Raises:
            ValueError: shapes do not fit the config or each other, or tokens are not integers or are outside the
                vocabulary where the mask is 1. Values are checked only on CPU, outside traces.
        """
        c = self.config
        check_arrays(Tensor, single=single, pair=pair, mask=mask)
        if rigids is not None:
            check_rigids(rigids, Tensor)
        check_tokens(c, single)
        if c.num_token is not None:
            if mask is not None:
                check_shape("mask", mask, single.shape, "single")
            check_tokens(c, single, integers_outside(single, c.num_token - 1, mask))
        act = single if c.num_token is None else self.token_embedding(single)
        dtype = at_least_float32(act.dtype)  # independent of the initial frames' dtype
        if rigids is None:
            rigids = Rigid.identity(act.shape[:-1], dtype=dtype, device=act.device)
        rigids = rigids.astype(dtype)
        for i in range(c.num_layer):
            frozen = rigids.stop_rotation_gradient() if c.detach_rotations else rigids
            act = getattr(self, haiku_name("ipa_block", i))(act, pair, frozen, mask)
            rigids = self._moved(getattr(self, haiku_name("affine_update", i))(act), rigids, frozen)
        points = rigids.apply(self.predicted_points(act)) if c.predict_points else None
        return IPATransformerOutput(act, rigids, points)

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any
        __call__ = forward

    def _moved(self, step: Float[Tensor, "*B N 6"], rigids: Rigid, frozen: Rigid) -> Rigid:
        """Alg. 23 in each residue's own frame: the quaternion (1, b, c, d), normalised, and a translation."""
        quaternion = torch.cat([torch.ones_like(step[..., :1]), step[..., :3]], -1)
        turn = Rigid.from_quaternion(quaternion, torch.zeros_like(step[..., 3:]))
        turned = turn.invert().compose(rigids) if self.config.original_composition_order else rigids.compose(turn)
        return Rigid(turned.rotation, frozen.apply(step[..., 3:]))
