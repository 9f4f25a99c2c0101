"""Layers of ABodyBuilder2, NanoBodyBuilder2 and TCRBuilder2 (the PyPI package `ImmuneBuilder`)."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor

from ipa_torch.invariant_point_attention import Projections, lengths
from ipa_torch.replace.adapters import Adapter, attend, bind_arguments, check_untouched, place_points, project_points
from ipa_torch.replace.systems.system import System
from ipa_torch.rigid import Rigid


class ABodyBuilder2Adapter(Adapter):
    """Adapter of layers of ABodyBuilder2 and its family, called with their own rigids. It adds its input."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The single representation with its update added."""
        layer, settings = cast(Any, self), self._ipa_twins
        check_untouched(layer)
        given = bind_arguments(self, arguments, named)
        s, pair = given["node_features"], given["edge_features"]
        h = settings.config.num_head
        scalars = (x.unflatten(-1, (h, -1)) for x in layer.to_scalar_qkv(s).chunk(3, -1))
        points = (*project_points(layer.to_vector_qk, settings, s).chunk(2, -1),)
        points = (*points, project_points(layer.to_vector_v, settings, s))
        local = (*scalars, *(x.unflatten(-1, (h, -1, 3)) for x in points))
        projections, rigids = place_points(cast(Projections, local), pair, _frames(given["rigid"]), None)
        linear = layer.to_scalar_edge_attention_bias
        o, o_points, o_pair = attend(settings, projections, pair, None, linear, layer.point_weight)
        o_points = rigids.apply_inverse(o_points)
        points_read = torch.cat([lengths(settings.config, o_points)[..., None], o_points], -1)
        read = torch.cat([o_pair.flatten(-2), o.flatten(-2), points_read.flatten(-3)], -1)
        return s + layer.final_linear(read.to(s.dtype))


def _frames(rigid: Any) -> Rigid:
    """Frames from the package's own class: nine arrays for the rotations, three for the origins."""
    rotation = torch.stack([getattr(rigid.rot, row + column) for row in "xyz" for column in "xyz"], -1)
    translation = torch.stack([getattr(rigid.origin, axis) for axis in "xyz"], -1)
    return Rigid(rotation.unflatten(-1, (3, 3)), translation)


def _their_rigids(original: type, rotation: Tensor, translation: Tensor) -> Any:
    """Frames in the package's own class, which is found in the module that defines the layer."""
    for kind in original.__mro__:
        if rigid := getattr(sys.modules.get(kind.__module__), "Rigid", None):
            home = sys.modules[rigid.__module__]
            if hasattr(home, "Vector") and hasattr(home, "Rot"):
                rotations = home.Rot(*rotation.flatten(-2).unbind(-1))
                return rigid(home.Vector(*translation.unbind(-1)), rotations)
    raise ValueError(
        f"a class Rigid was expected in the module that defines {original.__name__}, with classes Rot and Vector "
        "beside it; there is none"
    )


ABODYBUILDER2 = System(
    ABodyBuilder2Adapter,
    takes=("node_features", "edge_features", "rigid"),
    inputs=lambda s, z, rotation, translation, mask, rigids: {
        "node_features": s,
        "edge_features": z,
        "rigid": rigids(rotation.to(s.dtype), translation.to(s.dtype)),
    },
    bias="to_scalar_edge_attention_bias",
    output="final_linear",
    epsilon="",
    rigids=_their_rigids,
)
