"""Lengths, distances and means whose gradients are finite everywhere."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ipa_bridge.config import LossConfig


def norm(vectors: Float[Tensor, "*B D"], epsilon: float) -> Float[Tensor, "*B"]:
    """√(|x|² + ε), whose gradient at zero is zero."""
    return torch.sqrt(torch.sum(vectors * vectors, -1) + epsilon)


def distances(ones: Float[Tensor, "*B A 3"], others: Float[Tensor, "*B C 3"]) -> Float[Tensor, "*B A C"]:
    """All distances between the two sets of points."""
    return norm(ones[..., :, None, :] - others[..., None, :, :], LossConfig.distance_epsilon)


def masked_mean(
    value: Float[Tensor, "*B *N"], weight: Float[Tensor, "*B *N"], axes: int | tuple[int, ...], *, repeats: int = 1
) -> Float[Tensor, "*B"]:
    """Weighted mean of values that are each a sum of `repeats` terms."""
    return torch.sum(weight * value, axes) / (repeats * torch.sum(weight, axes) + LossConfig.mean_epsilon)


def merge_axes(x: Shaped[Tensor, "*B N A *C"], axis: int) -> Shaped[Tensor, "*B N*A *C"]:
    """Merges an axis, counted from the end, with the next one."""
    return x.flatten(axis, axis + 1)
