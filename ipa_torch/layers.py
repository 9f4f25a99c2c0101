"""Linear and LayerNorm with AlphaFold's parameters and initialisers (Suppl. 1.11.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ipa_torch.dtypes import at_least_float32, widest_dtype, without_autocast

Initializer = Literal["linear", "relu", "zeros"]

TRUNCATED_NORMAL_STDDEV = 0.87962566103423978
"""Standard deviation of a unit normal truncated at ±2; initialisers divide by it."""


class Module(nn.Module):
    """A module whose `reset_parameters` initialises it and its submodules as their constructors do.

    After `torch.device("meta")` and `to_empty`, `reset_parameters` thus leaves nothing uninitialised.
    """

    def reset_parameters(self) -> None:
        """Initialises the parameters again, in the order of construction."""
        for child in self.children():
            cast(Any, child).reset_parameters()


class Linear(nn.Linear):
    """x·weightᵀ + bias over the last axis, into one or several output axes.

    Computes in the wider of the input's and the weight's dtypes, or in autocast's; with `full_precision` in at least
    float32, also under autocast. `initializer` is "linear" (truncated-normal LeCun), "relu" (He) or "zeros". It is an
    `nn.Linear`, so that adapters and other tools find it; adapters need a single output axis.
    """

    weight: Float[nn.Parameter, "c_out c_in"]
    bias: Float[nn.Parameter, " c_out"] | None  # type: ignore[assignment]

    def __init__(
        self,
        num_input: int,
        num_output: int | Sequence[int],
        *,
        initializer: Initializer = "linear",
        use_bias: bool = True,
        full_precision: bool = False,
    ) -> None:
        self.output_shape = (num_output,) if isinstance(num_output, int) else tuple(num_output)
        self.initializer: Initializer = initializer  # set first, because nn.Linear.__init__ resets the parameters
        self.full_precision = full_precision
        super().__init__(num_input, math.prod(self.output_shape), bias=use_bias)

    def reset_parameters(self) -> None:
        """Draws a new weight and sets the bias to zero."""
        initialize_weight(self.weight, self.initializer)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return super().extra_repr() + (", full_precision=True" if self.full_precision else "")

    def forward(self, inputs: Float[Tensor, "*B c_in"]) -> Float[Tensor, "*B *c_out"]:
        """Projects the last axis."""
        dtype = widest_dtype(inputs.dtype, self.weight.dtype)
        ambient: AbstractContextManager = nullcontext()
        if self.full_precision:
            dtype, ambient = at_least_float32(dtype), without_autocast(inputs.device.type)
        with ambient:
            bias = None if self.bias is None else self.bias.to(dtype)
            output = F.linear(inputs.to(dtype), self.weight.to(dtype), bias)
        return output.unflatten(-1, self.output_shape)


class LayerNorm(nn.Module):
    """Normalisation over the last axis, in at least float32, returned in the input's dtype."""

    def __init__(self, num_channel: int, *, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(num_channel))
        self.bias = nn.Parameter(torch.empty(num_channel))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to ones and the bias to zeros."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """The size, for printing."""
        return f"{len(self.weight)}, epsilon={self.epsilon}"

    def forward(self, inputs: Float[Tensor, "*B c"]) -> Float[Tensor, "*B c"]:
        """Normalises the last axis."""
        dtype = at_least_float32(inputs.dtype, self.weight.dtype)
        with without_autocast(inputs.device.type):
            x, weight, bias = inputs.to(dtype), self.weight.to(dtype), self.bias.to(dtype)
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.epsilon).to(inputs.dtype)


def transition(act: Float[Tensor, "*B c"], layers: Sequence[nn.Module]) -> Float[Tensor, "*B c"]:
    """Linear layers in sequence with ReLUs between them (Suppl. Alg. 20 line 9), returned in the input's dtype."""
    hidden = act
    for layer in layers[:-1]:
        hidden = F.relu(layer(hidden))
    return layers[-1](hidden).to(act.dtype)


def initialize_weight(weight: Float[Tensor, "c_out c_in"], initializer: Initializer) -> None:
    """Truncated normal with variance 1/num_input ("linear") or 2/num_input ("relu"), or zeros."""
    if initializer == "zeros":
        nn.init.zeros_(weight)
        return
    gain = {"linear": 1.0, "relu": 2.0}[initializer]
    stddev = math.sqrt(gain / weight.shape[-1]) / TRUNCATED_NORMAL_STDDEV
    nn.init.trunc_normal_(weight, std=stddev, a=-2 * stddev, b=2 * stddev)


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """`torch.take_along_dim` that broadcasts the index only, and so keeps sizes dynamic under `torch.export`."""
    shape = list(x.shape)
    shape[dim] = index.shape[dim]
    return torch.gather(x, dim, index.long().expand(shape))


def initial_frequencies(num_channel: int) -> Float[Tensor, " C/2"]:
    """Frequencies of a rotary embedding before training, 10000^(−2i/C) radians per residue (Su et al. 2021)."""
    return 10000.0 ** (-torch.arange(0, num_channel, 2, dtype=torch.float32) / num_channel)


def rotate_by_index(x: Float[Tensor, "*B N H C"], frequencies: Float[Tensor, " C/2"]) -> Float[Tensor, "*B N H C"]:
    """Rotates channels 2i and 2i + 1 of the n-th residue by n · frequencies[i] (Su et al. 2021)."""
    index = torch.arange(x.shape[-3], dtype=x.dtype, device=x.device)
    angle = (index[:, None] * frequencies.to(x.dtype))[:, None, :]
    cos, sin = torch.cos(angle), torch.sin(angle)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
