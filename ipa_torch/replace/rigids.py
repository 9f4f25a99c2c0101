"""Reads and makes the rigids of other projects: objects, pairs or 4×4 matrices with rotations and translations."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_PARTS = (
    ("get_rots", "get_trans"),
    ("rots", "trans"),
    ("rot", "trans"),
    ("rotation", "translation"),
    ("rotations", "translations"),
    ("rot", "t"),
    ("R", "t"),
)
"""Attributes or methods that hold an object's rotations and translations, in the order in which they are tried."""

_MATRICES = ("get_rot_mats", "rot_mats", "rot_mat", "to_tensor", "to_matrix", "as_matrix", "matrix", "mat")
"""Attributes or methods of a rotation that give its matrices."""

_HOMOGENEOUS = ("to_tensor_4x4", "to_4x4", "to_homogeneous", "to_tensor")
"""Methods of a rigid that give its 4×4 matrices."""

RIGID_NAMES = ("Rigid", "Rigid3Array", "Frame", "Frames", "T", "Affine", "QuatAffine", "Rigids", "Transform")
"""Names that classes of rigids have; `Rigid3Array` and `Rigid` are OpenFold's."""


def rotation_and_translation(r: Any) -> tuple[Tensor, Tensor]:
    """Rotation matrices (*B, N, 3, 3) and translations (*B, N, 3) of another project's rigids.

    Raises:
        ValueError: `r` has neither under the usual names.
    """
    if isinstance(r, Tensor) and r.shape[-2:] == (4, 4):
        return r[..., :3, :3], r[..., :3, 3]
    if isinstance(r, tuple | list) and len(r) == 2:
        return _matrices(r[0]), _vectors(r[1])
    for one, other in _PARTS:
        rotation, translation = _value(r, one), _value(r, other)
        if rotation is not None and translation is not None:
            return _matrices(rotation), _vectors(translation)
    for name in _HOMOGENEOUS:
        if not isinstance(r, Tensor) and isinstance(x := _value(r, name), Tensor) and x.shape[-2:] == (4, 4):
            return x[..., :3, :3], x[..., :3, 3]
    raise ValueError(
        f"rigids were expected: an object with {', '.join('/'.join(names) for names in _PARTS)} or "
        f"{_HOMOGENEOUS[0]}(), two tensors, or 4×4 matrices; got a {type(r).__name__}"
    )


def _value(x: Any, name: str) -> Any:
    """An attribute of an object, called if it is a method; None if there is none."""
    found = getattr(x, name, None)
    return found() if callable(found) and not isinstance(found, Tensor) else found


def _matrices(rotation: Any) -> Tensor:
    """Matrices of rotations, which may be an object that holds them."""
    if isinstance(rotation, Tensor) and rotation.shape[-2:] == (3, 3):
        return rotation
    for name in _MATRICES:
        if isinstance(x := _value(rotation, name), Tensor) and x.shape[-2:] == (3, 3):
            return x
    raise ValueError(
        f"rotation matrices were expected, or an object with {' or '.join(_MATRICES)}; got a {type(rotation).__name__}"
    )


def _vectors(translation: Any) -> Tensor:
    """Translations, which may be an object that holds them."""
    if isinstance(translation, Tensor):
        return translation
    for name in ("to_tensor", "to_array"):
        if isinstance(x := _value(translation, name), Tensor):
            return x
    parts = [getattr(translation, axis, None) for axis in "xyz"]
    if all(isinstance(x, Tensor) for x in parts):
        return torch.stack(typing.cast(list[Tensor], parts), -1)
    raise ValueError(f"translations were expected as a tensor; got a {type(translation).__name__}")


def makers_of_rigids(
    original: Any, argument: str, callers: Iterable[type], *, arrays: bool
) -> Iterator[Callable[[Tensor, Tensor], Any]]:
    """Functions that may make the rigids of a layer from rotations and translations, the likeliest first.

    The class is the annotation of the argument. Without one, it is a class with a usual name in the Python file of the
    layer or of a module around the layer, since that module has to make rigids to call it.

    Args:
        original: class of the layer.
        argument: name of its forward's argument.
        callers: classes of the modules around the layer, the innermost first.
        arrays: True to try classes of OpenFold's multimer models first.
    """
    kinds = _annotated(original, argument) or _beside((original, *callers))
    multimers = [x for x in kinds if not hasattr(x, "get_rots") and hasattr(x, "from_tensor_4x4")]
    others = [x for x in kinds if x not in multimers]
    for kind in (*multimers, *others) if arrays else (*others, *multimers):
        yield lambda rotation, translation, kind=kind: _make(kind, rotation, translation)  # type: ignore[misc]


