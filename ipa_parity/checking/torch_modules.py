"""Candidates from PyTorch modules: their parameters by dialect, their forward by the names of its arguments."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ipa_bridge.config import IPAConfig
from ipa_bridge.kinds import attention_of
from ipa_bridge.weights.finding import find_module
from ipa_parity.checking.calling import Ways
from ipa_parity.checking.candidates import (
    ARGUMENTS,
    TRANSPOSED,
    Candidate,
    DialectNames,
    MappedNames,
    Names,
    say_assumed,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


def module_candidate(
    module: nn.Module,
    config: IPAConfig | None,
    *,
    parameters: str | Mapping[str, str] | None,
    call: Callable | None,
    name: str,
) -> Candidate:
    """A candidate from a module: a copy in evaluation mode, which gets our weights.

    Raises:
        ValueError: its parameters are of no dialect, or the config does not fit them.
    """
    shapes = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    assumed = ""
    if isinstance(parameters, Mapping):
        if config is None:
            raise ValueError("config= was expected beside a table of parameters; got None")
        names: Names = MappedNames(parameters)
        dialect = ""
    else:
        found, settled, untold = find_module(shapes, dialect=parameters, config=config, haiku=False)
        dialect, names = found.dialect.name, DialectNames(found.dialect.name, found.root)
        config = config or _own_config(module, found.root)
        if config is None:
            config, assumed = _with_its_epsilon(module, attention_of(settled), untold)
        if config is not _own_config(module, found.root):
            config = replace(config, position_scale=1.0)  # these modules are called with frames that are scaled already
    copied = copy.deepcopy(module).eval()
    calls = [_Given(call, True), _Given(call, False)] if call is not None else list(_calls(copied, config, dialect))
    return Candidate(
        name, "torch", _runner(copied, calls), names, config, assumed, takes_mask=any(x.takes_mask for x in calls)
    )


def _own_config(module: nn.Module, root: str) -> IPAConfig | None:
    """The config of one of our own modules."""
    config = getattr(module.get_submodule(root), "config", None)
    return config if isinstance(config, IPAConfig) else None


def _with_its_epsilon(module: nn.Module, config: IPAConfig, untold: frozenset[str]) -> tuple[IPAConfig, str]:
    """The config with the module's own ε, and what is still assumed, in words."""
    from ipa_torch.replace.adapters import attribute_at
    from ipa_torch.replace.recognise import EPSILONS

    held = (attribute_at(module, path) for path in EPSILONS)
    epsilons = [float(x) for x in held if isinstance(x, int | float) and not isinstance(x, bool)]
    if "norm_epsilon" in untold and epsilons:
        config, untold = replace(config, norm_epsilon=epsilons[0]), untold - {"norm_epsilon"}
    return config, say_assumed(config, untold)


class _Given:
    """A call that the user gave, with a mask of numbers or of booleans."""

    takes_mask = True

    def __init__(self, call: Callable, numbers: bool) -> None:
        self.call, self.numbers = call, numbers

    def __call__(self, module: nn.Module, single: Tensor, *others: Any) -> Any:
        *inputs, mask = others
        return self.call(module, single, *inputs, mask.to(single.dtype) if self.numbers else mask)


class _ByRole:
    """A call by the names of the forward's arguments."""

    def __init__(
        self, arguments: Mapping[str, str], make: Callable[[Tensor, Tensor], Any] | None, transposed: bool
    ) -> None:
        self.arguments, self.make, self.transposed = arguments, make, transposed
        self.takes_mask = "residue mask" in arguments

    def __call__(
        self,
        module: nn.Module,
        single: Tensor,
        pair: Tensor | None,
        rotation: Tensor,
        translation: Tensor,
        mask: Tensor,
    ) -> Any:
        rotation = rotation.mT if self.transposed else rotation
        values: dict[str, Any] = {
            "single representation": single,
            "pair representation": pair,
            "residue mask": mask,
            "rotation": rotation,
            "translation": translation,
        }
        if self.make is not None:
            values["frames"] = self.make(rotation, translation)
        return module(**{name: values[kind] for kind, name in self.arguments.items()})


class _InFloat(_ByRole):
    """The same call with a mask of numbers."""

    def __call__(self, module: nn.Module, single: Tensor, *others: Any) -> Any:
        pair, rotation, translation, mask = others
        return super().__call__(module, single, pair, rotation, translation, mask.to(single.dtype))


