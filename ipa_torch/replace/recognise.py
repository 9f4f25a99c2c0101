"""Recognises attentions in a model by the names and shapes of their parameters, and checks if ours can replace them.

To support another system, see `ipa_torch.replace.systems`.
"""

from __future__ import annotations

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
    attribute_at,
    is_as_replaced,
    is_neutral,
    original_class,
    replaced_class,
)
from ipa_torch.replace.arguments import arguments_taken
from ipa_torch.replace.pair_masks import FORMS, PAIR_MASK
from ipa_torch.replace.systems import SYSTEMS, System

EPSILONS = (
    *("eps", "config.epsilon", "epsilon", "_eps", "config.eps", "norm_eps", "ipa_eps"),
    *("cfg.eps", "cfg.epsilon", "conf.eps", "conf.epsilon", "_ipa_conf.eps", "_ipa_conf.epsilon", "ipa_conf.eps"),
)
"""Attributes in which a layer may hold its epsilon."""

USUAL_EPSILONS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-12, 1e-10, 1e-4, 1e-3)
"""Epsilons to compare a layer with that holds none."""

DROPOUTS = ("dropout", "dropout_prob", "dropout_p", "dropout_rate", "attn_dropout", "attention_dropout", "p_dropout")
"""Attributes in which a layer may hold a probability of dropout."""


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
    unknown: tuple[str, ...] = ()
    """Parameters that its system does not have. The comparison finds if its forward reads them."""
    epsilons: tuple[float, ...] = ()
    """Epsilons that it may have; the comparison finds which it has."""
    pair_masks: tuple[str, ...] = ()
    """Forms that its pair mask may have; the comparison finds which it has."""
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


def find_attentions(model: nn.Module, *, verify: bool) -> dict[str, Recognised | str]:
    """Attentions that can be replaced, by path, and for similar modules the reason why they cannot.

    Args:
        model: any module.
        verify: True if each attention will be compared with its original, which finds what names and shapes leave open.
    """
    shapes = {name: tuple(x.shape) for name, x in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Recognised | str] = {}
    seen: set[int] = set()
    attentions = [candidate for candidate in modules(shapes, haiku=False) if candidate.kind is IPAConfig]
    attentions.sort(key=lambda candidate: not _holds_epsilon_as_its_system_does(candidate, model))
    for candidate in attentions:
        module, before = model.get_submodule(candidate.root), found.get(candidate.root)
        if id(module) not in seen or (isinstance(before, Recognised) and before.unknown):
            layer = _recognise(candidate, module, shapes, verify=verify)
            found.setdefault(candidate.root, layer)
            if isinstance(layer, Recognised) and not (
                isinstance(before, Recognised) and len(layer.unknown) >= len(before.unknown)
            ):
                found[candidate.root] = replace(layer, callers=_classes_around(model, candidate.root))
                seen.add(id(module))
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
    return name in SYSTEMS and attribute_at(model.get_submodule(found.root), SYSTEMS[name].epsilon) is not None


def _classes_around(model: nn.Module, path: str) -> tuple[type, ...]:
    """Classes of the modules that contain the one at `path`, the innermost first."""
    steps = path.split(".") if path else []
    return tuple(type(model.get_submodule(".".join(steps[:n]))) for n in reversed(range(len(steps))))


def _within(inner: str, outer: str) -> bool:
    return not outer or f"{inner}.".startswith(f"{outer}.")


def _recognise(found: Found, module: Any, shapes: dict[str, tuple[int, ...]], *, verify: bool) -> Recognised | str:
    """A layer that can be replaced, or the reason why it cannot."""
    title = found.dialect.title
    if found.dialect.name not in SYSTEMS:
        own = found.dialect.name in ("alphafold", "ipa_jax", "ipa_torch")
        return (
            "it is this project's own attention" if own else f"{title} has no adapter: see ipa_torch.register_adapter"
        )
    system = SYSTEMS[found.dialect.name]
    parameters = _parameters(found, system, shapes, verify=verify)
    if isinstance(parameters, str):
        return parameters
    config, expected, unused, unknown = parameters
    if problem := _alteration(module, system, title):
        return problem
    takes = arguments_taken(system, original_class(module), pair_free=config.pair_channel is None)
    if isinstance(takes, str):
        return takes
    for name, neutral in system.neutral_attributes.items():
        if not is_neutral(value := getattr(module, name, neutral), neutral):
            return f"its {name} is {value}, and only at {neutral} does it compute what ours does"
    owners = {name.rpartition(".")[0] for name in (*expected, *unused)} - {""}
    untouched = _untouched_submodules(module, system, owners, [*unused, *unknown], found.dialect.beside)
    for path, kind in untouched:
        if problem := alteration(module.get_submodule(path), kind):
            return f"its {path} {problem}, which would have no effect: ours does not call it as the layer does"
    infinity = getattr(module, "inf", getattr(getattr(module, "config", None), "inf", 0))
    if not isinstance(infinity, float | int) or 0 < infinity < _MIN_INFINITY:
        return f"it subtracts only {infinity} from the logits of masked keys; at least {_MIN_INFINITY:g} is needed"
    form = found.dialect.forms[config.layout]
    is_told = form.epsilon_is_fixed or not system.epsilon
    epsilons, forms = (config.norm_epsilon,) if is_told else _epsilons(module), _pair_mask_forms(system, takes)
    if len(epsilons) != 1 and not verify:
        return (
            f"it has {len(epsilons) or 'no'} epsilons in .eps, .config.epsilon or the like: pass verify=True, to find "
            "the one that fits its outputs"
        )
    if len(forms) > 1 and not verify and any(x.is_needed for x in takes if PAIR_MASK in (x.ours, x.name)):
        return "the form of its pair mask is unknown: pass verify=True, to find the one that fits its outputs"
    epsilons = epsilons or USUAL_EPSILONS
    try:
        ours = replace(config, norm_epsilon=epsilons[0])
    except ValueError as error:
        return str(error)
    settings = Settings(
        ours,
        takes,
        untouched=untouched,
        points=system.points,
        pair_mask=forms[0] if len(forms) == 1 else "",
        dropouts=_dropouts(module, system),
        dialect=found.dialect.name,
    )
    return Recognised(
        *(found.root, title, module, system, settings, infinity),
        unused=unused,
        unknown=unknown,
        epsilons=epsilons,
        pair_masks=forms,
    )


