"""Definition of a dialect: one table, read both ways, of how another system names and lays out our parameters.

A row gives our module, their module, and their order of its features. All rows share torch's form of a linear layer's
weight: outputs first, heads flattened. Every step only permutes numbers, so converting back gives the same bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np

from ipa_bridge.config import Config, IPAConfig, Layout
from ipa_bridge.kinds import attention_of, has_attention, infer_config, kind_of, parameter_shapes
from ipa_bridge.parameters import Shapes, canonical_leaf, torch_name
from ipa_bridge.weights.assumptions import fields, told_by_shapes


@dataclass(frozen=True)
class Order:
    """The order of the same features in our form and in theirs.

    An order is one or more groups, separated by bars. The letters of a group are its axes, outermost first; `sizes`
    gives their sizes. For example, "c h q" is coordinate, then head, then query point.
    """

    ours: str
    theirs: str

    def indices(self, config: IPAConfig) -> np.ndarray:
        """Positions of their features in ours: theirs[k] = ours[indices[k]]."""
        size, start, moved = sizes(config), 0, []
        for ours, theirs in zip(*(groups.split("|") for groups in (self.ours, self.theirs)), strict=True):
            axes = ours.split()
            shape = [size[axis] for axis in axes]
            block = np.arange(start, start + math.prod(shape)).reshape(shape)
            moved.append(block.transpose([axes.index(axis) for axis in theirs.split()]).reshape(-1))
            start += block.size
        return np.concatenate(moved)


def sizes(config: IPAConfig) -> dict[str, int]:
    """Sizes of the axes that the letters of an `Order` stand for."""
    return {
        "c": 3,
        "h": config.num_head,
        "s": config.num_scalar_v,
        "q": config.num_point_qk,
        "p": config.num_point_v,
        "z": config.pair_value_channel or config.pair_channel or 0,
    }


class Row(NamedTuple):
    """Names of one module, or of one parameter outside any module, in our form and in theirs.

    `{}` in our name is haiku's suffix for a module's number ("", "_1", …). In their name, `{0}` is that number counted
    from 0, `{1}` the number counted from 1, and `{2}` twice the number counted from 0.
    """

    ours: str
    theirs: str
    outputs: Order | None = None
    """Order of the outputs of weight and bias; None if theirs is the same."""
    inputs: Order | None = None
    """Order of the weight's inputs; None if theirs is the same."""


@dataclass(frozen=True)
class Transform:
    """One parameter's array from our form into theirs and back, bit for bit."""

    shape: tuple[int, ...]
    """Shape of our array: inputs first, heads unflattened in the multimer layout."""
    turned: bool = False
    """True for a linear layer's weight, which is transposed: their outputs come first."""
    outputs: np.ndarray | None = None
    inputs: np.ndarray | None = None
    flat: bool = True

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Shape of their array."""
        if self.turned:
            return math.prod(self.shape[1:]), self.shape[0]
        return (math.prod(self.shape),) if self.flat else self.shape

    def apply(self, ours: np.ndarray) -> np.ndarray:
        """Turns our array into theirs."""
        if not self.flat:
            return ours
        x = ours.reshape(len(ours), -1).T if self.turned else ours.reshape(-1)
        x = x if self.outputs is None else x[self.outputs]
        return np.ascontiguousarray(x if self.inputs is None else x[:, self.inputs])

    def invert(self, theirs: np.ndarray) -> np.ndarray:
        """Turns their array into ours.

        Raises:
            ValueError: their array does not have `their_shape`.
        """
        if theirs.shape != self.their_shape:
            raise ValueError(f"must be {self.their_shape}, got {theirs.shape}")
        if not self.flat:
            return theirs
        x = theirs
        if self.outputs is not None:
            x = np.empty_like(theirs)
            x[self.outputs] = theirs
        if self.inputs is not None:
            x, permuted = np.empty_like(x), x
            x[:, self.inputs] = permuted
        return np.ascontiguousarray((x.T if self.turned else x).reshape(self.shape))


@dataclass(frozen=True)
class Form:
    """Fixed properties of a dialect's modules in one layout; all other properties are arguments of constructors."""

    scalar_bias: bool
    point_bias: bool
    norm_form: str
    norm_epsilon: float
    """Their default ε."""
    epsilon_is_fixed: bool = False
    """Their ε cannot be set."""
    one_width: bool = False
    """Scalar values are as wide as scalar queries and keys: one constructor argument gives both."""
    pair_required: bool = True
    pair_value_divisor: int | None = None
    """Width of the attended pair is c_z divided by this; None if the pair is attended to without projection."""
    logit_terms: int | None = None
    """Terms that its scale of the logits counts; None for 3 with a pair representation and 2 without."""
    may_lack_biases: bool = False
    """Some of its modules have no biases in the scalar, point and pair projections; none has only some of them."""

    def has_biases_of(self, config: IPAConfig) -> bool:
        """Returns True if the form has biases in the projections where an attention has them."""
        mine = (self.scalar_bias, self.point_bias)
        return (config.scalar_bias, config.point_bias) == mine or self.lacks_biases_as(config)

    def lacks_biases_as(self, config: IPAConfig) -> bool:
        """Returns True if an attention has none of the biases that modules of this form may lack."""
        return self.may_lack_biases and not (config.scalar_bias or config.point_bias or config.attention_2d_bias)


