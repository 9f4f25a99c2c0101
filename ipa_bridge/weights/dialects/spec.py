"""Definition of a dialect: one table, read both ways, of how another system names and lays out our parameters.

A row gives our module, their module, and their order of its features. One of their modules may pack several of ours.
All rows share torch's form of a linear layer's weight: outputs first, heads flattened. Every step only permutes
numbers, so converting back gives the same bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ipa_bridge.config import Config, IPAConfig, Layout, NormForm, StructureModuleConfig
from ipa_bridge.kinds import attention_of, has_attention, infer_config, kind_of, parameter_shapes, replace_attention
from ipa_bridge.parameters import Shapes, canonical_leaf, torch_name
from ipa_bridge.weights.assumptions import fields, told_by_shapes
from ipa_bridge.weights.dialects.orders import Order, Transform
from ipa_bridge.weights.dialects.templates import fill, pattern_of


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
    part: int | None = None
    """Number of the group of `outputs` that our module has, if theirs packs several of ours; None if it does not."""


@dataclass(frozen=True)
class Form:
    """Fixed properties of a dialect's modules in one layout; all other properties are arguments of constructors."""

    scalar_bias: bool | None
    point_bias: bool | None
    """None if both are possible."""
    norm_form: NormForm
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
    others: Mapping[str, Any] = field(default_factory=dict)
    """Values of the config fields in `OTHERS` that differ from AlphaFold's; None where all are possible."""
    may_lack_biases: bool = False
    """Some of its modules have no biases in the scalar, point and pair projections; none has only some of them."""

    def has_biases_of(self, config: IPAConfig) -> bool:
        """Returns True if the form has biases in the projections where an attention has them."""
        pairs = ((self.scalar_bias, config.scalar_bias), (self.point_bias, config.point_bias))
        return self.lacks_biases_as(config) or all(mine in (None, theirs) for mine, theirs in pairs)

    def lacks_biases_as(self, config: IPAConfig) -> bool:
        """Returns True if an attention has none of the biases that modules of this form may lack."""
        return self.may_lack_biases and not (config.scalar_bias or config.point_bias or config.attention_2d_bias)


OTHERS = {
    "distance_form": "squared",
    "distance_epsilon": 0.0,
    "point_weight_form": "softplus",
    "rotary_embedding": False,
    "pair_bias": True,
    "attention_2d_bias": True,
    "pair_value_per_head": False,
}
"""Config fields that a form fixes and a conversion cannot change, with AlphaFold's values."""


ALPHAFOLDS_STRUCTURE: Mapping[str, Any] = {
    "tied_layers": True,
    "transition_factor": 1,
    "single_input_channel": None,
    "pair_input_channel": None,
    "input_norm": True,
    "distance_channel": False,
    "project_initial_act": False,
    "skip_connection": False,
    "detach_rotations": True,
    "sidechain_input": "summed",
    "num_layer_in_residual_block": 2,
}
"""Fields of a structure module's config in which AlphaFold and its kin do not vary."""


