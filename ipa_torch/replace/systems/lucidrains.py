"""Layers of the PyPI package `invariant-point-attention` and of IgFold."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ipa_torch.attention.masks import zero_where_blind
from ipa_torch.invariant_point_attention import Projections, lengths
from ipa_torch.replace.adapters import Adapter, attend, bind_arguments, check_untouched, place_points, project_points
from ipa_torch.replace.systems.system import System
from ipa_torch.rigid import Rigid


class LucidrainsAdapter(Adapter):
    """Adapter of the package `invariant-point-attention`: row-vector frames; masked queries weight all keys equally.

    IgFold's layers also take `key_padding_mask`: no query reads a key that it hides.
    """

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The update of the single representation."""
        layer, settings = cast(Any, self), self._ipa_twins
        check_untouched(layer)
        given = bind_arguments(self, arguments, named)
        x, mask, readable = given["single_repr"], given.get("mask"), given.get("key_padding_mask")
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
        read = attend(settings, projections, pair, mask, linear, layer.point_weights, key_mask=readable)
        o, o_points, o_pair = read if mask is None else _uniform_where_masked(read, projections, pair, mask, readable)
        o_points = zero_where_blind(rigids.apply_inverse(o_points), None, readable, None)
        parts = [o, o_points.flatten(-2), lengths(settings.config, o_points), *(() if o_pair is None else (o_pair,))]
        return layer.to_out(torch.cat([part.flatten(-2) for part in parts], -1).to(x.dtype))


def _uniform_where_masked(
    read: tuple[Tensor, Tensor, Tensor | None],
    projections: Projections,
    pair: Tensor | None,
    mask: Tensor,
    readable: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums over keys; a query from which the mask hides all keys gets the mean over the readable ones."""
    o, o_points, o_pair = read
    _, _, v, _, _, v_points = projections
    valid = mask.bool()
    if readable is not None:
        valid = valid & (valid & readable.bool()).any(-1, keepdim=True)
    valid = valid[..., None, None]
    o = torch.where(valid, o, _mean(v, readable, v.ndim - 3, o.dtype)[..., None, :, :])
    means = _mean(v_points, readable, v_points.ndim - 4, o.dtype)
    o_points = torch.where(valid[..., None], o_points, means[..., None, :, :, :])
    if pair is not None:
        o_pair = torch.where(valid, cast(Tensor, o_pair), _mean(pair, readable, pair.ndim - 2, o.dtype)[..., None, :])
    return o, o_points, o_pair


def _mean(x: Tensor, readable: Tensor | None, axis: int, dtype: torch.dtype) -> Tensor:
    """Mean over the keys that may be read, which lie along an axis; zeros if there is none."""
    if readable is None:
        return x.mean(axis, dtype=dtype)
    shape = [*readable.shape[:-1], *[1] * (axis - readable.ndim + 1), readable.shape[-1], *[1] * (x.ndim - axis - 1)]
    keys = readable.reshape(shape).to(x.dtype)
    return (x * keys).sum(axis, dtype=dtype) / keys.sum(axis, dtype=dtype).clamp(min=1)


LUCIDRAINS = System(
    LucidrainsAdapter,
    takes=("single_repr", "pairwise_repr", "rotations", "translations", "mask"),
    inputs=lambda s, z, rotation, translation, mask, _: {
        "single_repr": s,
        "pairwise_repr": z,
        "rotations": rotation.transpose(-1, -2).to(s.dtype),
        "translations": translation.to(s.dtype),
        "mask": mask.bool(),
        "key_padding_mask": mask.bool().roll(1, -1),  # hides keys of valid and of masked residues
    },
    dispensable=("mask",),
    optional=("key_padding_mask",),
    bias="to_pairwise_attn_bias.0",
    output="to_out",
)
