"""Layers of OmegaFold."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ipa_torch.invariant_point_attention import Projections, lengths
from ipa_torch.replace.adapters import Adapter, attend, bind_arguments, check_untouched, place_points, project_points
from ipa_torch.replace.systems.system import System
from ipa_torch.rigid import Rigid


class OmegaFoldAdapter(Adapter):
    """Adapter of OmegaFold's layers, called with its frames, which carry the mask of the keys.

    If the mask hides all keys, it hides none: the layer then adds the same number to all logits.
    """

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The update of the single representation. The layer itself has no gradients, and ours has."""
        layer, settings = cast(Any, self), self._ipa_twins
        check_untouched(layer)
        given = bind_arguments(self, arguments, named)
        x, pair, frames = given["node_repr"], given["edge_repr"], given["frames"]
        if pair is None:
            raise ValueError("a pair representation was expected as edge_repr; got None")
        seen = frames.mask.bool()
        seen = seen | ~seen.any(-1, keepdim=True)
        h = settings.config.num_head
        scalars = (to(x).unflatten(-1, (h, -1)) for to in (layer.q_scalar, layer.k_scalar, layer.v_scalar))
        points = (
            project_points(to, settings, x).unflatten(-1, (h, -1, 3))
            for to in (layer.q_point, layer.k_point, layer.v_point)
        )
        placed = Rigid(frames.rotation, frames.translation)
        projections, rigids = place_points(cast(Projections, (*scalars, *points)), pair, placed, seen)
        o, o_points, o_pair = attend(
            settings, projections, pair, None, layer.bias_2d, layer.trainable_point_weights, key_mask=seen
        )
        o_points = rigids.apply_inverse(o_points)
        parts = [o, o_points.flatten(-2), lengths(settings.config, o_points), o_pair]
        return layer.output_projection(torch.cat([part.flatten(-2) for part in parts], -1).to(x.dtype))


class Frames(NamedTuple):
    """Frames with what OmegaFold's layer reads of its own, for the comparison."""

    rotation: Tensor
    translation: Tensor
    mask: Tensor

    def transform(self, points: Tensor) -> Tensor:
        """Points of each frame, moved to the global frame."""
        return Rigid(self.rotation, self.translation).apply(points)

    def position_in_frame(self, points: Tensor) -> Tensor:
        """Global points, moved to each frame."""
        return Rigid(self.rotation, self.translation).apply_inverse(points)


OMEGAFOLD = System(
    OmegaFoldAdapter,
    takes=("node_repr", "edge_repr", "frames"),
    inputs=lambda s, z, rotation, translation, mask, _: {
        "node_repr": s,
        "edge_repr": z,
        "frames": Frames(rotation.to(s.dtype), translation.to(s.dtype), mask.bool()),
    },
    bias="bias_2d",
    output="output_projection",
    epsilon="",
    rigids=lambda original, rotation, translation: Rigid(rotation, translation),
    differentiable=False,
)
