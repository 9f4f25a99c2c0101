"""Layers of OpenFold 1 and 2, ESMFold, FrameDiff, FrameFlow and their relatives."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ipa_torch.invariant_point_attention import Projections, features, unpack_monomer
from ipa_torch.replace.adapters import (
    Adapter,
    Settings,
    attend,
    bind_arguments,
    check_untouched,
    place_points,
    project_points,
    rotation_and_translation,
)
from ipa_torch.replace.systems.system import System
from ipa_torch.rigid import Rigid


class OpenFoldAdapter(Adapter):
    """Adapter of layers of OpenFold, ESMFold, FrameDiff and related systems, called with their own rigids."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The update of the single representation. `z` may be the only entry of `_z_reference_list` instead."""
        given = bind_arguments(self, arguments, named)
        pairs = given.get("_z_reference_list")
        z = pairs[0] if given["z"] is None and pairs and len(pairs) == 1 else given["z"]
        return _update(self, given["s"], z, given["r"], given["mask"])


def _update(layer: Any, s: Tensor, z: Tensor | None, r: Any, mask: Tensor | None) -> Tensor:
    """The forward of `OpenFoldAdapter`. Frames, mask and pair may have fewer batch axes than s."""
    settings: Settings = layer._ipa_twins
    check_untouched(layer)
    if z is None:
        raise ValueError("a pair representation was expected, as z or as the entry of _z_reference_list; got None")
    rotation, translation = rotation_and_translation(r)
    batch = s.shape[:-1]
    rigids = Rigid(rotation.expand(*batch, 3, 3), translation.expand(*batch, 3))
    z, mask = z.expand(*batch, *z.shape[-2:]), None if mask is None else mask.expand(batch)
    projections, rigids = place_points(_openfold_projections(layer, settings, s), z, rigids, mask)
    o, o_points, o_pair = attend(settings, projections, z, mask, layer.linear_b, layer.head_weights)
    if settings.config.pair_value_channel is not None:  # linear, and weights sum to 1: may follow the sum
        o_pair = layer.down_z(o_pair.to(z.dtype)).to(o_pair.dtype)
    read = features(settings.config, o, rigids.apply_inverse(o_points), o_pair)
    return layer.linear_out(read.to(z.dtype))


def _openfold_projections(layer: Any, settings: Settings, s: Tensor) -> Projections:
    config = settings.config
    if config.layout == "monomer":
        points = [project_points(x, settings, s) for x in (layer.linear_q_points, layer.linear_kv_points)]
        return unpack_monomer(config, layer.linear_q(s), layer.linear_kv(s), *points)
    h = config.num_head
    q, k, v = (x(s).unflatten(-1, (h, -1)) for x in (layer.linear_q, layer.linear_k, layer.linear_v))
    q_points, k_points, v_points = (
        project_points(x, settings, s).unflatten(-1, (h, 3, -1)).transpose(-1, -2)
        for x in (layer.linear_q_points, layer.linear_k_points, layer.linear_v_points)
    )
    return q, k, v, q_points, k_points, v_points


def _openfold(**options: Any) -> System:
    """A row of `SYSTEMS` for a system related to OpenFold."""
    return System(
        OpenFoldAdapter,
        takes=("s", "z", "r", "mask"),
        inputs=lambda s, z, rotation, translation, mask, rigids: {
            "s": s,
            "z": z,
            "r": rigids(rotation, translation),
            "mask": mask,
        },
        bias="linear_b",
        output="linear_out",
        pair_values="down_z",
        flags=("inplace_safe", "_offload_inference", "_z_reference_list"),
        **options,
    )


OPENFOLD_SYSTEMS = {
    "openfold": _openfold(
        points="linear",
        norm_forms={"multimer": ("clamp", "add")},  # OpenFold 2 has a class for each
    ),
    "openfold_v1": _openfold(),
    "esmfold": _openfold(epsilon="config.epsilon"),
    "frameflow": _openfold(
        neutral_arguments={
            "attention_mask": None,  # MultiFlow's
            "z_factor_1": None,  # FlashIPA's, for its flash mode
            "z_factor_2": None,
        },
        neutral_attributes={"dropout_prob": 0, "use_flash_attn": False},  # MultiFlow's and FlashIPA's
    ),
    "framediff": _openfold(),
}
