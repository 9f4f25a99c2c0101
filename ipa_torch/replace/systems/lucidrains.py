"""Layers of the PyPI package `invariant-point-attention`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ipa_torch.invariant_point_attention import Projections, lengths
from ipa_torch.replace.adapters import Adapter, attend, bind_arguments, check_untouched, place_points, project_points
from ipa_torch.replace.systems.system import System
from ipa_torch.rigid import Rigid


class LucidrainsAdapter(Adapter):
    """Adapter of the package `invariant-point-attention`: row-vector frames; masked queries weight all keys equally."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The update of the single representation."""
        layer, settings = cast(Any, self), self._ipa_twins
        check_untouched(layer)
        given = bind_arguments(self, arguments, named)
        x, mask = given["single_repr"], given["mask"]
        pair = None if settings.config.pair_channel is None else given["pairwise_repr"]
        if settings.config.pair_channel is not None and pair is None:
            raise ValueError("a pair representation was expected as the second argument; got None")
        h = settings.config.num_head
        scalars = (to(x).unflatten(-1, (h, -1)) for to in (layer.to_scalar_q, layer.to_scalar_k, layer.to_scalar_v))
        points = (project_points(to, settings, x) for to in (layer.to_point_q, layer.to_point_k, layer.to_point_v))
        local = (*scalars, *(y.unflatten(-1, (h, -1, 3)) for y in points))
        frames = Rigid(given["rotations"].transpose(-1, -2), given["translations"])
        projections, rigids = place_points(cast(Projections, local), pair, frames, mask)
        linear = None if pair is None else layer.to_pairwise_attn_bias[0]
        o, o_points, o_pair = attend(settings, projections, pair, mask, linear, layer.point_weights)
        if mask is not None:
            _, _, v, _, _, v_points = projections
            valid = mask.bool()[..., None, None]
            o = torch.where(valid, o, v.mean(-3, keepdim=True))
            o_points = torch.where(valid[..., None], o_points, v_points.mean(-4, keepdim=True))
            if pair is not None:
                o_pair = torch.where(valid, o_pair, pair.mean(-2, dtype=o.dtype)[..., None, :])
        o_points = rigids.apply_inverse(o_points)
        parts = [o, o_points.flatten(-2), lengths(settings.config, o_points), *(() if o_pair is None else (o_pair,))]
        return layer.to_out(torch.cat([part.flatten(-2) for part in parts], -1).to(x.dtype))


LUCIDRAINS = System(
    LucidrainsAdapter,
    takes=("single_repr", "pairwise_repr", "rotations", "translations", "mask"),
    inputs=lambda s, z, rotation, translation, mask, _: {
        "single_repr": s,
        "pairwise_repr": z,
        "rotations": rotation.transpose(-1, -2).to(s.dtype),
        "translations": translation.to(s.dtype),
        "mask": mask.bool(),
    },
    bias="to_pairwise_attn_bias.0",
    output="to_out",
)
