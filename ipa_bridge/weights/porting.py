"""Weights from one system to another: convert a file, verify a conversion, look into a file, compare two."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ipa_bridge.config import Config
from ipa_bridge.destinations import check_destination
from ipa_bridge.kinds import KINDS, attention_of, has_attention, kind_of, parameter_shapes, replace_attention
from ipa_bridge.weights import Weights, semantics
from ipa_bridge.weights.assumptions import functional_fields
from ipa_bridge.weights.checkpoints import Checkpoint, read_checkpoint, unstored_fields
from ipa_bridge.weights.conversion import in_layout
from ipa_bridge.weights.dialects import Dialect, default_dialect, find_dialect
from ipa_bridge.weights.files import SUFFIXES, ArrayFile, open_arrays
from ipa_bridge.weights.finding import Found, Parts, modules
from ipa_bridge.weights.paths import keys_by_path
from ipa_bridge.weights.reports import (
    Comparison,
    FileContents,
    FileConversion,
    FileParameter,
    FoundModule,
    ModuleContents,
    ParameterComparison,
    Place,
    Verification,
)
from ipa_bridge.weights.translation import in_dialect

MAX_VERIFIED_EPS = 1024
"""Largest error of a verification, in eps of float64: an order of numbers costs less than ten, a swapped axis 1e14."""

Progress = Callable[[str, int, int], None]
"""Told a file's name, how many of its parameters are read, and of how many."""


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    source_dialect: str | None = None,
    source_root: str | None = None,
    dialect: str | None = None,
    root: str | None = None,
    dtype: str | None = None,
    allow_lossy: Collection[str] = (),
    verified: bool = False,
    replace: bool = False,
    progress: Progress = lambda name, done, of: None,
) -> FileConversion:
    """Writes a module of one file into another, as another system's.

    Args:
        source: a file that `Weights.load` reads.
        destination: the file to write, in the format that its suffix says.
        source_dialect: whose names the source has; None to recognise it.
        source_root: path of the module in the source, where there are several or another is meant.
        dialect: whose names the destination gets; None for ours.
        root: path of the module in the destination; None for where it came from in haiku's names, and none in torch's.
        dtype: round to it; None to leave numbers as they are.
        allow_lossy: names of `conversion.LOSSES` that may happen.
        verified: verify the conversion, and write nothing if it does not hold.
        replace: an existing destination is replaced.
        progress: told how much is read.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: the source holds no such module, the dialect cannot say it, or the destination cannot be written.
    """
    path = Path(destination)
    check_paths(Path(source), path)
    check_destination(path, replace=replace)
    target = find_dialect(dialect or default_dialect(path))
    with open_arrays(source) as file:
        checkpoint = _read(file, source_dialect, source_root, progress)
        elsewhere, ignored = _count_elsewhere(file, checkpoint.parts), file.ignored
    found = checkpoint.found
    weights = _weights(checkpoint)
    whose = _owner(found, weights)
    rounded = weights.astype(dtype) if dtype else weights
    converted, conversion = rounded.converted(target, allow_lossy=allow_lossy)
    notes = [*checkpoint.parts.notes(), *conversion.notes]
    if not target.forms:
        notes += [f"{path.name} {text}" for text in unstored_fields(path, converted.arrays, converted.config)]
    if found.dialect.frames and not target.frames:
        notes.append(found.dialect.frames)
    notes += rounded.unsure()
    if root is None:
        root = converted.root if target.separator == "/" else ""
    check = None
    if verified:
        check = verify(weights, target.name, source_dialect=found.dialect.name, dtype=dtype, allow_lossy=allow_lossy)
    report = FileConversion(
        source=Place(os.fspath(source), whose.name, found.root),
        destination=Place(os.fspath(destination), target.name, root),
        module=KINDS[found.kind].title,
        config=converted.config,
        converted=len(converted.arrays),
        numbers=sum(x.size for x in converted.arrays.values()),
        added=tuple(target.unused.get(found.kind, {})),
        assumed=tuple(sorted(converted.assumed)),
        losses=conversion.losses,
        notes=tuple(notes),
        elsewhere=elsewhere,
        ignored=ignored,
        verified=check,
    )
    if report.written:
        converted.write(path, target, root=root, replace=replace)
    return report


