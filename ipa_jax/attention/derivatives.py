"""Limits functions that have their own backward rule to reverse-mode derivatives; forward mode raises an error."""

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
    """The same array, through which reverse mode works and forward mode raises NotImplementedError."""
    return _checked.bind(x)


def _refuse(*_: Any, **__: Any) -> Any:
    """Raises where a tangent would be computed: at once, or when JAX compiles."""
    raise NotImplementedError(ONLY_REVERSE_MODE)


def _tangent_of_checked(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """JVP rule of the check. The primal is the array itself, so that backward holds no second copy of it.

    The primal is then unchecked: the forward rules of the attention check it again.
    """
    (x,), (tangent,) = primals, tangents
    return x, tangent if isinstance(tangent, ad.Zero) else _tangent.bind(tangent)


# JAX raises a TypeError where a tangent reaches a function with its own backward rule. The check raises first, with a
# message that names the alternative.
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
    """A cotangent as an array: zeros where JAX knows it to be zero; None where there is no output."""
    if not isinstance(x, jax.custom_derivatives.SymbolicZero):
        return x
    aval: Any = x.aval
    return jnp.zeros(aval.shape, aval.dtype)
