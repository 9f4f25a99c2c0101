"""Layers of lociPARSE, whose attention reads a list of neighbours for each residue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ipa_torch.invariant_point_attention import features, unpack_monomer
from ipa_torch.replace.adapters import (
    Adapter,
    attend,
    bind_arguments,
    check_untouched,
    place_points,
    project_points,
)
from ipa_torch.replace.rigids import rotation_and_translation
from ipa_torch.replace.systems.system import System
from ipa_torch.rigid import Rigid


class LociParseAdapter(Adapter):
    """Adapter of lociPARSE's layers: our attention over all residues, in which each reads its neighbours alone."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The update of the nodes, before residual sum and norm."""
        layer: Any = self
        settings = self._ipa_twins
        check_untouched(layer)
        given = bind_arguments(self, arguments, named)
        s, neighbours = given["h_V"], given["E_idx"]
        allowed = _neighbours_allowed(neighbours, given["mask_attend"], s.shape[-2])
        z = _at_neighbours(given["h_E"], neighbours, s.shape[-2])
        rotation, translation = rotation_and_translation(given["bb_to_global"])
        scalars = (layer.linear_q(s), layer.linear_kv(s))
        points = (project_points(to, settings, s) for to in (layer.linear_q_points, layer.linear_kv_points))
        local = unpack_monomer(settings.config, *scalars, *points)
        projections, rigids = place_points(local, z, Rigid(rotation, translation), None)
        o, o_points, o_pair = attend(
            settings, projections, z, None, layer.linear_b, layer.head_weights, pair_mask=allowed
        )
        read = features(settings.config, o, rigids.apply_inverse(o_points), o_pair)
        return layer.linear_out(read.to(z.dtype))


def _neighbours_allowed(neighbours: Tensor, mask: Tensor | None, number: int) -> Tensor | None:
    """True where a residue reads another one; None if all read all.

    Raises:
        ValueError: a residue has one neighbour twice, or the mask has other values than 0 and 1.
    """
    in_order = neighbours.sort(-1).values
    if bool((in_order[..., 1:] == in_order[..., :-1]).any()):
        raise ValueError(
            "E_idx was expected to name each neighbour of a residue once; a neighbour comes twice, which our attention "
            "cannot weight twice: call restore_ipa"
        )
    if mask is None:
        if neighbours.shape[-1] == number:
            return None
        readable = torch.ones_like(neighbours, dtype=torch.bool)
    else:
        readable = mask.bool()
        if bool((readable != mask).any()):
            raise ValueError(
                "mask_attend was expected to be 0 or 1, since our attention either reads a neighbour or does not; got "
                "values between: call restore_ipa"
            )
        readable = readable | ~readable.any(-1, keepdim=True)  # a row of zeros has no effect in the layer
    return _at_neighbours(readable, neighbours, number)


def _at_neighbours(x: Tensor, neighbours: Tensor, number: int) -> Tensor:
    """Values (…, N, k, …) of neighbours at their places (…, N, N, …) among all residues; zeros at the others."""
    axis = neighbours.ndim - 1
    indices = neighbours.reshape(*neighbours.shape, *[1] * (x.ndim - neighbours.ndim)).expand_as(x)
    return x.new_zeros((*x.shape[:axis], number, *x.shape[axis + 1 :])).scatter(axis, indices, x)


def _inputs(single: Tensor, pair: Tensor, rotation: Tensor, translation: Tensor, mask: Tensor, rigids: Any) -> Any:
    """Arguments of the layer's call: for each residue half of all residues, in a random order."""
    number = single.shape[-2]
    generator = torch.Generator().manual_seed(0)
    neighbours = torch.rand(pair.shape[:-1], generator=generator).argsort(-1)[..., : (number + 1) // 2]
    neighbours = neighbours.contiguous().to(pair.device)
    return {
        "h_V": single,
        "h_E": pair.gather(-2, neighbours[..., None].expand(*neighbours.shape, pair.shape[-1])),
        "E_idx": neighbours,
        "bb_to_global": rigids(rotation, translation),
        "mask_attend": mask[..., None, :].expand(pair.shape[:-1]).gather(-1, neighbours),
    }


LOCIPARSE = System(
    LociParseAdapter,
    takes=("h_V", "h_E", "E_idx", "bb_to_global", "mask_attend"),
    inputs=_inputs,
    bias="linear_b",
    output="linear_out",
    method="_get_node_update",
)
