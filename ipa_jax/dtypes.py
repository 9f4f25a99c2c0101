"""Requirements on JAX: a jaxlib without wrong gradients, dtypes of arithmetic, axes of `jax.shard_map`."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

Tree = TypeVar("Tree")

MISCOMPILING_JAXLIB = "0.10.2"
"""The version whose gradients of layer norms under `vmap` are wrong."""


def refuse_miscompiling_jaxlib(version: str) -> None:
    """Raises for the jaxlib that silently returns wrong gradients.

    Raises:
        ImportError: it is the broken version; the message names good ones.
    """
    if version == MISCOMPILING_JAXLIB:
        raise ImportError(
            f"jaxlib {version} silently returns wrong gradients on CPU (https://github.com/jax-ml/jax/issues/39103). "
            f"Expected any other from 0.8 on; tested is 0.10.1: pip install 'jax==0.10.1' 'jaxlib==0.10.1'"
        )


refuse_miscompiling_jaxlib(jaxlib.version.__version__)


def widest_dtype(*dtypes: DTypeLike) -> np.dtype:
    """The dtype that holds all of these, by JAX's standard promotion whatever the user's setting.

    If JAX's float64 is off, numpy's float64 counts as float32.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(jax.dtypes.canonicalize_dtype(dtype) for dtype in dtypes))


def at_least_float32(*dtypes: DTypeLike) -> np.dtype:
    """The dtype of arithmetic that must not lose coordinates: the widest of these, float32 at the least."""
    return widest_dtype(jnp.float32, *dtypes)


def varying_alike(tree: Tree, *others: Any) -> Tree:
    """The same arrays, each varying over every axis of `jax.shard_map` that any of them or of the others varies over.

    The carries of loops then keep their types, and JAX sums the gradient to a shared array over the devices. Outside
    `jax.shard_map` the arrays are returned as they are.
    """

    def zero_of(x: Any) -> Array:
        return jnp.zeros_like(x, jnp.float32, shape=())

    zero: Any = sum(map(zero_of, jax.tree.leaves((tree, others))))

    def vary(x: Array) -> Array:
        return x if jax.typeof(zero_of(x)) == jax.typeof(zero) else x + zero.astype(x.dtype)

    return jax.tree.map(vary, tree)
