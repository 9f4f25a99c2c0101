"""Recognises attentions in a model by the names and shapes of their parameters, and checks if ours can replace them.

To support another system, see `ipa_torch.replace.systems`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ipa_bridge.config import IPAConfig
from ipa_bridge.weights.finding import Found, modules
from ipa_torch.replace.adapters import (
    Adapter,
    Argument,
    Settings,
    alteration,
    is_as_replaced,
    is_neutral,
    original_class,
    replaced_class,
)
from ipa_torch.replace.systems import SYSTEMS, System

_EPSILONS = ("eps", "config.epsilon")
"""Attributes in which a layer may hold its epsilon."""


@dataclass(frozen=True)
class Recognised:
    """An attention that can be replaced."""

    path: str
    title: str
    module: Any
    system: System
    settings: Settings
    infinity: float
    """Number that it subtracts from the logits of masked keys; 0 for a layer that overwrites them instead."""
    unused: tuple[str, ...] = ()
    """Parameters that neither its forward nor ours reads."""
    callers: tuple[type, ...] = ()
    """Classes of the modules that contain it, the innermost first."""

    @property
    def original(self) -> Any:
        """Its class, or its class before it was replaced."""
        return original_class(self.module)

    @property
    def replacement(self) -> Any:
        """The class of the replaced layer."""
        method = self.system.method
        return replaced_class(cast(Any, self.system.adapter), self.original, method)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its parameters."""
        return self.module.get_submodule(self.system.output).weight.dtype

    @property
    def where(self) -> str:
        """Its path for error messages."""
        return self.path or "the model itself"


def find_attentions(model: nn.Module) -> dict[str, Recognised | str]:
    """Attentions that can be replaced, by path, and for similar modules the reason why they cannot."""
    shapes = {name: tuple(x.shape) for name, x in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Recognised | str] = {}
    seen: set[int] = set()
    attentions = [candidate for candidate in modules(shapes, haiku=False) if candidate.kind is IPAConfig]
    attentions.sort(key=lambda candidate: not _holds_epsilon_as_its_system_does(candidate, model))
    for candidate in attentions:
        if isinstance(found.get(candidate.root), Recognised):
            continue
        module = model.get_submodule(candidate.root)
        if id(module) not in seen:
            layer = _recognise(candidate, module, shapes)
            if isinstance(layer, Recognised):
                layer = replace(layer, callers=_classes_around(model, candidate.root))
                found[candidate.root] = layer
            found.setdefault(candidate.root, layer)
            seen |= {id(module)} if isinstance(layer, Recognised) else set()
    # Endings of parameter names that only such attentions have.
    ends = re.compile(
        r"(?<![^.])(head_weights|point_weights|trained_point_weight|(linear_\w+_points|to_point_\w)(\.linear)?\.weight)$"
    )
    likely = {path for path, module in model.named_modules() if "pointattention" in type(module).__name__.lower()}
    likely |= {name.removesuffix(end[0]).removesuffix(".") for name in shapes if (end := ends.search(name))}
    for path in sorted(likely):
        if not any(_within(path, other) or _within(other, path) for other in found):
            found[path] = "its parameters do not have the names of any supported system"
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    return {path: found[path] for path in paths if path in found}


_MIN_INFINITY = 1e4
"""Smallest number that a layer may subtract from the logits of masked keys, so that their weights vanish as in ours."""


def _holds_epsilon_as_its_system_does(found: Found, model: nn.Module) -> bool:
    """True if a layer holds its epsilon where the system's class does: two systems have equal parameter names."""
    name = found.dialect.name
    return name in SYSTEMS and _attribute_at(model.get_submodule(found.root), SYSTEMS[name].epsilon) is not None


def _attribute_at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _classes_around(model: nn.Module, path: str) -> tuple[type, ...]:
    """Classes of the modules that contain the one at `path`, the innermost first."""
    steps = path.split(".") if path else []
    return tuple(type(model.get_submodule(".".join(steps[:n]))) for n in reversed(range(len(steps))))


def _within(inner: str, outer: str) -> bool:
    return not outer or f"{inner}.".startswith(f"{outer}.")


