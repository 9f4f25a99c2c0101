"""Functions on weight files: convert one to another system, verify a conversion, inspect one, compare two."""

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
"""Largest error that passes a verification, in eps of float64.

Another order of summation costs less than ten eps, a swapped axis 1e14.
"""

Progress = Callable[[str, int, int], None]
"""Function that takes a file's name, the number of parameters read so far, and the number of all."""


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
    """Converts a module in one file to another system's form and writes it to another file.

    Args:
        source: a file that `Weights.load` reads.
        destination: the file to write; its suffix sets the format.
        source_dialect: the system whose names the source has; None to recognise it.
        source_root: path of the module in the source; needed if there are several, or to choose another one.
        dialect: the system whose names and layout the destination gets; None for ours.
        root: path of the module in the destination; None for its own name in haiku's names and no prefix in torch's.
        dtype: dtype to round to; None to leave numbers as they are.
        allow_lossy: losses to allow, by their names in `conversion.LOSSES`.
        verified: True to verify the conversion and write nothing if that fails.
        replace: True to replace an existing destination.
        progress: called after each array that is read.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: the source holds no such module, the dialect cannot represent it, or the destination cannot be
            written.
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
    """Checks that a source may be converted to a destination, whether the destination exists or not.

    Raises:
        ValueError: the destination's suffix is unknown, it is the source itself, or its folder does not exist.
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
    """Compares the source's and the target's semantics with ours, each on the same random input in float64.

    The effect of rounding and losses is measured separately: it is the change of outputs in our semantics from the
    weights read to the weights written.

    Args:
        weights: the weights to convert.
        dialect: the target.
        source_dialect: the system that the weights are from.
        dtype: dtype to round to before conversion; None to leave numbers as they are.
        allow_lossy: losses to allow, by their names in `conversion.LOSSES`.

    Raises:
        ValueError: a dialect cannot represent the weights or has no semantics, or a loss is not allowed.
    """
    source_system, target = find_dialect(source_dialect), find_dialect(dialect)
    _check_semantics(source_system, target)
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


def _check_semantics(*dialects: Dialect) -> None:
    """Raises if a dialect was registered without semantics."""
    for each in dialects:
        if each.name not in semantics.SYSTEMS:
            raise ValueError(
                f"cannot verify: what {each.title} computes is unknown; pass semantics= where register_dialect adds "
                f"{each.name!r}, or convert without verification"
            )


def inspect(
    path: str | os.PathLike[str],
    *,
    dialect: str | None = None,
    root: str | None = None,
    progress: Progress = lambda name, done, of: None,
) -> FileContents:
    """Lists the modules that a file may hold, and the contents of the selected one.

    Args:
        path: the file.
        dialect: the system whose names the file has; None to recognise it.
        root: path of the module; needed if there are several, or to choose another one.
        progress: called after each array that is read.

    Returns:
        The contents; if no module can be read from an intact file, `problem` gives the reason.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged.
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
    """Compares a module in one file with one in another; the files may have different systems' names and layouts.

    Args:
        one: the first file, A.
        other: the second file, B.
        dialect_a: the system whose names A has; None to recognise it.
        dialect_b: the system whose names B has; None to recognise it.
        root_a: path of the module in A; needed if there are several, or to choose another one.
        root_b: path of the module in B; likewise.
        progress: called after each array that is read.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file holds no such module, or the modules are of different kinds.
    """
    read = []
    for path, dialect, root in ((one, dialect_a, root_a), (other, dialect_b, root_b)):
        with open_arrays(path) as file:
            read.append(_read(file, dialect, root, progress))
    kinds = [KINDS[each.found.kind] for each in read]
    if kinds[0] is not kinds[1]:
        raise ValueError(
            f"both files must hold the same kind of module; got {kinds[0].title} in {os.fspath(one)} and "
            f"{kinds[1].title} in {os.fspath(other)}: choose modules with --root-a and --root-b; `ipa-port inspect` "
            f"lists them"
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
    """The dialect to report; for AlphaFold's names, which are also ours, AlphaFold if its own classes compute this."""
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
    """The first names of a path, at most three; the last name is left out unless it is the only one."""
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
    """Fills projections that are all zero, as in an untrained model, with random numbers.

    A projection of zeros would hide differences in everything before it.
    """
    filling = Weights.random(weights.config).arrays
    arrays = {
        name: filling[name].astype(x.dtype) if name.endswith("/weights") and not x.any() else x
        for name, x in weights.arrays.items()
    }
    return dataclasses.replace(weights, arrays=arrays)


def _common_form(weights: Weights) -> Weights:
    """The weights in a form that every attention can take: monomer layout with all biases, added ones being zero."""
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
    """Both values, by name, of the functional fields that differ."""
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
