"""Finds the modules that define AlphaFold's attention: those of its own package and copies in other packages."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import haiku as hk

from ipa_bridge.config import IPAConfig
from ipa_jax.replace.adapters import arguments_of, original_class

SYSTEMS = {
    "alphafold.model.folding": IPAConfig.alphafold2(),
    "alphafold.model.folding_multimer": IPAConfig.alphafold_multimer(),
}
"""Attention that each module of DeepMind's or ColabFold's package defines."""

_NAME = "InvariantPointAttention"
"""Name of the class, in AlphaFold and in its copies."""

_BUILT_WITH = ("config", "global_config", "dist_epsilon", "name")
"""Arguments of the constructor, in order; a copy may lack the last two."""

_CALLED_WITH = ("inputs_1d", "inputs_2d", "mask")
"""Arguments of the call, before the frames."""

_FRAMES = {"affine": IPAConfig.alphafold2(), "rigid": IPAConfig.alphafold_multimer()}
"""Attention by the name of the call's fourth argument, the frames."""

_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Recognised(NamedTuple):
    """A module whose attention can be replaced."""

    module: ModuleType
    original: Any
    """The module's own attention class, also if ours is in its place."""
    config: IPAConfig


def find_attentions(
    modules: str | ModuleType | Iterable[str | ModuleType] | None = None,
) -> tuple[list[Recognised], dict[str, str]]:
    """Modules that define AlphaFold's attention, and reasons why others were left alone, by module name.

    Args:
        modules: the modules, or names of modules to import; by default those of the package alphafold, which are
            imported, and every copy that is already imported.

    Raises:
        ValueError: there is none, or one of `modules` cannot be imported or does not define AlphaFold's attention.
    """
    if modules is not None:
        given = [modules] if isinstance(modules, str | ModuleType) else list(modules)
        named = {id(x): x for x in (_imported(x) if isinstance(x, str) else x for x in given)}
        if not named:
            raise ValueError("modules= must name at least one module, or be None for all that are found; got none")
        return [_recognise(x) for x in named.values()], {}
    found, left_alone = [], {}
    try:
        own = [importlib.import_module(name) for name in SYSTEMS if _exists(name)]
    except ImportError as broken:
        own, left_alone["alphafold"] = [], f"it is installed but cannot be imported: {broken}"
    for module in {id(x): x for x in (*own, *_copies())}.values():
        try:
            found.append(_recognise(module))
        except ValueError as other:
            left_alone[module.__name__] = str(other)
    if not found:
        reasons = "".join(f"; {name}: {reason}" for name, reason in left_alone.items())
        raise ValueError(
            f"DeepMind's or ColabFold's package alphafold was expected, with {' or '.join(SYSTEMS)}, or an imported "
            f"module with a copy of its {_NAME}; there is none{reasons}: install alphafold, import the copy's package, "
            "pass modules=, or use ipa_jax.InvariantPointAttention in your own module"
        )
    return found, left_alone


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"modules= must hold modules that define AlphaFold's {_NAME}, or their names; {name!r} cannot be "
            f"imported: {error}; check the name and sys.path"
        ) from error


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _copies() -> Iterator[ModuleType]:
    """Imported modules in which a class like AlphaFold's is defined; names that were only imported do not count."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            attention = original_class(_names(module).get(_NAME))
            if _is_alphafolds(attention) and attention.__module__ == _names(module).get("__name__"):
                yield module


def _names(module: ModuleType) -> dict[str, Any]:
    """A module's names; modules that import others at first use are left asleep."""
    return object.__getattribute__(module, "__dict__")


def _is_alphafolds(attention: Any) -> bool:
    """True for a Haiku module that is built and called with AlphaFold's arguments."""
    if not (isinstance(attention, type) and issubclass(attention, hk.Module)):
        return False
    called, built = (list(arguments_of(x)) for x in (attention.__call__, attention.__init__))
    return (
        (*called[:3],) == _CALLED_WITH
        and called[3:4] != []
        and called[3] in _FRAMES
        and built[:2] == ["config", "global_config"]
    )


def _recognise(module: Any) -> Recognised:
    """The module with its own class and config.

    Raises:
        ValueError: its class is not AlphaFold's, or needs arguments that AlphaFold's has not.
    """
    if not isinstance(module, ModuleType):
        raise ValueError(f"modules= must hold modules or names of modules; got {module!r}")
    name, attention = module.__name__, original_class(_names(module).get(_NAME))
    if name in SYSTEMS and attention is not None:
        config = SYSTEMS[name]
    elif _is_alphafolds(attention):
        config = _FRAMES[list(arguments_of(attention.__call__))[3]]
    else:
        got = "it has none" if attention is None else f"got {attention!r}"
        raise ValueError(
            f"{name}: a Haiku module {_NAME} was expected, built with (config, global_config, …) and called with "
            f"(inputs_1d, inputs_2d, mask, affine or rigid) as in AlphaFold; {got}: name the module that defines it"
        )
    for function, usual in ((attention.__init__, _BUILT_WITH), (attention.__call__, (*_CALLED_WITH, *_FRAMES))):
        takes = arguments_of(function)
        known = [x for x in takes if x in usual]
        unknown = [x for x, y in takes.items() if x not in usual and y.default is y.empty and y.kind not in _ANY]
        if unknown or list(takes)[: len(known)] != known:
            raise ValueError(
                f"{name}: AlphaFold's arguments {', '.join(usual)} were expected first, and others with a default; its "
                f"{_NAME} takes {', '.join(takes)}: give the others defaults, after AlphaFold's"
            )
    return Recognised(module, attention, config)
