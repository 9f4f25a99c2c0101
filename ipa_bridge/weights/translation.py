"""Conversion of arrays between our names and layout and a dialect's; every step only permutes numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ipa_bridge.config import Config
from ipa_bridge.kinds import parameter_shapes
from ipa_bridge.parameters import Shapes, torch_name
from ipa_bridge.weights.dialects import Dialect, Transform, find_dialect
from ipa_bridge.weights.finding import Found
from ipa_bridge.weights.paths import join_path, names_below

MAX_PROBLEMS = 40
"""Largest number of problems named in one error."""


def in_dialect(
    arrays: Mapping[str, np.ndarray], config: Config, dialect: Dialect, root: str = ""
) -> dict[str, np.ndarray]:
    """Arrays in a dialect's names and layout, below a root; parameters that its modules never read are zeros."""
    names = dialect.names(config)
    found: dict[str, np.ndarray] = {}
    for name, (theirs, transform) in names.items():
        found[theirs] = transform.apply(arrays[name], found.get(theirs))
    dtype = next(iter(found.values())).dtype
    unused = dialect.unused.get(type(config), {})
    found |= {theirs: np.zeros(shape, dtype) for theirs, shape in unused.items()}
    return {join_path(root, theirs, dialect.separator): x for theirs, x in found.items()}


def from_dialect(
    found: Found, config: Config, shapes: Shapes, read: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """Reads a module's arrays into our form, after checking all names and shapes.

    Args:
        found: the module's dialect, kind and path.
        config: the module's config.
        shapes: shapes of all parameters, by key.
        read: function that returns the array of a key.

    Raises:
        ValueError: parameters are missing, unknown or misshapen, each named.
    """
    names, below = found.dialect.names(config), found.parts(shapes, config).below
    wanted, ours = parameter_shapes(config), found.dialect.canonical_names(below, found.kind)
    problems = [
        f"missing {name} {shape}" + _packed_in(*names[name])
        for name, shape in wanted.items()
        if names[name][0] not in below
    ]
    known = {theirs for theirs, _ in names.values()}
    problems += [
        f"unexpected {ours.get(theirs, theirs)} {shapes[key]}" for theirs, key in below.items() if theirs not in known
    ]
    arrays = {}
    for name, (theirs, transform) in names.items():
        if theirs not in below:
            continue
        shape = shapes[below[theirs]]
        if shape == transform.their_shape:
            continue
        if transform.packed:
            problems.append(f"{name}{_packed_in(theirs, transform)}: got {shape}")
            continue
        shown = shape[::-1] if transform.turned else shape
        problems.append(f"{name} must be {transform.shape}, got {shown}" + _in_the_file(name, theirs, transform, shape))
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"and {len(problems) - MAX_PROBLEMS} more"]
    if problems:
        raise ValueError("these parameters do not fit the config:\n  " + "\n  ".join(problems))
    packed: dict[str, np.ndarray] = {}
    for name, (theirs, transform) in names.items():
        array = packed[theirs] if theirs in packed else read(below[theirs])
        if transform.packed:  # read once for all its parts
            packed[theirs] = array
        arrays[name] = transform.invert(array)
    return arrays


def canonical_from_haiku(params: Mapping[str, Mapping[str, Any]], root: str) -> dict[str, Any]:
    """Leaves of a haiku tree below the root, by canonical name."""
    flat = {join_path(module, leaf): x for module, leaves in params.items() for leaf, x in leaves.items()}
    return {name: flat[key] for name, key in names_below(flat, root, "/").items()}


def canonical_from_torch(
    arrays: Mapping[str, np.ndarray], config: Config, dialect: str = "ipa_torch"
) -> dict[str, np.ndarray]:
    """Converts arrays, such as gradients, from a torch dialect's names and layout to canonical names and our layout."""
    return {
        ours: transform.invert(arrays[theirs])
        for ours, (theirs, transform) in find_dialect(dialect).names(config).items()
    }


def _packed_in(theirs: str, transform: Transform) -> str:
    """The parameter of another system that packs one of ours, for an error message."""
    return f", part of {theirs} {transform.their_shape}" if transform.packed else ""


def _in_the_file(name: str, theirs: str, transform: Transform, shape: tuple[int, ...]) -> str:
    """The parameter's name and shapes in a file of another system, for an error message."""
    return "" if theirs in (name, torch_name(name)) else f" ({theirs}: {transform.their_shape}, got {shape})"
