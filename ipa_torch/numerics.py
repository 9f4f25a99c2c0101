"""Functions whose derivatives stay finite."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def safe_sqrt(x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """√x of x ≥ 0, whose derivative at 0 is 0 and not infinite."""
    positive = x > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, x, 1.0)), 0.0)