def _alteration(module: Any, system: System, title: str) -> str:
    """Reason why a layer is not of a class with the attention; empty if it is."""
    if isinstance(module, Adapter) and not is_as_replaced(module):
        return f"its class was changed to {type(module).__name__} after it was replaced"
    if not hasattr(original_class(module), system.method):
        return f"it has no {system.method}, the method that computes {title}'s attention"
    replaced = [path for path, x in module.named_modules() if "forward" in vars(x)]
    if replaced:
        where = replaced[0] or "the layer"
        return f"{where} has a forward set on the object, as hooks that move layers between devices do"
    return ""


def _parameters(
    found: Found, system: System, shapes: dict[str, tuple[int, ...]], *, verify: bool
) -> tuple[IPAConfig, tuple[str, ...], tuple[str, ...], tuple[str, ...]] | str:
    """The config, and names of parameters: read ones, known ones that are not, and unknown ones; or what is wrong."""
    title = found.dialect.title
    names = {x: key for x, key in found.names(shapes).items() if x.partition(".")[0] not in found.dialect.beside}
    try:
        config = cast(IPAConfig, found.infer(shapes))
        expected = {theirs: transform.their_shape for theirs, transform in found.dialect.names(config).values()}
    except ValueError as error:
        return f"its parameters are not {title}'s: {error}"
    without_effect = found.dialect.unused.get(found.kind, {})
    unused = {x for x, shape in without_effect.items() if x not in expected and shapes.get(names.get(x, "")) == shape}
    unknown = sorted(set(names) - set(expected) - unused)
    misfits = sorted(name for name, shape in expected.items() if name not in names or shapes[names[name]] != shape)
    if misfits:
        return f"its parameters are not {title}'s: missing or of another shape are {', '.join(misfits)}"
    if unknown and not verify:
        return (
            f"{title}'s attention has no {', '.join(unknown)} of this shape: pass verify=True, to replace the layer if "
            "its forward does not read what ours does not"
        )
    if config.pair_channel is None and all(form.pair_required for form in found.dialect.forms.values()):
        return f"it has no {system.bias}, and {title}'s attention without a pair is not supported"
    return config, tuple(expected), tuple(sorted(unused)), tuple(unknown)


def _pair_mask_forms(system: System, takes: Iterable[Argument]) -> tuple[str, ...]:
    """Forms that a layer's pair mask may have; none if it takes no pair mask that ours can take."""
    name = next((x.name for x in takes if PAIR_MASK in (x.ours, x.name)), None)
    if name is None or system.pair_masks is None:
        return ()
    known = system.pair_masks.get(name)
    return FORMS if known is None else (known,)


def _dropouts(module: nn.Module, system: System) -> tuple[str, ...]:
    """Paths of probabilities of dropout, except what the layer's own forward or its adapter calls."""
    if system.method != "forward":
        return ()
    own = tuple(name for name in DROPOUTS if isinstance(getattr(module, name, None), float | int))
    return own + tuple(
        f"{path}.p"
        for path, x in module.named_modules()
        if path not in ("", system.dropout) and isinstance(x, nn.Dropout)
    )


def _epsilons(module: Any) -> tuple[float, ...]:
    """Epsilons that a layer holds."""
    held = [attribute_at(module, path) for path in EPSILONS]
    return tuple(dict.fromkeys(float(x) for x in held if isinstance(x, float | int) and not isinstance(x, bool)))


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