def _recognise(found: Found, module: Any, shapes: dict[str, tuple[int, ...]]) -> Recognised | str:
    """A layer that can be replaced, or the reason why it cannot."""
    title = found.dialect.title
    if found.dialect.name not in SYSTEMS:
        return "it is this project's own attention"
    system, names = SYSTEMS[found.dialect.name], found.names(shapes)
    names = {name: key for name, key in names.items() if name.partition(".")[0] not in found.dialect.beside}
    try:
        config = cast(IPAConfig, found.infer(shapes))
        expected = {theirs: transform.their_shape for theirs, transform in found.dialect.names(config).values()}
    except ValueError as error:
        return f"its parameters are not {title}'s: {error}"
    without_effect = found.dialect.unused.get(found.kind, {})
    unused = {name: shape for name, shape in without_effect.items() if name in names and name not in expected}
    expected |= unused
    strange = {name for name in expected if name in names and shapes[names[name]] != expected[name]}
    strange |= set(expected) ^ set(names)
    if strange:
        names_of_strange = ", ".join(sorted(strange))
        return f"its parameters are not {title}'s: missing, unexpected or of another shape are {names_of_strange}"
    if config.pair_channel is None and all(form.pair_required for form in found.dialect.forms.values()):
        return f"it has no {system.bias}, and {title}'s attention without a pair is not supported"
    if isinstance(module, Adapter) and not is_as_replaced(module):
        return f"its class was changed to {type(module).__name__} after it was replaced"
    if not hasattr(original_class(module), system.method):
        return f"it has no {system.method}, the method that computes {title}'s attention"
    replaced = [path for path, x in module.named_modules() if "forward" in vars(x)]
    if replaced:
        where = replaced[0] or "the layer"
        return f"{where} has a forward set on the object, as hooks that move layers between devices do"
    takes = _arguments_taken(system, original_class(module))
    if isinstance(takes, str):
        return takes
    for name, neutral in system.neutral_attributes.items():
        if not is_neutral(value := getattr(module, name, neutral), neutral):
            return f"its {name} is {value}, and only at {neutral} does it compute what ours does"
    with_parameters = {name.rpartition(".")[0] for name in expected} - {""}
    untouched = _untouched_submodules(module, system, with_parameters, unused, found.dialect.beside)
    for path, kind in untouched:
        if problem := alteration(module.get_submodule(path), kind):
            return f"its {path} {problem}, which would have no effect: ours does not call it as the layer does"
    infinity = getattr(module, "inf", getattr(getattr(module, "config", None), "inf", 0))
    if not isinstance(infinity, float | int) or 0 < infinity < _MIN_INFINITY:
        return f"it subtracts only {infinity} from the logits of masked keys; at least {_MIN_INFINITY:g} is needed"
    form = found.dialect.forms[config.layout]
    if not system.epsilon:
        settings = Settings(config, takes, untouched=untouched, points=system.points, dialect=found.dialect.name)
        return Recognised(found.root, title, module, system, settings, infinity, tuple(sorted(unused)))
    epsilons = {float(x) for x in (_attribute_at(module, path) for path in _EPSILONS) if isinstance(x, float | int)}
    epsilons = {form.norm_epsilon} if form.epsilon_is_fixed else epsilons
    if len(epsilons) != 1:
        return f"it has {len(epsilons) or 'no'} epsilons in .eps and .config.epsilon; one is needed"
    try:
        ours = replace(config, norm_epsilon=epsilons.pop())
    except ValueError as error:
        return str(error)
    settings = Settings(ours, takes, untouched=untouched, points=system.points, dialect=found.dialect.name)
    return Recognised(found.root, title, module, system, settings, infinity, tuple(sorted(unused)))


def _arguments_taken(system: System, original: Any) -> tuple[Argument, ...] | str:
    """The arguments of a layer's own forward, or the reason why they are not those of its system."""
    parameters = list(inspect.signature(getattr(original, system.method)).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    harmless = (*system.optional, *system.flags, *system.neutral_arguments)
    plain = all(x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY) for x in parameters)
    if not plain or set(names) - set(harmless) != set(system.takes):
        optional = f", optionally with {', '.join(harmless)}" if harmless else ""
        return f"its {system.method} takes {', '.join(names)}, and not {', '.join(system.takes)}{optional}"
    neutral = {name: (value,) for name, value in system.neutral_arguments.items()}
    return tuple(Argument(x.name, x.default, x.kind is x.KEYWORD_ONLY, neutral.get(x.name, ())) for x in parameters)


def _untouched_submodules(
    module: nn.Module, system: System, with_parameters: set[str], unused: Iterable[str], beside: Iterable[str]
) -> tuple[tuple[str, type], ...]:
    """Submodules that ours does not call as the layer does, except those that the layer does not call either.

    If our attention computes a method, the layer's own forward still calls the other submodules.
    """
    differently = (system.bias, system.pair_values) if system.calls_projections else tuple(with_parameters)
    called = {*beside, system.dropout, *(with_parameters - set(differently) - set(system.uncalled))}
    if system.method != "forward":
        called |= {path for path, _ in module.named_modules() if path not in with_parameters}
    ignored = {name.rpartition(".")[0] for name in unused}
    return tuple(
        (path, nn.Linear if path in differently and not isinstance(x, nn.Linear) else type(x))
        for path, x in module.named_modules()
        if path and not any(_within(path, other) for other in (called | ignored) - {""})
    )
