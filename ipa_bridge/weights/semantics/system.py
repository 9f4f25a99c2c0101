"""Definition of a system's semantics: its attention as a function, and the names of its other modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray

Parameters = Mapping[str, ndarray]


@dataclass(frozen=True)
class System:
    """One system's semantics, written from its own conventions and not from our tables of its names.

    Attributes:
        attention: function of an attention's parameters, its config, single, pair, rotation, translation and mask,
            which returns the output.
        names: our modules' names to the system's. "{0}" is a module's number counted from 0, "{1}" the number counted
            from 1, and "{2}" twice the number counted from 0. "{fold}" is a structure module's layer, where its path
            is no prefix.
        fold_iteration: path of a structure module's layer, with "{0}" for its number and "{_}" for haiku's number
            suffix; "" if it has none.
        haiku: True if linear layers and layer norms have haiku's names and shapes, False if they have torch's.
    """

    attention: Callable[..., ndarray]
    names: Mapping[str, str] = field(default_factory=dict)
    fold_iteration: str = "fold_iteration{_}/"
    haiku: bool = False

    def name(self, module: str, number: int = 0, within: str = "") -> str:
        """The system's name of one of our modules; if `names` has none, our name with haiku's number suffix."""
        haiku = f"_{number}" if number else ""
        template = self.names.get(module, module + "{_}")
        prefix = "" if "{fold}" in template else within
        return prefix + template.format(number, number + 1, 2 * number, _=haiku, fold=within)

    def fold(self, number: int) -> str:
        """The path of a structure module's layer."""
        return self.fold_iteration.format(number, _=f"_{number}" if number else "")

    def below(self, p: Parameters, prefix: str) -> Parameters:
        """The parameters below a path that ends in a slash."""
        prefix = prefix if self.haiku else prefix.replace("/", ".")
        return {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}

    def layers(self, p: Parameters) -> tuple[Callable[[str, ndarray], ndarray], Callable[[str, ndarray], ndarray]]:
        """Linear layers and layer norms (ε 1e-5) by name, in haiku's parameters or in torch's."""

        def linear(name: str, x: ndarray) -> ndarray:
            if self.haiku:
                return x @ p[f"{name}/weights"] + p[f"{name}/bias"]
            return torch_linear(p, name.replace("/", "."), x)

        def norm(name: str, x: ndarray) -> ndarray:
            scale, offset = (f"{name}/scale", f"{name}/offset") if self.haiku else (f"{name}/weight", f"{name}/bias")
            if not self.haiku:
                scale, offset = scale.replace("/", "."), offset.replace("/", ".")
            centred = x - x.mean(-1, keepdims=True)
            return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[scale] + p[offset]

        return linear, norm


def torch_linear(p: Parameters, name: str, x: ndarray) -> ndarray:
    """Torch's linear layer: weight (out, in), and a bias if there is one."""
    output = x @ p[f"{name}.weight"].T
    return output + p[f"{name}.bias"] if f"{name}.bias" in p else output
