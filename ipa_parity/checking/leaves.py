"""Parameters of modules in JAX: their names and layouts as those of a dialect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ipa_bridge.config import Config, IPAConfig
from ipa_bridge.parameters import Shapes
from ipa_bridge.weights.dialects import find_dialect
from ipa_bridge.weights.finding import Found, find_module
from ipa_bridge.weights.paths import double_slash

WEIGHT_NAMES = ("kernel", "w", "weight", "weights")
"""Names that libraries give to the weight of a linear layer."""

OTHER_NAMES = {"b": "bias", "scale": "weight", "offset": "bias"}
"""Other names of leaves, by the names that they have in PyTorch."""


class Leaf(NamedTuple):
    """One parameter."""

    path: tuple[str, ...]
    """Names of modules and of the parameter itself."""
    value: Any
    outputs_first: bool
    """True if weights are (outputs, inputs), as in PyTorch; False if they are (inputs, outputs)."""

    @property
    def is_weight(self) -> bool:
        """True for the weight of a linear layer."""
        return self.path[-1] in WEIGHT_NAMES and self.value.ndim > 1

    @property
    def modules(self) -> list[str]:
        """Names of modules, without those that Haiku puts between the names of a module and what its methods make."""
        return [name for name in self.path[:-1] if not name.startswith("~")]

    @property
    def torch_name(self) -> str:
        """The name as in PyTorch."""
        name = "weight" if self.is_weight else OTHER_NAMES.get(self.path[-1], self.path[-1])
        return ".".join([*self.modules, name])

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of the parameter in PyTorch: outputs first, and flat."""
        shape = tuple(self.value.shape)
        if not self.is_weight:
            return (math.prod(shape),)
        return shape if self.outputs_first else (math.prod(shape[1:]), shape[0])

    @property
    def haiku_name(self) -> str:
        """The name as in Haiku, with one slash."""
        name = "weights" if self.is_weight else "bias" if self.path[-1] == "b" else self.path[-1]
        return "/".join([*self.modules, name])

    @property
    def haiku_shape(self) -> tuple[int, ...]:
        """The shape of the parameter in Haiku: inputs first."""
        shape = tuple(self.value.shape)
        return shape[::-1] if self.is_weight and self.outputs_first else shape


class Leaves:
    """All parameters of one module."""

    def __init__(self, leaves: list[Leaf]) -> None:
        self.all = leaves
        self._of_dialect = {leaf.torch_name: i for i, leaf in enumerate(leaves)}
        self._of_dialect |= {double_slash(leaf.haiku_name): i for i, leaf in enumerate(leaves)}
        self._of_user = {"/".join(leaf.path): i for i, leaf in enumerate(leaves)}

    @property
    def names(self) -> list[str]:
        """Paths of all parameters, with slashes."""
        return list(self._of_user)

    def find(self, dialect: str | None, config: IPAConfig | None) -> tuple[Found, Config, frozenset[str]]:
        """Finds the attention, as `find_module` does, by PyTorch's names and then by Haiku's.

        Raises:
            ValueError: the parameters are of no dialect, or of several.
        """
        torch_shapes = {leaf.torch_name: leaf.torch_shape for leaf in self.all}
        haiku_shapes = {leaf.haiku_name: leaf.haiku_shape for leaf in self.all}
        ways: list[tuple[Shapes, bool]] = [(torch_shapes, False), (haiku_shapes, True)]
        if dialect is not None:
            ways = ways[find_dialect(dialect).separator == "/" :][:1]
        problem: ValueError | None = None
        for shapes, haiku in ways:
            try:
                return find_module(shapes, dialect=dialect, config=config, haiku=haiku)
            except ValueError as error:
                problem = problem or error
        raise ValueError(f"{problem}. For names of your own, pass parameters=, a table of them to ours")

    @property
    def some(self) -> str:
        """The first few paths, for messages."""
        return ", ".join(self.names[:6]) + (", …" if len(self.names) > 6 else "")

    def check_table(self, table: Mapping[str, str]) -> None:
        """Raises a ValueError if a table names parameters that the module does not have."""
        unknown = [name for name in table if _path(name) not in self._of_user]
        if unknown:
            raise ValueError(
                f"parameters= was expected to name {', '.join(self.names)}; got {', '.join(map(repr, unknown))}"
            )

    def values(self, given: Mapping[str, Any], own: Callable[[Any], Any]) -> list[Any]:
        """Arrays for all leaves: the given ones, by a dialect's names or the module's, else the module's own.

        Raises:
            ValueError: a given array has no place, or does not fit.
        """
        found: dict[int, Any] = {}
        for name, x in given.items():
            if name in self._of_dialect:
                leaf = self.all[self._of_dialect[name]]
                turned = leaf.is_weight and ("/" in name) == leaf.outputs_first
                found[self._of_dialect[name]] = _fit(_turned(x) if turned else x, leaf, name)
            elif _path(name) in self._of_user:
                found[self._of_user[_path(name)]] = _fit(x, self.all[self._of_user[_path(name)]], name)
            else:
                raise ValueError(f"a parameter {name} {x.shape} was expected in the module; it has {self.some}")
        return [found[i] if i in found else own(leaf.value) for i, leaf in enumerate(self.all)]


def _path(name: str) -> str:
    """A user's name of a parameter, with slashes: "a.b" and "a//b" mean a/b."""
    return name.replace("//", "/").replace(".", "/")


def _turned(x: Any) -> Any:
    """A weight with inputs and outputs exchanged."""
    return x.reshape((x.shape[0], -1)).T


def _fit(x: Any, leaf: Leaf, name: str) -> Any:
    """An array in a leaf's shape, which may have more axes for the outputs, or fewer.

    Raises:
        ValueError: the shapes differ in anything else.
    """
    shape = tuple(leaf.value.shape)
    same_inputs = not leaf.is_weight or x.shape[0] == shape[0]
    if x.size != math.prod(shape) or not same_inputs:
        raise ValueError(f"{name} was expected in the shape {tuple(x.shape)}; the module's is {shape}")
    return x.reshape(shape)
