"""Copies of layers to compare before and after they are replaced: without hooks or dropout, in any dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ipa_torch.replace.adapters import original_class
from ipa_torch.replace.recognise import Recognised


def randomised_copy(
    layer: Recognised, kind: Any, dtype: torch.dtype, rng: np.random.Generator, tensor: Callable[[np.ndarray], Tensor]
) -> tuple[Any, dict[str, nn.Parameter]]:
    """A copy without dropout, and its parameters that ours does not know, by name.

    These, the output projection, and a pair bias of zeros get random numbers, so that they hide no difference.
    """
    config, system = layer.settings.config, layer.system
    copied = _bare_copy(layer.module, dtype)
    copied.__class__ = kind
    copied._ipa_twins = layer.settings
    for path in layer.settings.dropouts:
        owner, _, name = path.rpartition(".")
        setattr(copied.get_submodule(owner), name, 0.0)
    if system.dropout:
        copied.add_module(system.dropout, _InsteadOfDropout())

    def draw(path: str) -> None:
        linear = cast(Any, copied.get_submodule(path))
        drawn = rng.standard_normal(tuple(linear.weight.shape)) / math.sqrt(linear.weight.shape[1])
        linear.weight = nn.Parameter(tensor(drawn), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(torch.zeros_like(linear.bias), requires_grad=False)

    draw(system.output)
    reads_pair = bool(system.bias) and config.pair_channel is not None and config.pair_bias
    if reads_pair and not cast(Any, copied.get_submodule(system.bias)).weight.any():
        draw(system.bias)
    unknown: dict[str, nn.Parameter] = {}
    for name in (*layer.unused, *layer.unknown):
        owner, _, leaf = name.rpartition(".")
        x = tensor(rng.standard_normal(tuple(getattr(copied.get_submodule(owner), leaf).shape)))
        unknown[name] = nn.Parameter(x)
        setattr(copied.get_submodule(owner), leaf, unknown[name])
    return copied, unknown


class _InsteadOfDropout(nn.Module):
    """Multiplies channels by fixed numbers: it shows where a layer drops, without random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies the last axis."""
        return x * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype, device=x.device)


def _bare_copy(module: Any, dtype: torch.dtype) -> Any:
    """A copy of the modules without hooks, in another dtype. It shares tensors that have this dtype already."""
    copied = object.__new__(original_class(module))
    vars(copied).update(vars(module))
    for name, value in vars(module).items():
        if "hooks" in name and isinstance(value, dict):
            vars(copied)[name] = type(value)()

    def plain(x: Tensor) -> Tensor:
        """A clone of tensors made in inference mode, which autograd does not accept outside of it."""
        return x.clone() if x.is_inference() else x

    copied._parameters = {
        name: None if x is None else nn.Parameter(plain(x.detach().to(dtype)), requires_grad=False)
        for name, x in module._parameters.items()
    }
    copied._buffers = {name: None if x is None else plain(x) for name, x in module._buffers.items()}
    copied._modules = {name: None if x is None else _bare_copy(x, dtype) for name, x in module._modules.items()}
    return copied
