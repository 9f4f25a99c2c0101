"""Array values that can be read before the computation runs: on CPU, outside traces and transforms."""

from __future__ import annotations

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn


def at_hand(*arrays: Tensor | None) -> bool:
    """True if the values of all these tensors can be read now. Does not detect `torch.func`'s transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    plain = (Tensor, nn.Parameter)  # tensors of other classes may have no values
    return all(x is None or (type(x) in plain and x.device.type == "cpu") for x in arrays)


def integers_outside(x: Int[Tensor, "..."], most: int, mask: Shaped[Tensor, "..."] | None = None) -> list[int]:
    """Numbers in x outside 0 to `most` where the mask is 1; an empty list if the values cannot be read."""
    if not at_hand(x, mask):
        return []
    values = x.long()
    outside = (values < 0) | (values > most)
    outside = outside if mask is None else outside & (mask != 0)
    try:
        return values.expand_as(outside)[outside].tolist() if bool(outside.any()) else []
    except RuntimeError:  # under vmap, or for tensors without values
        return []