class _BySystem:
    """A call as the module's system makes it, with a mask of numbers or of booleans."""

    def __init__(
        self,
        system: Any,
        takes: Sequence[Any],
        make: Callable[[Tensor, Tensor], Any],
        *,
        numbers: bool,
        adds_input: bool,
    ) -> None:
        self.system, self.takes, self.make, self.numbers = system, takes, make, numbers
        self.adds_input = adds_input  # and takes no mask
        self.takes_mask = not adds_input

    def __call__(self, module: nn.Module, single: Tensor, *others: Any) -> Any:
        pair, rotation, translation, mask = others
        mask = mask.to(single.dtype) if self.numbers else mask
        given = self.system.inputs(single, pair, rotation, translation, mask, self.make)
        named = {}
        for argument in self.takes:
            if argument.ours in given:
                named[argument.name] = given[argument.ours]
            elif argument.is_needed:
                named[argument.name] = next(iter(argument.neutral), None)
        out = module(**named)
        return out - single if self.adds_input else out


def _calls(module: nn.Module, config: IPAConfig, dialect: str) -> Iterator[Any]:
    """Calls that the module's forward may take, the likeliest first.

    Raises:
        ValueError: the arguments' names do not tell what they are.
    """
    from ipa_torch.replace.arguments import arguments_taken, role
    from ipa_torch.replace.systems import SYSTEMS

    system = SYSTEMS.get(dialect)
    if system is not None and system.method == "forward":
        takes = arguments_taken(system, type(module), pair_free=config.pair_channel is None)
        if not isinstance(takes, str):
            frames = next((x.name for x in takes if role(x.ours or x.name) == "frames"), "")
            for make in _makers(module, system, frames, config):
                for numbers in (True, False):
                    yield _BySystem(system, takes, make, numbers=numbers, adds_input=dialect == "abodybuilder2")
            return
    arguments = _arguments(module)
    kinds = _makers(module, system, arguments["frames"], config) if "frames" in arguments else [None]
    for kind in kinds:
        for form in (_InFloat, _ByRole):
            yield form(arguments, kind, dialect in TRANSPOSED)


def _makers(module: nn.Module, system: Any, argument: str, config: IPAConfig) -> list[Any]:
    """Functions that make the frames that a module may take."""
    from ipa_torch.replace.rigids import homogeneous, makers_of_rigids
    from ipa_torch.rigid import Rigid

    if system is not None and system.rigids is not None:
        return [partial(system.rigids, type(module))]
    arrays = config.layout == "multimer"
    made = makers_of_rigids(type(module), argument, (), arrays=arrays) if argument else ()
    return [*made, Rigid, lambda rotation, translation: (rotation, translation), homogeneous]


def _arguments(module: nn.Module) -> dict[str, str]:
    """The forward's arguments by their roles."""
    from ipa_torch.replace.arguments import ROLES, role

    parameters = [
        x
        for x in inspect.signature(module.forward).parameters.values()
        if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
    ]
    names = [x.name for x in parameters]
    taken: dict[str, str] = {}
    apart = {kind: [x for x in ARGUMENTS[kind] if x in names] for kind in ("rotation", "translation")}
    if all(apart.values()):
        taken = {kind: found[0] for kind, found in apart.items()}
    for title, known in ROLES.items():
        free = [x for x in names if x not in taken.values() and role(x) == title]
        first = next((x for x in known if x in free), None)
        if first is not None and title != "pair mask" and not (title == "frames" and "rotation" in taken):
            taken[title] = first
    strange = [x.name for x in parameters if x.default is x.empty and x.name not in taken.values()]
    frames = "frames" in taken or "rotation" in taken
    if strange or "single representation" not in taken or not frames:
        what = ", ".join(strange) or ("frames" if "single representation" in taken else "the single representation")
        raise ValueError(
            f"arguments with the usual names were expected, for {', '.join(x for x in ROLES if x != 'pair mask')}; "
            f"forward takes {', '.join(names)}, and {what} is not clear: pass call=, a function of (module, single, "
            "pair, rotation, translation, mask)"
        )
    return taken


def _runner(module: nn.Module, calls: list[Any]) -> Callable:
    """A function of parameters by name and inputs, which calls the module in the first way that does not raise."""
    import torch

    class Called(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, call: Any, inputs: tuple[Tensor | None, ...]) -> Any:
            return call(self.module, *inputs)

    called, ways = Called(), Ways(calls)

    def run(parameters: Mapping[str, Tensor], single: Tensor, *others: Tensor | None) -> Any:
        called.to(single.dtype)
        named = {f"module.{name}": x for name, x in parameters.items()}

        def attempt(call: Any, given: tuple[Tensor | None, ...]) -> Any:
            return torch.func.functional_call(called, named, (call, given))

        try:
            return ways.first(attempt, (single, *others))
        except Exception:
            if single.ndim == 2:
                raise
        each = [  # it takes one protein at a time
            ways.first(attempt, tuple(None if x is None else x[n] for x in (single, *others)))
            for n in range(len(single))
        ]
        if isinstance(each[0], Mapping):
            return {name: torch.stack([x[name] for x in each]) for name in each[0]}
        return torch.stack([x[0] if isinstance(x, tuple) else x for x in each])

    return run