def alphafolds(layout: Layout) -> StructureModuleConfig:
    """AlphaFold's structure module with that layout."""
    multimer = layout == "multimer"
    return StructureModuleConfig.alphafold_multimer() if multimer else StructureModuleConfig.alphafold2()


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
        beside: submodules with parameters of their own that lie beside the attention's in this system. If no dialect
            is named, all of them must be present, and the dialect then goes before others that read the same names.
        at: function that returns whether a module of a kind may lie at a path; used if no dialect is named.
        finish: function that sets config fields which names and shapes do not determine.
        frames: note for callers on how frames and mask differ from ours; "" if they do not.
        epsilon_argument: their constructors' argument for ε.
        detach_argument: their transformer's argument for detached rotations, and its default.
        transitions: number of linear layers in their structure module's transition if it is fixed; None if it is free.
        unused: config type to the names and shapes of parameters that the modules own but no forward pass reads. They
            are ignored on reading and written as zeros, so that a strict load succeeds.
        misfits: function from an attention's config to reasons why their class cannot be constructed with its widths.
        varies: names of config fields in which its published models differ, or that its constructors take.
        shared: config type to the names of config fields in which systems with the same parameter names differ. Only
            naming the dialect determines these fields.
        part_widths: function from their names and shapes to the numbers of outputs that each of our modules has in
            their module that packs them, by its name; a module that is not listed has equal parts.
        structure: config field to the value that all its structure modules have.
        published: function from a layout to the config of its published structure module.
        refuse: function that returns why none of its structure modules has a config's form; "" if one has.
        other_modules: config type to names of other modules at such a module's path, each with what it is. Their
            parameters are ignored.
    """

    name: str
    title: str
    rows: Mapping[type, Mapping[Layout, tuple[Row, ...]]]
    forms: Mapping[Layout, Form]
    landmarks: Mapping[type, tuple[str, ...]]
    absent: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    at: Callable[[str, type], bool] = lambda root, kind: True
    finish: Callable[[Config], Config] = lambda config: config
    frames: str = ""
    epsilon_argument: str = "eps"
    detach_argument: tuple[str, bool] = ("detach_rotations", True)
    transitions: int | None = None
    unused: Mapping[type, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    misfits: Callable[[IPAConfig], Iterable[str]] = lambda config: ()
    varies: tuple[str, ...] = ()
    shared: Mapping[type, tuple[str, ...]] = field(default_factory=dict)
    part_widths: Callable[[Shapes], Mapping[str, tuple[int, ...]]] = lambda shapes: {}
    structure: Mapping[str, Any] = field(default_factory=lambda: ALPHAFOLDS_STRUCTURE)
    published: Callable[[Layout], StructureModuleConfig] = alphafolds
    refuse: Callable[[StructureModuleConfig], str] = lambda config: ""
    other_modules: Mapping[type, Mapping[str, str]] = field(default_factory=dict)
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
        patterns = [(pattern_of(row.ours), row) for row in self.rows_of(config)]
        found: dict[str, tuple[str, Transform]] = {}
        unplaced = []
        for name, shape in parameter_shapes(config).items():
            module, _, leaf = name.rpartition("/")
            alone, numbers = _match(patterns, name)
            row, numbers = (alone, numbers) if alone else _match(patterns, module)
            if row is None:
                unplaced.append(name)
                continue
            theirs = fill(row.theirs, numbers)
            weight = leaf == "weights"
            outputs, inputs = (
                None if order is None else order.indices(attention_of(config))
                for order in (row.outputs, row.inputs if weight else None)
            )
            transform = Transform(shape, turned=weight, outputs=outputs, inputs=inputs, flat=leaf != "embeddings")
            if row.outputs is not None and outputs is not None and row.part is not None:
                start = sum(row.outputs.widths(attention_of(config))[: row.part])
                places = np.argsort(outputs)[start : start + math.prod(shape[weight:])]
                transform = replace(transform, outputs=places, packed=len(outputs))
            found[name] = theirs if alone else f"{theirs}.{torch_name(leaf)}", transform
        if unplaced:
            raise ValueError(f"{self.title} has no place for {', '.join(unplaced)}")
        return found

    def canonical_names(self, keys: Iterable[str], kind: type) -> dict[str, str]:
        """Maps their names to canonical ones, by the table that knows most of them; unknown names are left out.

        A parameter that packs several of ours has the name of the first.
        """
        return {key: parts[0] for key, parts in self._parts(keys, kind).items()}

    def _parts(self, keys: Iterable[str], kind: type) -> dict[str, list[str]]:
        """Maps their names to the canonical ones of their parts."""
        best: dict[str, list[str]] = {}
        for rows in self._reading.get(kind, {}).values():
            known: dict[str, list[str]] = {}
            for key in keys:
                module, _, leaf = key.rpartition(".")
                if alone := _matches(rows, key):
                    known[key] = [fill(row.ours, numbers) for row, numbers in alone]
                elif found := _matches(rows, module):
                    parts = [fill(row.ours, numbers) for row, numbers in found]
                    known[key] = [f"{ours}/{canonical_leaf(ours, leaf)}" for ours in parts]
            best = max(best, known, key=len)
        return best

    def infer(self, shapes: Shapes, kind: type) -> Config:
        """Infers the config from their names and shapes.

        Raises:
            ValueError: parameters are missing, or sizes do not divide by the number of heads.
        """
        found: Shapes = {}
        told, several = self.part_widths(shapes), self._parts(shapes, kind)
        for theirs, first in self.canonical_names(shapes, kind).items():
            parts = several.get(theirs, [first])
            for ours, shape in zip(parts, _split(theirs, parts, shapes[theirs], told), strict=True):
                found[ours] = shape[::-1] if ours.endswith("/weights") else shape
        config = infer_config(found)
        form = self.forms.get(layout_of(config))
        if form is not None and has_attention(config):
            ipa = replace(attention_of(config), norm_form=form.norm_form, norm_epsilon=form.norm_epsilon)
            config = replace_attention(config, ipa)
        return self.finish(config)

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
            kind: {layout: [(pattern_of(row.theirs), row) for row in rows] for layout, rows in layouts.items()}
            for kind, layouts in self.rows.items()
        }


def within(ours: str, theirs: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of modules inside another one: both names get its name as a prefix."""
    return tuple(row._replace(ours=ours + row.ours, theirs=theirs + row.theirs) for row in rows)


def packed(ours: Iterable[str], theirs: str, outputs: Order) -> tuple[Row, ...]:
    """The rows of modules that one of theirs packs; each has one group of our order of the outputs."""
    return tuple(Row(name, theirs, outputs=outputs, part=i) for i, name in enumerate(ours))


def layout_of(config: Config) -> Layout:
    """The layout of a module's attention; "monomer" for a module without attention, whose form is the same in both."""
    return attention_of(config).layout if has_attention(config) else "monomer"


Patterns = Iterable[tuple[tuple[re.Pattern, list[Callable[[str | None], int]]], Row]]


def _match(patterns: Patterns, name: str) -> tuple[Row | None, list[int]]:
    """The row whose pattern matches a name (None if there is none), and the name's numbers, counted from 0."""
    return next(iter(_matches(patterns, name)), (None, []))


def _matches(patterns: Patterns, name: str) -> list[tuple[Row, list[int]]]:
    """The rows whose patterns match a name, with its numbers: one row, or those of all modules that it packs."""
    matches: list[tuple[Row, list[int]]] = []
    for (pattern, readers), row in patterns:
        if found := pattern.fullmatch(name):
            matches.append((row, [read(text) for read, text in zip(readers, found.groups(), strict=True)]))
            if row.part is None:
                break
    return matches


def _split(
    theirs: str, ours: Sequence[str], shape: tuple[int, ...], widths: Mapping[str, tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Shapes of the parts of one of their parameters, outputs first.

    Raises:
        ValueError: its outputs do not divide into these parts.
    """
    if len(ours) == 1 or not shape:
        return [shape] * len(ours)
    number = len(ours)
    parts = widths.get(theirs.rpartition(".")[0], (shape[0] // number,) * number)
    if sum(parts) != shape[0] or min(parts) < 1:
        raise ValueError(
            f"{theirs} {shape} must hold {', '.join(ours)}, and its {shape[0]} outputs do not divide into them"
        )
    return [(part, *shape[1:]) for part in parts]
