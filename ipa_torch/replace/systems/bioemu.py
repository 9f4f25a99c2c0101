"""Layers of BioEmu and Distributional Graphormer (DiG), which are of one class."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ipa_torch.attention import masks
from ipa_torch.invariant_point_attention import Projections, lengths
from ipa_torch.replace.adapters import Adapter, attend, bind_arguments, check_untouched, place_points, project_points
from ipa_torch.replace.systems.system import System
from ipa_torch.rigid import Rigid


class BioEmuAdapter(Adapter):
    """Adapter of BioEmu's and DiG's layers: transposed rotations, a mask as a bias on keys, values of the pair by head.

    A residue that may attend to none reads zeros, where the layer itself gives NaN.
    """

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The update of the single representation, after the layer's own dropout."""
        layer, settings = cast(Any, self), self._ipa_twins
        check_untouched(layer)
        given = bind_arguments(self, arguments, named)
        x, pair, (translation, transposed) = given["x1d"], given["x2d"], given["pose"]
        if pair is None:
            raise ValueError("a pair representation was expected as x2d; got None")
        seen, offset = _of_keys(given["bias"], x)
        h = settings.config.num_head
        scalars = (to(x).unflatten(-1, (h, -1)) for to in (layer.scalar_query, layer.scalar_key, layer.scalar_value))
        points = (
            project_points(to, settings, x).unflatten(-1, (h, -1, 3))
            for to in (layer.point_query, layer.point_key, layer.point_value)
        )
        frames = Rigid(transposed.transpose(-1, -2), translation)
        projections, rigids = place_points(cast(Projections, (*scalars, *points)), pair, frames, seen)
        projections = _with_offset(projections, offset, settings.config.num_logit_terms)
        o, o_points, o_pair = attend(
            settings, projections, pair, None, layer.pair_bias, layer.trained_point_weight, key_mask=seen
        )
        o_points = masks.zero_where_blind(rigids.apply_inverse(o_points), None, seen, None)
        by_head = layer.pair_value.weight.unflatten(0, (h, -1)).to(o_pair.dtype)
        o_pair = torch.einsum("...hz,hcz->...hc", o_pair, by_head)  # linear, so it may follow the sum
        parts = [o, o_points.flatten(-2), o_pair, lengths(settings.config, o_points)]
        return layer.dropout(layer.fc_out(torch.cat([part.flatten(-2) for part in parts], -1).to(x.dtype)))


def _of_keys(bias: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A bias of the logits as a mask of the keys, False at -inf, and as what it adds to the others' logits.

    Raises:
        ValueError: the bias differs between heads or queries.
    """
    bias = torch.as_tensor(bias, device=x.device)
    of_keys = bias[(None,) * (4 - bias.ndim)] if bias.ndim < 4 else bias
    if of_keys.ndim > 4 or tuple(of_keys.shape[-3:-1]) != (1, 1):
        raise ValueError(
            f"a bias of the keys alone was expected, (B, 1, 1, N) with 0 or -inf, as the models of BioEmu and DiG pass "
            f"it; got {tuple(bias.shape)}: call restore_ipa to use it"
        )
    of_keys = of_keys[:, 0, 0].expand(x.shape[:-1])
    seen = of_keys != -math.inf
    return seen, torch.where(seen, of_keys, 0)


def _with_offset(projections: Projections, offset: Tensor, terms: int) -> Projections:
    """Queries and keys with one channel more, which adds the offset to each key's logits."""
    q, k, *others = projections
    width = q.shape[-1]
    one = torch.full_like(q[..., :1], math.sqrt(terms * (width + 1)))
    added = offset.to(k.dtype)[..., None, None].expand_as(k[..., :1])
    q, k = torch.cat([q * math.sqrt((width + 1) / width), one], -1), torch.cat([k, added], -1)
    return cast(Projections, (q, k, *others))


BIOEMU = System(
    BioEmuAdapter,
    takes=("x1d", "x2d", "pose", "bias"),
    inputs=lambda s, z, rotation, translation, mask, _: {
        "x1d": s,
        "x2d": z,
        "pose": (translation.to(s.dtype), rotation.transpose(-1, -2).to(s.dtype)),
        "bias": torch.zeros_like(mask).masked_fill(~mask.bool(), -math.inf)[..., None, None, :],
    },
    bias="pair_bias",
    output="fc_out",
    pair_values="pair_value",
    epsilon="",
    dropout="dropout",
    rounds_to=torch.float32,
)
