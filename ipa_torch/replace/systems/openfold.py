"""Layers of OpenFold 1 and 2, ESMFold, FrameDiff, FrameFlow, Genie, MDGen, Uni-Fold and their relatives."""

from __future__ import annotations

from typing import Any

import torch
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
)
from ipa_torch.replace.pair_masks import PAIR_MASK, allowed
from ipa_torch.replace.rigids import rotation_and_translation
from ipa_torch.replace.systems.system import System
from ipa_torch.rigid import Rigid


class OpenFoldAdapter(Adapter):
    """Adapter of layers of OpenFold, ESMFold, FrameDiff and related systems, called with their own rigids."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The update of the single representation. `z` may be the only entry of `_z_reference_list` instead."""
        given = bind_arguments(self, arguments, named)
        pairs = given.get("_z_reference_list")
        z = pairs[0] if given["z"] is None and pairs and len(pairs) == 1 else given["z"]
        return _update(self, given["s"], z, given["r"], given.get("mask"), given.get("pair_mask"))


def _update(layer: Any, s: Tensor, z: Tensor | None, r: Any, mask: Tensor | None, pair_mask: Tensor | None) -> Tensor:
    """The forward of `OpenFoldAdapter`. Frames, masks and pair may have fewer batch axes than s."""
    settings: Settings = layer._ipa_twins
    check_untouched(layer)
    batch = s.shape[:-1]
    if settings.config.pair_channel is None:
        z = None
    elif z is None:
        raise ValueError("a pair representation was expected, as z or as the entry of _z_reference_list; got None")
    else:
        z = z.expand(*batch, *z.shape[-2:])
    rotation, translation = rotation_and_translation(r)
    rigids = Rigid(rotation.expand(*batch, 3, 3), translation.expand(*batch, 3))
    mask = None if mask is None else mask.expand(batch)
    projections, rigids = place_points(_openfold_projections(layer, settings, s), z, rigids, mask)
    linear = None if z is None else layer.linear_b
    o, o_points, o_pair = attend(
        settings, projections, z, linear=linear, gamma=layer.head_weights, **_masks(settings, mask, pair_mask, batch)
    )
    if o_pair is not None and z is not None and settings.config.pair_value_channel is not None:
        o_pair = layer.down_z(o_pair.to(z.dtype)).to(o_pair.dtype)  # linear, and weights sum to 1: may follow the sum
    read = features(settings.config, o, rigids.apply_inverse(o_points), o_pair)
    return layer.linear_out(read.to(s.dtype if z is None else z.dtype))


def _masks(settings: Settings, mask: Tensor | None, pair_mask: Tensor | None, batch: torch.Size) -> dict[str, Any]:
    """The masks in our attention's arguments."""
    if pair_mask is not None:
        name = next(x.name for x in settings.takes if PAIR_MASK in (x.ours, x.name))
        if not settings.pair_mask:
            raise ValueError(
                f"{name}=None was expected, since it is no mask that our attention has; got a "
                f"{type(pair_mask).__name__}: call restore_ipa to use it"
            )
        seen = allowed(pair_mask, settings.pair_mask, mask, batch, keys_only=settings.keys_only, name=name)
        return {"mask": None, **seen._asdict()}
    return {"mask": None, "key_mask": mask} if settings.keys_only else {"mask": mask}


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
        dispensable=("mask",),
        pair_masks={
            "attention_mask": "shown",  # MultiFlow's
            "attn_mask": "shown per head",  # MDGen's
            "square_mask": "added per head",  # Uni-Fold's
        },
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
            "z_factor_1": None,  # FlashIPA's, for its flash mode
            "z_factor_2": None,
        },
        neutral_attributes={"use_flash_attn": False},  # FlashIPA's
    ),
    "framediff": _openfold(),
    "mdgen": _openfold(),
    "unifold": _openfold(),
}
