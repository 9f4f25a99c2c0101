"""Array values that can be read before the computation runs: on CPU, outside traces and transforms."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped


def at_hand(*arrays: Array | None) -> bool:
    """True if the values of all these arrays can be read now."""
    return all(_is_at_hand(x) for x in arrays)


def integers_outside(x: Int[Array, "..."], most: int, mask: Shaped[Array, "..."] | None = None) -> list[int]:
    """Numbers in x outside 0 to `most` where the mask is 1; an empty list if the values cannot be read."""
    if not at_hand(x, mask):
        return []
    values = np.asarray(x)
    outside = (values < 0) | (values > most)
    outside = outside if mask is None else outside & (np.asarray(mask) != 0)
    return np.broadcast_to(values, outside.shape)[outside].tolist()


def _is_at_hand(x: Array | None) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or (x.is_fully_addressable and {d.platform for d in x.devices()} == {"cpu"})
