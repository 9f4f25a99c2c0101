"""Derivatives of functions with a backward of their own: in reverse mode; others are refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

ONLY_REVERSE_MODE = (
    "this implementation has derivatives in reverse mode only; implementation='reference' has all others"
)


def in_reverse_mode_only(x: Array) -> Array:
    """The array, whose tangents may be transposed but not computed."""
    return _checked.bind(x)


def _refuse(*_: Any, **__: Any) -> Any:
    """Called where a tangent is computed: at once, or when JAX compiles."""
    raise NotImplementedError(ONLY_REVERSE_MODE)


def _tangent_of_checked(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Leaves the array itself, so that none is kept beside it for backward; the forward rules check once more."""
    (x,), (tangent,) = primals, tangents
    return x, tangent if isinstance(tangent, ad.Zero) else _tangent.bind(tangent)


# JAX itself refuses forward mode with a TypeError, where a tangent comes to a function with a backward rule of its own;
# it comes here before.
_checked, _tangent = Primitive("check_reverse_mode"), Primitive("tangent_in_reverse_mode")
_checked.def_impl(lambda x: x)
_checked.def_abstract_eval(lambda x: x)
ad.primitive_jvps[_checked] = _tangent_of_checked
batching.defvectorized(_checked)
mlir.register_lowering(_checked, lambda _, x: [x])
_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda x: x)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
batching.primitive_batchers[_tangent] = _refuse
mlir.register_lowering(_tangent, _refuse)


def instantiate(x: Any) -> Any:
    """A cotangent as an array, zeros where it is known to be zero; None where there is no output."""
    if not isinstance(x, jax.custom_derivatives.SymbolicZero):
        return x
    aval: Any = x.aval
    return jnp.zeros(aval.shape, aval.dtype)