def _make(kind: Any, rotation: Tensor, translation: Tensor) -> Any:
    """Rigids of a class from the first way of making them that gives these rotations and translations."""
    expected = rotation, translation
    for make in _ways(kind, rotation, translation):
        try:
            made = make()
            same = all(
                x.shape == y.shape and torch.allclose(x.to(y.dtype), y, atol=1e-4)
                for x, y in zip(rotation_and_translation(made), expected, strict=True)
            )
        except Exception:
            continue
        if same:
            return made
    raise ValueError(f"a {kind.__name__} could not be made from rotation matrices and translations")


def _ways(kind: Any, rotation: Tensor, translation: Tensor) -> Iterator[Callable[[], Any]]:
    """Ways in which classes of rigids are made."""
    matrices = homogeneous(rotation, translation)
    if not hasattr(kind, "get_rots") and hasattr(kind, "from_tensor_4x4"):
        yield lambda: kind.from_tensor_4x4(matrices)
    rotations = [
        x
        for name, x in vars(sys.modules[kind.__module__]).items()
        if isinstance(x, type) and name in ("Rotation", "Rot", "Rot3Array", "Rotations", "RotationMatrix")
    ]
    for each in rotations:
        for options in ({"rot_mats": rotation, "quats": None}, {"rot_mats": rotation}, {"mat": rotation}):
            yield lambda each=each, options=options: kind(each(**options), translation)  # type: ignore[misc]
        yield lambda each=each: kind(each(rotation), translation)  # type: ignore[misc]
    yield lambda: kind(rotation, translation)
    for one, other in _PARTS[1:]:
        yield lambda one=one, other=other: kind(**{one: rotation, other: translation})  # type: ignore[misc]
    for name in ("from_tensor_4x4", "from_4x4", "from_homogeneous", "from_tensor"):
        if hasattr(kind, name):
            yield lambda name=name: getattr(kind, name)(matrices)  # type: ignore[misc]


def _annotated(original: Any, argument: str) -> list[Any]:
    """The classes that a forward's argument may be of, by its annotation."""
    try:
        annotation = inspect.signature(original.forward, eval_str=True).parameters[argument].annotation
    except Exception:  # a name that only type checkers import
        return []
    named = typing.get_args(annotation) or (annotation,)
    return [x for x in named if isinstance(x, type) and _is_rigid(x)]


def _is_rigid(kind: type) -> bool:
    """True for a class that moves points, or that gives rotations and translations under the usual names."""
    moves = callable(getattr(kind, "apply", None)) and any(
        callable(getattr(kind, x, None)) for x in ("invert_apply", "apply_inverse", "invert", "inverse")
    )
    return moves or hasattr(kind, "get_rots") or hasattr(kind, "from_tensor_4x4")


def _beside(kinds: Iterable[type]) -> list[Any]:
    """Classes of rigids in the modules that define `kinds`, then in modules that those import."""
    names = [x.__module__ for kind in kinds for x in kind.__mro__]
    found = []
    for name in dict.fromkeys(x for x in names if x in sys.modules):
        own = vars(sys.modules[name])
        imported = [vars(x) for x in own.values() if isinstance(x, ModuleType)]
        package = name.partition(".")[0]
        sources = {getattr(x, "__module__", None) or "" for x in own.values() if inspect.isroutine(x)}
        imported += [
            vars(sys.modules[x]) for x in sorted(sources) if x.partition(".")[0] == package and x in sys.modules
        ]
        found += [space[x] for spaces in ([own], imported) for x in RIGID_NAMES for space in spaces if x in space]
    others = ("torch", "ipa_torch", "builtins")
    rigids = [x for x in found if isinstance(x, type) and x.__module__.partition(".")[0] not in others]
    return list(dict.fromkeys(x for x in rigids if _is_rigid(x)))


def homogeneous(rotation: Tensor, translation: Tensor) -> Tensor:
    """Rotations and translations as 4×4 matrices."""
    last = torch.tensor([0.0, 0, 0, 1], dtype=rotation.dtype, device=rotation.device)
    upper = torch.cat([rotation, translation[..., None]], -1)
    return torch.cat([upper, last.expand(*upper.shape[:-2], 1, 4)], -2)