@dataclass(frozen=True)
class Dialect:
    """One system's parameters.

    Attributes:
        name: name in arguments.
        title: name in messages.
        rows: config type to layout to the table of names.
        forms: layout to the form of the attention.
        landmarks: config type to the names that identify such a module; all of them must be present.
        absent: names that must not be present.
        at: function that returns whether a module of a kind may lie at a path; used if no dialect is named.
        finish: function that sets config fields which names and shapes do not determine.
        frames: note for callers on how frames and mask differ from ours; "" if they do not.
        epsilon_argument: their constructors' argument for ε.
        transitions: number of linear layers in their structure module's transition if it is fixed; None if it is free.
        unused: config type to the names and shapes of parameters that the modules own but no forward pass reads. They
            are ignored on reading and written as zeros, so that a strict load succeeds.
        varies: names of config fields in which its published models differ, or that its constructors take.
        shared: config type to the names of config fields in which systems with the same parameter names differ. Only
            naming the dialect determines these fields.
    """

    name: str
    title: str
    rows: Mapping[type, Mapping[Layout, tuple[Row, ...]]]
    forms: Mapping[Layout, Form]
    landmarks: Mapping[type, tuple[str, ...]]
    absent: tuple[str, ...] = ()
    at: Callable[[str, type], bool] = lambda root, kind: True
    finish: Callable[[Config], Config] = lambda config: config
    frames: str = ""
    epsilon_argument: str = "eps"
    transitions: int | None = None
    unused: Mapping[type, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    varies: tuple[str, ...] = ()
    shared: Mapping[type, tuple[str, ...]] = field(default_factory=dict)
    separator: ClassVar[str] = "."
    """Separator between names of modules."""

    def rows_of(self, config: Config) -> tuple[Row, ...]:
        """The table for the module that a config describes.

        Raises:
            ValueError: the dialect has no such module.
        """
        layout = layout_of(config)
        try:
            return self.rows[type(config)][layout]
        except KeyError:
            where = f" in the {layout} layout" if type(config) in self.rows else ""
            raise ValueError(f"{self.title} has no {kind_of(config).title}{where}") from None

    def names(self, config: Config) -> dict[str, tuple[str, Transform]]:
        """Maps each canonical name to theirs and the transform between the two.

        Raises:
            ValueError: the dialect has no such module, or no place for some of its parameters.
        """
        patterns = [(_pattern(row.ours), row) for row in self.rows_of(config)]
        found: dict[str, tuple[str, Transform]] = {}
        unplaced = []
        for name, shape in parameter_shapes(config).items():
            module, _, leaf = name.rpartition("/")
            alone, numbers = _match(patterns, name)
            row, numbers = (alone, numbers) if alone else _match(patterns, module)
            if row is None:
                unplaced.append(name)
                continue
            theirs = _fill(row.theirs, numbers)
            weight = leaf == "weights"
            outputs, inputs = (
                None if order is None else order.indices(attention_of(config))
                for order in (row.outputs, row.inputs if weight else None)
            )
            transform = Transform(shape, turned=weight, outputs=outputs, inputs=inputs, flat=leaf != "embeddings")
            found[name] = theirs if alone else f"{theirs}.{torch_name(leaf)}", transform
        if unplaced:
            raise ValueError(f"{self.title} has no place for {', '.join(unplaced)}")
        return found

    def canonical_names(self, keys: Iterable[str], kind: type) -> dict[str, str]:
        """Maps their names to canonical ones, by the table that knows most of them; unknown names are left out."""
        best: dict[str, str] = {}
        for rows in self._reading.get(kind, {}).values():
            known: dict[str, str] = {}
            for key in keys:
                module, _, leaf = key.rpartition(".")
                alone, numbers = _match(rows, key)
                row, numbers = (alone, numbers) if alone else _match(rows, module)
                if row is None:
                    continue
                ours = _fill(row.ours, numbers)
                known[key] = ours if alone else f"{ours}/{canonical_leaf(ours, leaf)}"
            best = max(best, known, key=len)
        return best

    def infer(self, shapes: Shapes, kind: type) -> Config:
        """Infers the config from their names and shapes.

        Raises:
            ValueError: parameters are missing, or sizes do not divide by the number of heads.
        """
        canonical = self.canonical_names(shapes, kind)
        return self.finish(
            infer_config(
                {ours: shapes[x][::-1] if ours.endswith("/weights") else shapes[x] for x, ours in canonical.items()}
            )
        )

    def told(self, config: Config, *, named: bool) -> frozenset[str]:
        """Paths of the config's fields that names and shapes determine, or that all its published models share.

        Args:
            config: config of parameters with this dialect's names.
            named: True if the caller named the dialect, False if it was recognised.
        """
        told = told_by_shapes(config)
        form = self.forms.get(layout_of(config))
        ipa = attention_of(config)
        if form is None or (ipa and not form.has_biases_of(ipa)):
            return told
        differ = {*self.varies, *(() if named else self.shared.get(type(config), ()))}
        return told | {path for path in fields(config) if path.rpartition(".")[2] not in differ}

    @cached_property
    def _reading(self) -> dict[type, dict[Layout, Patterns]]:
        return {
            kind: {layout: [(_pattern(row.theirs), row) for row in rows] for layout, rows in layouts.items()}
            for kind, layouts in self.rows.items()
        }


def within(ours: str, theirs: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of modules inside another one: both names get its name as a prefix."""
    return tuple(row._replace(ours=ours + row.ours, theirs=theirs + row.theirs) for row in rows)


def layout_of(config: Config) -> Layout:
    """The layout of a module's attention; "monomer" for a module without attention, whose form is the same in both."""
    return attention_of(config).layout if has_attention(config) else "monomer"


_HOLES: dict[str, tuple[str, Callable[[int], str], Callable[[str | None], int]]] = {
    "{}": (r"(_[1-9]\d{0,3})?", lambda n: f"_{n}" if n else "", lambda text: int(text[1:]) if text else 0),
    "{0}": (r"(0|[1-9]\d{0,3})", str, lambda text: int(text or 0)),
    "{1}": (r"([1-9]\d{0,3})", lambda n: str(n + 1), lambda text: int(text or 1) - 1),
    "{2}": (r"(0|[1-9]?\d{0,2}[02468])", lambda n: str(2 * n), lambda text: int(text or 0) // 2),
}
"""Placeholders of a module's number: a pattern to match it, and functions to write and to read it, counted from 0."""

_HOLE = re.compile(r"\{[012]?\}")


def _pattern(template: str) -> tuple[re.Pattern, list[Callable[[str | None], int]]]:
    """A pattern that matches names of a template, and a function to read each number in them."""
    texts, holes = _HOLE.split(template), _HOLE.findall(template)
    pattern = re.escape(texts[0])
    for hole, text in zip(holes, texts[1:], strict=True):
        pattern += _HOLES[hole][0] + re.escape(text)
    return re.compile(pattern), [_HOLES[hole][2] for hole in holes]


def _fill(template: str, numbers: list[int]) -> str:
    """The name that a template gives with these numbers."""
    remaining = iter(numbers)
    return _HOLE.sub(lambda hole: _HOLES[hole[0]][1](next(remaining)), template)


Patterns = Iterable[tuple[tuple[re.Pattern, list[Callable[[str | None], int]]], Row]]


def _match(patterns: Patterns, name: str) -> tuple[Row | None, list[int]]:
    """The row whose pattern matches a name (None if there is none), and the name's numbers, counted from 0."""
    for (pattern, readers), row in patterns:
        if found := pattern.fullmatch(name):
            return row, [read(text) for read, text in zip(readers, found.groups(), strict=True)]
    return None, []
