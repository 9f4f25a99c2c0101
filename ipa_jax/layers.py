"""Linear and LayerNorm with AlphaFold's parameters and initialisers (Suppl. 1.11.4)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ipa_jax.dtypes import at_least_float32, widest_dtype

Initializer = Literal["linear", "relu", "zeros"]

TRUNCATED_NORMAL_STDDEV = 0.87962566103423978
"""Standard deviation of a unit normal truncated at ±2; initialisers divide by it."""


class Linear(hk.Module):
    """x·weights + bias over the last axis, into one or several output axes.

    Computes in the wider of the input's and the weights' dtypes; with `full_precision` in at least float32 and at
    the highest matrix precision. `initializer` is "linear" (truncated-normal LeCun), "relu" (He) or "zeros".
    """

    def __init__(
        self,
        num_output: int | Sequence[int],
        *,
        initializer: Initializer = "linear",
        use_bias: bool = True,
        full_precision: bool = False,
        name: str = "linear",
    ) -> None:
        super().__init__(name=name)
        self.output_shape = (num_output,) if isinstance(num_output, int) else tuple(num_output)
        self.initializer = initializer
        self.use_bias = use_bias
        self.full_precision = full_precision

    def __call__(self, inputs: Float[Array, "*B c_in"]) -> Float[Array, "*B *c_out"]:
        """Projects the last axis."""
        weights, bias = self.parameters(inputs.shape[-1], inputs.dtype)
        dtype = widest_dtype(inputs.dtype, weights.dtype)
        precision = None
        if self.full_precision:
            dtype, precision = at_least_float32(dtype), jax.lax.Precision.HIGHEST
        output = jnp.tensordot(inputs.astype(dtype), weights.astype(dtype), axes=1, precision=precision)
        return output if bias is None else output + bias.astype(dtype)

    @hk.name_like("__call__")
    def parameters(
        self, num_input: int, dtype: DTypeLike = jnp.float32
    ) -> tuple[Float[Array, " c_in *c_out"], Float[Array, "*c_out"] | None]:
        """The weights and the bias (None without one), for callers that apply them in another way."""
        shape = (num_input, *self.output_shape)
        weights = hk.get_parameter("weights", shape, dtype, weight_initializer(self.initializer, num_input))
        bias = hk.get_parameter("bias", self.output_shape, dtype, jnp.zeros) if self.use_bias else None
        return weights, bias


class LayerNorm(hk.Module):
    """Normalisation over the last axis, in at least float32, returned in the input's dtype."""

    def __init__(self, *, epsilon: float = 1e-5, name: str = "layer_norm") -> None:
        super().__init__(name=name)
        self.epsilon = epsilon

    def __call__(self, inputs: Float[Array, "*B c"]) -> Float[Array, "*B c"]:
        """Normalises the last axis."""
        shape = inputs.shape[-1:]
        scale = hk.get_parameter("scale", shape, inputs.dtype, jnp.ones)
        offset = hk.get_parameter("offset", shape, inputs.dtype, jnp.zeros)
        dtype = at_least_float32(inputs.dtype, scale.dtype)
        x = inputs.astype(dtype)
        centred = x - jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean(centred * centred, -1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + jnp.asarray(self.epsilon, dtype))
        return (normal * scale.astype(dtype) + offset.astype(dtype)).astype(inputs.dtype)


def transition(act: Float[Array, "*B c"], layers: Sequence[Linear]) -> Float[Array, "*B c"]:
    """Linear layers in sequence with ReLUs between them (Suppl. Alg. 20 line 9), returned in the input's dtype."""
    hidden = act
    for layer in layers[:-1]:
        hidden = jax.nn.relu(layer(hidden))
    return layers[-1](hidden).astype(act.dtype)


def dropout(key: Array | None, rate: float, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Zeroes the share `rate` of the entries and scales up the others; without a key, returns the input."""
    if key is None:
        return x
    kept = 1 - rate
    return jnp.where(jax.random.bernoulli(key, kept, x.shape), x / kept, jnp.zeros_like(x))


def weight_initializer(initializer: Initializer, num_input: int) -> hk.initializers.Initializer:
    """Truncated normal with variance 1/num_input ("linear") or 2/num_input ("relu"), or zeros."""
    if initializer == "zeros":
        return hk.initializers.Constant(0.0)
    gain = {"linear": 1.0, "relu": 2.0}[initializer]
    stddev = np.sqrt(gain / num_input) / TRUNCATED_NORMAL_STDDEV
    return hk.initializers.TruncatedNormal(stddev=stddev)


def initial_frequencies(num_channel: int) -> Float[Array, " C/2"]:
    """Frequencies of a rotary embedding before training, 10000^(−2i/C) radians per residue (Su et al. 2021)."""
    return 10000.0 ** (-jnp.arange(0, num_channel, 2, dtype=jnp.float32) / num_channel)


def rotate_by_index(x: Float[Array, "*B N H C"], frequencies: Float[Array, " C/2"]) -> Float[Array, "*B N H C"]:
    """Rotates channels 2i and 2i + 1 of the n-th residue by n · frequencies[i] (Su et al. 2021)."""
    index = jnp.arange(x.shape[-3], dtype=x.dtype)
    angle = (index[:, None] * frequencies.astype(x.dtype))[:, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def with_rng(transformed: hk.Transformed, call: str) -> hk.Transformed:
    """Makes apply raise a ValueError that shows the call if the rng is left out.

    Args:
        transformed: its apply takes an rng, or None in its place.
        call: the arguments after the rng, for the error message.
    """

    @wraps(transformed.apply)
    def apply(params: hk.Params, *arguments: Any, **named: Any) -> Any:
        if "rng" not in named and (not arguments or (hasattr(arguments[0], "shape") and not _is_rng(arguments[0]))):
            raise ValueError(
                f"apply(params, rng, {call}) takes an rng after the parameters, or None where is_training is False; "
                f"got {'an array of ' + str(arguments[0].dtype) if arguments else 'nothing'}"
            )
        return transformed.apply(params, *arguments, **named)

    return hk.Transformed(transformed.init, apply)


def without_rng(transformed: hk.Transformed, call: str) -> hk.Transformed:
    """Removes the rng from apply's arguments, and makes it raise a ValueError that shows the call if given one.

    Args:
        transformed: transform of a module without dropout.
        call: the arguments after the parameters, for the error message.
    """
    inner: Any = hk.without_apply_rng(transformed)

    @wraps(inner.apply)
    def apply(params: hk.Params, *arguments: Any, **named: Any) -> Any:
        if arguments and _is_rng(arguments[0]):
            raise ValueError(
                f"apply(params, {call}) takes no rng, since there is no dropout; got "
                f"{'None' if arguments[0] is None else 'one'} after params: leave it out"
            )
        return inner.apply(params, *arguments, **named)

    return hk.Transformed(inner.init, apply)


def _is_rng(x: Any) -> bool:
    if x is None or jnp.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key):
        return True
    return getattr(x, "dtype", None) == np.uint32  # jax.random.PRNGKey's
