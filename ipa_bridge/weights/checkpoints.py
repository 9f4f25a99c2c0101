"""Reading one module from a weight file and writing one to it: arrays, config and metadata."""

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
"""Largest parameter count accepted from a file of fewer bytes: thirty times that of AlphaFold's structure module."""

MAX_LAYERS = 1024
"""Largest number of layers accepted from a file's metadata."""

_CONFIG_KEY, _ASSUMED_KEY, _DIALECT_KEY = "ipa_config", "ipa_assumed", "ipa_dialect"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One module that was read from a file."""

    arrays: Mapping[str, np.ndarray]
    """Arrays by canonical name."""
    config: Config
    assumed: frozenset[str]
    """Paths of the config's fields that nothing determines."""
    found: Found
    """The module in the file: its dialect, kind and path."""
    parts: Parts
    """The parameters at its path."""


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
        dialect: as in `Weights.load`.
        root: as in `Weights.load`.
        config: as in `Weights.load`.
        progress: called with the number of parameters read so far and the number of all.

    Raises:
        ValueError: arrays or metadata are damaged, there is no such module, there are several and `root` is None, two
            dialects read the names differently, or the parameters do not fit.
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
        raise ValueError(f"{error}\narrays that could not be read:\n  {others}") from error
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
    """Writes a module that a dialect can represent; the path's suffix sets the format.

    Args:
        path: destination.
        arrays: arrays by canonical name.
        config: the module's config; only .safetensors stores it.
        dialect: the system whose names and layout to write.
        assumed: paths of the config's fields that nothing determines; only .safetensors stores them.
        root: path of the module in the file.
        replace: False to refuse an existing file.

    Raises:
        ValueError: the suffix is unknown, the dialect or the format cannot store the module, or the destination must
            not be replaced.
    """
    named = in_dialect(arrays, config, dialect, root)
    if dialect.separator == "/":
        named = {double_slash(name): x for name, x in named.items()}
    write_arrays(path, named, _metadata(config, assumed, dialect), replace=replace)


def unstored_fields(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], config: Config) -> list[str]:
    """Ends of sentences ("x.npz …") on config fields that the file cannot store and `load` would assume otherwise.

    .safetensors stores the config; the other formats store only names and shapes.
    """
    if os.fspath(path).endswith(".safetensors"):
        return []
    by_shapes = infer_config({name: x.shape for name, x in arrays.items()})
    inferred, told = ({**functional_fields(x), **frame_units(x)} for x in (by_shapes, config))
    unstored = [
        f"{name}={x!r} (Weights.load will assume {inferred[name]!r})" for name, x in told.items() if x != inferred[name]
    ]
    if not unstored:
        return []
    return [f"cannot store {', '.join(unstored)}: pass config= to Weights.load, or save as .safetensors"]


def _check_size(config: Config, file: ArrayFile) -> None:
    """Raises if a config claims more parameters than a file of this size holds: trained ones hardly compress."""
    number = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    most = max(MAX_NUMBERS, file.path.stat().st_size)
    if number > most:
        raise ValueError(
            f"{file.path}: at most {most} numbers were expected in a module from a file of its size; its config or "
            f"shapes claim {number}: the file is damaged, or config= is not its module's"
        )


def _shapes(file: ArrayFile, keys: Mapping[str, str]) -> tuple[Shapes, dict[str, ValueError]]:
    """Shapes by name; and errors by name for arrays that cannot be read, which may belong to other modules."""
    shapes: Shapes = {}
    unreadable: dict[str, ValueError] = {}
    for name, key in keys.items():
        try:
            shapes[name] = file.shape(key)
        except ValueError as error:
            unreadable[name] = error
    return shapes, unreadable


def _metadata(config: Config, assumed: Collection[str], dialect: Dialect) -> dict[str, str]:
    """Metadata for .safetensors; the package transformers requires "format"."""
    metadata = {_CONFIG_KEY: json.dumps(dataclasses.asdict(config))}
    if assumed:
        metadata[_ASSUMED_KEY] = json.dumps(sorted(assumed))
    return {"format": "pt", _DIALECT_KEY: dialect.name, **metadata} if dialect.forms else metadata


def _told_by_metadata(
    metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> tuple[Config, frozenset[str]] | None:
    """The config in a file's metadata, and its assumed fields: those marked as such and those that are missing."""
    if _CONFIG_KEY not in metadata:
        return None
    try:
        values = json.loads(metadata[_CONFIG_KEY])
        config = _believed_config(values)
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: its {_CONFIG_KEY} metadata is not a config ({error}): pass config=") from error
    known = fields(config)
    try:
        marked = json.loads(metadata.get(_ASSUMED_KEY, "[]"))
        if not isinstance(marked, list) or not all(isinstance(x, str) and x in known for x in marked):
            raise ValueError("a list of fields of the config was expected")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its {_ASSUMED_KEY} metadata cannot be read ({error}): pass config=") from error
    return config, frozenset({*marked, *(x for x in known if not _has(values, x))})


def _has(values: Any, path: str) -> bool:
    """Returns True if a config's values include the field at a path."""
    for name in path.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def _believed_config(values: Any) -> Config:
    """The config with those values, of whatever kind; raises if it has more layers than are accepted."""
    for name in ("num_layer", "num_layer_in_transition", "num_residual_block"):
        for level in (values, values.get("block", {})):
            if isinstance(level.get(name), int) and level[name] > MAX_LAYERS:
                raise ValueError(f"{name} must be at most {MAX_LAYERS}; got {level[name]}")
    return config_from_values(values)
