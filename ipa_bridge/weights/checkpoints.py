"""One module out of a file of weights, and into one: arrays and config, with what the file tells of itself."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ipa_bridge.config import Config
from ipa_bridge.kinds import config_from_values, infer_config, parameter_shapes
from ipa_bridge.parameters import Shapes
from ipa_bridge.weights.assumptions import fields, frame_units, functional_fields, part_of
from ipa_bridge.weights.dialects import DIALECTS, Dialect, find_dialect
from ipa_bridge.weights.files import ArrayFile, write_arrays
from ipa_bridge.weights.finding import Found, Parts, find_module
from ipa_bridge.weights.paths import double_slash, keys_by_path
from ipa_bridge.weights.translation import from_dialect, in_dialect

MAX_NUMBERS = 1 << 26
"""Largest parameter count accepted from a file smaller than that, thirty times AlphaFold's."""

MAX_LAYERS = 1024
"""Largest number of layers accepted from a file's metadata."""

_CONFIG_KEY, _ASSUMED_KEY, _DIALECT_KEY = "ipa_config", "ipa_assumed", "ipa_dialect"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One module that was read from a file."""

    arrays: Mapping[str, np.ndarray]
    """By canonical name."""
    config: Config
    assumed: frozenset[str]
    """Paths of the config's fields that nothing told."""
    found: Found
    """The module in the file: the system whose names it has, and its path."""
    parts: Parts
    """What lay at its path."""


def read_checkpoint(
    file: ArrayFile,
    *,
    dialect: str | None = None,
    root: str | None = None,
    config: Config | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Checkpoint:
    """Reads one module out of an open file; see `Weights.load`.

    Args:
        file: the file.
        dialect: see there.
        root: see there.
        config: see there.
        progress: told how many parameters of how many are read.

    Raises:
        ValueError: damaged arrays or metadata, no such module, several and no root, names that two dialects read
            differently, or parameters that do not fit.
    """
    keys = keys_by_path(file.keys, str(file.path))
    haiku = any("//" in key for key in file.keys)
    shapes, unreadable = _shapes(file, keys)
    whose = file.metadata.get(_DIALECT_KEY)
    if dialect is None and whose in DIALECTS and (find_dialect(whose).separator == "/") == haiku:
        dialect = whose
    told = _told_by_metadata(file.metadata, file.path) if config is None else None
    if root is None:
        config = config or (told and told[0])
    try:
        found, settled, assumed = find_module(
            shapes, dialect=dialect, root=root, config=config, haiku=haiku, source=os.fspath(file.path)
        )
    except ValueError as error:
        if not unreadable:
            raise
        others = "\n  ".join(map(str, unreadable.values()))
        raise ValueError(f"{error}\nwhat could not be read:\n  {others}") from error
    settled, assumed = (told and part_of(*told, found.kind)) or (settled, assumed)
    _check_size(settled, file)
    for name in found.parts(dict.fromkeys(unreadable, ()), settled).read:
        raise unreadable[name]
    parts = found.parts(shapes, settled)
    number, done = len(parts.read), 0

    def read(name: str) -> np.ndarray:
        nonlocal done
        done += 1
        progress(done, number)
        return file[keys[name]]

    return Checkpoint(from_dialect(found, settled, shapes, read), settled, assumed, found, parts)


def write_checkpoint(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    config: Config,
    dialect: Dialect,
    *,
    assumed: Collection[str] = (),
    root: str = "",
    replace: bool = True,
) -> None:
    """Writes a module that a dialect has names for, in the format that the path's suffix says.

    Args:
        path: destination.
        arrays: by canonical name.
        config: what the module is, which .safetensors carries.
        dialect: whose names and layout.
        assumed: paths of the config's fields that nothing told, which .safetensors carries too.
        root: path of the module in the file.
        replace: False to leave an existing file alone.

    Raises:
        ValueError: another suffix, something that the dialect has no name for or the format cannot store, or a
            destination that is not to be replaced.
    """
    named = in_dialect(arrays, config, dialect, root)
    if dialect.separator == "/":
        named = {double_slash(name): x for name, x in named.items()}
    write_arrays(path, named, _metadata(config, assumed, dialect), replace=replace)


def unstored_fields(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], config: Config) -> list[str]:
    """What a file of that name cannot say, and `load` would take for granted, each as the end of a sentence.

    .safetensors carries the config; the others only names and shapes.
    """
    if os.fspath(path).endswith(".safetensors"):
        return []
    by_shapes = infer_config({name: x.shape for name, x in arrays.items()})
    inferred, told = ({**functional_fields(x), **frame_units(x)} for x in (by_shapes, config))
    untold = [f"{name} is {x!r}, not {inferred[name]!r}" for name, x in told.items() if x != inferred[name]]
    if not untold:
        return []
    return [
        f"cannot say that {'; that '.join(untold)}, as Weights.load will believe: pass it config=, or save as "
        f".safetensors"
    ]


def _check_size(config: Config, file: ArrayFile) -> None:
    """A small file may claim to hold any number: trained ones hardly compress, so a large module is in a large file."""
    number = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    if number > max(MAX_NUMBERS, file.path.stat().st_size):
        raise ValueError(
            f"{file.path}: {number} numbers are more than the {MAX_NUMBERS} that a file of its size is believed to hold"
        )


def _shapes(file: ArrayFile, keys: Mapping[str, str]) -> tuple[Shapes, dict[str, ValueError]]:
    """Shapes by name; and what is wrong with those that cannot be read, which may be no business of ours."""
    shapes: Shapes = {}
    unreadable: dict[str, ValueError] = {}
    for name, key in keys.items():
        try:
            shapes[name] = file.shape(key)
        except ValueError as error:
            unreadable[name] = error
    return shapes, unreadable


def _metadata(config: Config, assumed: Collection[str], dialect: Dialect) -> dict[str, str]:
    """What .safetensors carries beside the arrays; "format" is what transformers asks for."""
    metadata = {_CONFIG_KEY: json.dumps(dataclasses.asdict(config))}
    if assumed:
        metadata[_ASSUMED_KEY] = json.dumps(sorted(assumed))
    return {"format": "pt", _DIALECT_KEY: dialect.name, **metadata} if dialect.forms else metadata


def _told_by_metadata(
    metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> tuple[Config, frozenset[str]] | None:
    """The config that a file carries, and which fields of it are assumed: those marked so, and those it leaves out."""
    if _CONFIG_KEY not in metadata:
        return None
    try:
        values = json.loads(metadata[_CONFIG_KEY])
        config = _believed_config(values)
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: its {_CONFIG_KEY} metadata is no config ({error}): pass config=") from error
    known = fields(config)
    try:
        marked = json.loads(metadata.get(_ASSUMED_KEY, "[]"))
        if not isinstance(marked, list) or not all(isinstance(x, str) and x in known for x in marked):
            raise ValueError("a list of fields of the config was expected")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its {_ASSUMED_KEY} metadata cannot be read ({error}): pass config=") from error
    return config, frozenset({*marked, *(x for x in known if not _has(values, x))})


def _has(values: Any, path: str) -> bool:
    """A field of that path is among a config's values."""
    for name in path.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def _believed_config(values: Any) -> Config:
    """The config of those values, of whatever kind, unless it has more layers than are believed."""
    for name in ("num_layer", "num_layer_in_transition", "num_residual_block"):
        for level in (values, values.get("block", {})):
            if isinstance(level.get(name), int) and level[name] > MAX_LAYERS:
                raise ValueError(f"{name} is {level[name]}, and {MAX_LAYERS} is the most that is believed")
    return config_from_values(values)
