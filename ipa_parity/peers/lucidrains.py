"""Runs the attention of the PyPI package `invariant-point-attention`, in PyTorch."""

from __future__ import annotations

import warnings
from typing import Any

from ipa_bridge.config import IPAConfig
from ipa_bridge.weights import canonical_from_torch
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.attention.cases import Case
from ipa_parity.attention.stages import Arrays
from ipa_parity.peers.stages import name_stages, torch_gradients


def lucidrains_module(config: IPAConfig) -> Any:
    """The attention of the PyPI package `invariant-point-attention` with the config's widths and its own weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from invariant_point_attention import InvariantPointAttention

    return InvariantPointAttention(
        dim=config.num_channel,
        heads=config.num_head,
        scalar_key_dim=config.num_scalar_qk,
        scalar_value_dim=config.num_scalar_v,
        point_key_dim=config.num_point_qk,
        point_value_dim=config.num_point_v,
        pairwise_repr_dim=config.pair_channel,
        require_pairwise_repr=config.pair_channel is not None,
        eps=config.norm_epsilon,
    )


def run_lucidrains(case: Case) -> Arrays:
    """Runs `invariant-point-attention` on a case; it takes row-vector frames, the transpose of ours."""
    import torch

    module = lucidrains_module(case.config)
    state = case.weights.to_torch(dialect="lucidrains")
    module.to(state["point_weights"].dtype).load_state_dict(state)
    batched = case.single.ndim == 3

    def call(single: torch.Tensor, pair: Any, rotation: torch.Tensor, translation: torch.Tensor) -> Any:
        mask = torch_tensor(case.mask)
        arguments = (single, pair, rotation.transpose(-1, -2), translation, mask)
        if not batched:
            arguments = tuple(None if x is None else x[None] for x in arguments)  # type: ignore[assignment]
        single, pair, rotations, translations, mask = arguments
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = module(single, pair, rotations=rotations, translations=translations, mask=mask)
        return out if batched else out[0]

    out, by_input, by_parameter = torch_gradients(case, module, call)
    return name_stages(out, by_input, canonical_from_torch(by_parameter, case.config, "lucidrains"))
