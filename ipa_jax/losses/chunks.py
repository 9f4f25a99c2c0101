"""Functions over the rows of arrays, computed in chunks, so that memory is linear in the chunk size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array


def by_rows(
    function: Callable[..., tuple[Array, ...]], rows: Sequence[Array], chunk_size: int | None
) -> tuple[Array, ...]:
    """Calls function(*rows), arrays with rows first, on chunks of rows. Backward computes intermediates again."""
    if chunk_size is None:
        return function(*rows)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for all at once; got {chunk_size}")
    number = rows[0].shape[0]
    if chunk_size >= number:
        return function(*rows)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, -number % chunk_size)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(len(padded) // chunk_size, chunk_size, *x.shape[1:])

    remade = jax.checkpoint(function, prevent_cse=False)
    output = jax.lax.map(lambda chunk: remade(*chunk), [split(x) for x in rows])
    return tuple(x.reshape(len(x) * chunk_size, *x.shape[2:])[:number] for x in output)