def check_paths(source: Path, destination: Path) -> None:
    """A file can be converted from here to there, be there one already or not.

    Raises:
        ValueError: the destination's suffix is of no format, it is the source itself, or its folder is not there.
    """
    if destination.suffix not in SUFFIXES:
        raise ValueError(f"{destination}: expected a name ending in {', '.join(SUFFIXES)}")
    if source.exists() and destination.exists() and destination.samefile(source):
        raise ValueError(f"{destination} is the source itself: name another file")
    if not destination.parent.is_dir():
        raise ValueError(f"{destination}: there is no directory {destination.parent}")


def verify(
    weights: Weights,
    dialect: str,
    *,
    source_dialect: str = "ipa_jax",
    dtype: str | None = None,
    allow_lossy: Collection[str] = (),
) -> Verification:
    """Runs the source's semantics and the target's on the same random input, each against ours in float64.

    What rounding and losses change is measured apart: from what was read to what is written, both in our semantics.

    Args:
        weights: what is to be converted.
        dialect: the target.
        source_dialect: whose the weights were.
        dtype: round to it before conversion.
        allow_lossy: names of `conversion.LOSSES` that may happen.

    Raises:
        ValueError: a dialect cannot say it, or a loss is not allowed.
    """
    source_system, target = find_dialect(source_dialect), find_dialect(dialect)
    weights = _without_zeros(weights)
    rounded = weights.astype(dtype) if dtype else weights
    written, _ = rounded.converted(target, allow_lossy=allow_lossy)
    before, after = (semantics.probe("ipa_jax", each.arrays, each.config) for each in (weights, written))
    source = semantics.probe(source_dialect, in_dialect(weights.arrays, weights.config, source_system), weights.config)
    result = semantics.probe(dialect, in_dialect(written.arrays, written.config, target), written.config)
    eps = float(np.finfo(np.float64).eps)
    errors = [semantics.distance(source, before) / eps, semantics.distance(result, after) / eps]
    change = semantics.distance(after, before)
    finite = all(map(math.isfinite, (*errors, change)))
    return Verification(
        eps=max(errors) if finite else None,
        within=MAX_VERIFIED_EPS,
        change=change if finite else None,
        passed=finite and max(errors) <= MAX_VERIFIED_EPS,
    )


def inspect(
    path: str | os.PathLike[str],
    *,
    dialect: str | None = None,
    root: str | None = None,
    progress: Progress = lambda name, done, of: None,
) -> FileContents:
    """Lists the modules that a file may hold, and the contents of the one that is meant.

    Args:
        path: the file.
        dialect: whose names it has; None to recognise it.
        root: path of the module, where there are several or another is meant.
        progress: told how much is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged; that no module can be read is its `problem`.
    """
    with open_arrays(path) as file:
        keys = keys_by_path(file.keys)
        haiku = any("//" in key for key in file.keys)
        every = modules(keys, dialect, haiku=haiku)
        contents, problem = None, None
        try:
            contents = _module_contents(file, _read(file, dialect, root, progress))
        except ValueError as error:
            problem = str(error)
    listed = tuple(FoundModule(KINDS[each.kind].title, each.root, each.dialect.name) for each in every)
    return FileContents(os.fspath(path), len(keys), file.ignored, listed, contents, problem)


def compare(
    one: str | os.PathLike[str],
    other: str | os.PathLike[str],
    *,
    dialect_a: str | None = None,
    dialect_b: str | None = None,
    root_a: str | None = None,
    root_b: str | None = None,
    progress: Progress = lambda name, done, of: None,
) -> Comparison:
    """Compares a module in one file with that in another, whatever system's names and layout they have.

    Args:
        one: a file.
        other: another.
        dialect_a: whose names the one has; None to recognise it.
        dialect_b: whose names the other has.
        root_a: path of the module in the one, where there are several or another is meant.
        root_b: path of the module in the other.
        progress: told how much is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file holds no such module, or they are of different kinds.
    """
    read = []
    for path, dialect, root in ((one, dialect_a, root_a), (other, dialect_b, root_b)):
        with open_arrays(path) as file:
            read.append(_read(file, dialect, root, progress))
    kinds = [KINDS[each.found.kind] for each in read]
    if kinds[0] is not kinds[1]:
        raise ValueError(
            f"one kind of module was expected in both; got {kinds[0].title} in {os.fspath(one)} and "
            f"{kinds[1].title} in {os.fspath(other)}: name a module in one of them with --root-a or --root-b, as "
            f"`ipa-port inspect` lists them"
        )
    a, b = (_common_form(_weights(each)) for each in read)
    config = _differing_fields(a.config, b.config)
    parameters = tuple(
        _compare_arrays(name, a.arrays.get(name), b.arrays.get(name)) for name in dict.fromkeys([*a.arrays, *b.arrays])
    )
    places = [
        Place(os.fspath(path), each.found.dialect.name, each.found.root)
        for path, each in zip((one, other), read, strict=True)
    ]
    return Comparison(
        files=(places[0], places[1]),
        module=kinds[0].title,
        same=not config and all(each.same for each in parameters),
        config=config,
        parameters=parameters,
    )


