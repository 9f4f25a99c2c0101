"""Functions over the rows of arrays, computed in chunks, so that memory is linear in the chunk size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def by_rows(
    function: Callable[..., tuple[Tensor, ...]], rows: Sequence[Tensor], chunk_size: int | None
) -> tuple[Tensor, ...]:
    """Calls function(*rows), arrays with rows first, on chunks of rows. Backward computes intermediates again."""
    if chunk_size is None:
        return function(*rows)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for all at once; got {chunk_size}")
    if chunk_size >= len(rows[0]):
        return function(*rows)
    chunks = zip(*(x.split(chunk_size) for x in rows), strict=True)
    outputs = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
