"""Layers of FlashABB (the PyPI package `flash-abb`)."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ipa_bridge.config import IPAConfig
from ipa_torch.invariant_point_attention import Projections, features, unpack_monomer
from ipa_torch.layers import rotate_by_index
from ipa_torch.replace.adapters import (
    Adapter,
    Settings,
    attend,
    bind_arguments,
    check_untouched,
    place_points,
    project_points,
)
from ipa_torch.replace.rigids import rotation_and_translation
from ipa_torch.replace.systems.system import System
from ipa_torch.rigid import Rigid


class FlashABBAdapter(Adapter):
    """Adapter of FlashABB's layers: a rotary embedding, residue indices instead of a pair, and a mask of keys only."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor | tuple[Tensor, Tensor | None]:
        """The update of the single representation. Classes that can return the attention weights return both.

        With implementation="fused", the weights are None unless return_attn_weights is true, which then raises.
        """
        layer, settings = cast(Any, self), self._ipa_twins
        check_untouched(layer)
        given = bind_arguments(self, arguments, named)
        s, indices = given["s"], given["res_idx"]
        returns_weights = "return_attn_weights" in given
        config, batch = settings.config, s.shape[:-1]
        if indices is None and not returns_weights and config.pair_channel is not None:
            raise ValueError("residue indices were expected as res_idx; got None")
        rotation, translation = rotation_and_translation(given["r"])
        rigids = Rigid(rotation.expand(*batch, 3, 3), translation.expand(*batch, 3))
        keys = given["mask"].expand(batch).bool()
        keys = keys | ~keys.any(-1, keepdim=True)  # their mask shifts all logits alike where it hides all keys
        projections, rigids = place_points(_projections(layer, settings, s), None, rigids, keys)
        q, k, v, q_points, k_points, v_points = projections
        q, k = (rotate_by_index(x, layer.rotary_emb.freqs) for x in (q, k))
        if config.pair_channel is not None:
            indices = torch.arange(s.shape[-2], device=s.device) if indices is None else indices
            indices = indices.expand(batch)
            known = F.one_hot(indices % config.pair_channel, config.pair_channel).to(v.dtype)
            v = torch.cat([v, known[..., None, :].expand(*v.shape[:-1], -1)], -1)
        asked = bool(given.get("return_attn_weights", False))
        unasked = returns_weights and settings.implementation != "fused" and _keeps_weights(config)
        o, o_points, _, *attention = attend(
            settings,
            (q, k, v, q_points, k_points, v_points),
            None,
            None,
            None,
            layer.head_weights,
            key_mask=keys,
            return_attention=asked or unasked,
        )
        o_points = rigids.apply_inverse(o_points)
        spectrum = None
        if config.pair_channel is not None:
            o, spectrum = o.split([config.num_scalar_v, config.pair_channel], -1)
            spectrum = _relative(spectrum, indices)
        out = layer.linear_out(features(config, o, o_points, spectrum).to(s.dtype))
        return (out, attention[0] if attention else None) if returns_weights else out


def _projections(layer: Any, settings: Settings, s: Tensor) -> Projections:
    config = settings.config
    points = project_points(layer.linear_points, settings, s).unflatten(-1, (3, config.num_head, -1))
    q_points, kv_points = points.split([config.num_point_qk, config.num_point_qk + config.num_point_v], -1)
    return unpack_monomer(config, layer.linear_q(s), layer.linear_kv(s), q_points.flatten(-3), kv_points.flatten(-3))


def _keeps_weights(config: IPAConfig) -> bool:
    """True if the class returns the attention weights unasked: it does if its values are not as wide as its queries."""
    queries = config.num_scalar_qk + 9 * config.num_point_qk
    return queries != config.num_scalar_v + 3 * config.num_point_v + (config.pair_channel or 0)


def _relative(spectrum: Tensor, indices: Tensor) -> Tensor:
    """Attention (*B, N, H, 128) by residue index, made relative to the index of the residue that attends."""
    channels = torch.arange(spectrum.shape[-1], device=spectrum.device)
    places = (indices[..., None] + channels) % spectrum.shape[-1]
    return spectrum.gather(-1, places[..., None, :].expand(spectrum.shape))


FLASHABB = System(
    FlashABBAdapter,
    takes=("s", "res_idx", "r", "mask"),
    inputs=lambda s, z, rotation, translation, mask, rigids: {
        "s": s,
        "res_idx": (53 * torch.arange(s.shape[-2], device=s.device)).expand(s.shape[:-1]),
        "r": rigids(rotation, translation),
        "mask": mask,
    },
    bias="",
    output="linear_out",
    flags=("inplace_safe", "_offload_inference", "_z_reference_list", "return_attn_weights"),
    uncalled=("rotary_emb",),
)