def _read(file: ArrayFile, dialect: str | None, root: str | None, progress: Progress) -> Checkpoint:
    return read_checkpoint(file, dialect=dialect, root=root, progress=partial(progress, file.path.name))


def _weights(checkpoint: Checkpoint) -> Weights:
    return Weights(checkpoint.arrays, checkpoint.config, assumed=checkpoint.assumed)


def _owner(found: Found, weights: Weights) -> Dialect:
    """AlphaFold's names are ours too; they are AlphaFold's if its own classes compute this."""
    if found.dialect.separator != "/":
        return found.dialect
    alphafold = find_dialect("alphafold")
    try:
        same = weights.converted(alphafold)[0].config == weights.config
    except ValueError:
        same = False
    return alphafold if same else find_dialect("ipa_jax")


def _count_elsewhere(file: ArrayFile, parts: Parts) -> dict[str, int]:
    """Arrays that belong to other parts of the model, counted by the first names of their paths."""
    keys = keys_by_path(file.keys)
    names = parts.found.names(keys)
    here = {*parts.read, *(names[name] for name in parts.unused)}
    return dict(Counter(_stem(key) for key in keys if key not in here))


def _stem(key: str) -> str:
    """The first names of a path, without its last."""
    separator = "/" if "/" in key else "."
    parts = key.split(separator)
    return separator.join(parts[: min(3, max(1, len(parts) - 1))])


def _module_contents(file: ArrayFile, checkpoint: Checkpoint) -> ModuleContents:
    found, weights = checkpoint.found, _weights(checkpoint)
    return ModuleContents(
        module=kind_of(weights.config).title,
        root=found.root,
        dialect=_owner(found, weights).name,
        config=weights.config,
        assumed=tuple(sorted(weights.assumed)),
        notes=tuple(checkpoint.parts.notes()),
        parameters=tuple(
            FileParameter(
                name=name,
                theirs=theirs,
                shape=transform.their_shape,
                dtype=weights.arrays[name].dtype.name,
                norm=float(np.linalg.norm(weights.arrays[name].astype(np.float64))),
            )
            for name, (theirs, transform) in found.dialect.names(weights.config).items()
        ),
        elsewhere=_count_elsewhere(file, checkpoint.parts),
    )


def _without_zeros(weights: Weights) -> Weights:
    """The same with random numbers where a whole projection is zero, as in a model that has not been trained.

    Nothing passes through zeros, and any two functions that end in them are the same.
    """
    filling = Weights.random(weights.config).arrays
    arrays = {
        name: filling[name].astype(x.dtype) if name.endswith("/weights") and not x.any() else x
        for name, x in weights.arrays.items()
    }
    return dataclasses.replace(weights, arrays=arrays)


def _common_form(weights: Weights) -> Weights:
    """In the form that both of AlphaFold's layouts have a place in: monomer, with biases, zero where there are none."""
    if not has_attention(weights.config):
        return weights
    found, config = in_layout(weights.arrays, weights.config, "monomer")
    ipa = dataclasses.replace(attention_of(config), scalar_bias=True, point_bias=True)
    config = replace_attention(config, ipa)
    arrays = {
        name: found[name] if name in found else np.zeros(shape, np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    return Weights(arrays, config)


def _differing_fields(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Fields by name that say what a module computes and differ, with both values."""
    a, b = functional_fields(one), functional_fields(other)
    return {name: (a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)}


def _compare_arrays(name: str, x: np.ndarray | None, y: np.ndarray | None) -> ParameterComparison:
    if x is None or y is None or x.shape != y.shape:
        shapes = (None if x is None else x.shape, None if y is None else y.shape)
        return ParameterComparison(name, shapes, same=False)
    x, y = x.astype(np.float64), y.astype(np.float64)
    largest = float(np.abs(y).max())
    difference = float(np.abs(x - y).max())
    relative = difference / largest if largest else float(difference > 0)
    return ParameterComparison(name, None, difference == 0, difference, relative)
