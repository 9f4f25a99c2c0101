"""Adapters: the class of a replaced layer is a subclass of its own class with our forward."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ipa_bridge.config import Implementation, IPAConfig
from ipa_torch.attention import point_attention
from ipa_torch.dtypes import at_least_float32, without_autocast
from ipa_torch.invariant_point_attention import (
    Projections,
    centre,
    point_weights,
    weight_without_bias,
)
from ipa_torch.rigid import Rigid


class Argument(NamedTuple):
    """An argument that a layer's own forward takes."""

    name: str
    default: Any
    """`inspect.Parameter.empty` if there is none."""
    by_name_only: bool
    neutral: tuple[Any, ...] = ()
    """Holds the only value allowed; empty if any value is."""
    ours: str = ""
    """Its name in the system's own class; empty if it is the same or there is none."""

    @property
    def is_needed(self) -> bool:
        """True if it has no default."""
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True)
class Settings:
    """Config, arguments and implementation of a replaced layer."""

    config: IPAConfig
    takes: tuple[Argument, ...]
    implementation: Implementation | None = None
    untouched: tuple[tuple[str, type], ...] = ()
    """Paths and classes of submodules that our attention does not call as the layer did. They must not change."""
    points: str = ""
    """Path of the linear layer within a point projection; empty if the projection is that layer."""
    dialect: str = ""
    """The dialect that the layer was recognised by."""
    pair_mask: str = ""
    """Form of its pair mask, one of `ipa_torch.replace.pair_masks.FORMS`; empty if it has none that ours can take."""
    keys_only: bool = False
    """True if its residue mask hides keys from masked residues too."""
    dropouts: tuple[str, ...] = ()
    """Paths of probabilities of dropout, which must be 0 in training."""


class Adapter(nn.Module):
    """Base class of adapters. The class of a replaced layer inherits from an adapter and from the layer's own class.

    Attribute names start with `_ipa_twins`, so that they hide no attribute of a layer. Pickles refer to the subclasses,
    `Settings`, `Argument` and `empty_layer` by their names in this module: they must stay importable from it.
    """

    _ipa_twins: Settings
    _ipa_twins_classes: tuple[Any, ...]
    """Arguments of `replaced_class`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles refer to the base classes, because the combined class cannot be imported."""
        reduced = cast(tuple, super().__reduce_ex__(protocol))
        if not is_as_replaced(self):  # its class was changed since
            return reduced
        return empty_layer, self._ipa_twins_classes, *reduced[2:]


def replaced_class(adapter: Any, original: Any, method: str = "forward") -> Any:
    """The class of a replaced layer, in which the adapter computes `method`."""
    return _replaced_class(adapter, original, method)


@cache
def _replaced_class(adapter: Any, original: Any, method: str) -> Any:

    @wraps(getattr(original, method))
    def computed(self: Any, *arguments: Any, **named: Any) -> Tensor:
        return adapter.forward(self, *arguments, **named)

    classes = (adapter, original) if method == "forward" else (adapter, original, method)
    namespace = {"__doc__": adapter.__doc__, "_ipa_twins_classes": classes, "forward": original.forward}
    return type(f"IPATwins{original.__name__}", (adapter, original), namespace | {method: computed})


def empty_layer(adapter: Any, original: Any, method: str = "forward") -> Any:
    """A replaced layer without attributes, which copies and pickles then fill."""
    return object.__new__(replaced_class(adapter, original, method))


def original_class(attention: Any) -> Any:
    """The class of a layer before it was replaced, or its class if it was not."""
    return attention._ipa_twins_classes[1] if isinstance(attention, Adapter) else type(attention)


def is_as_replaced(attention: Adapter) -> bool:
    """True unless the class of a replaced layer was changed since."""
    return type(attention) is replaced_class(*attention._ipa_twins_classes)


def bind_arguments(layer: Adapter, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call, by their names in the system's own class.

    Raises:
        TypeError: the layer's own forward would not accept them.
        ValueError: an argument that our attention does not have is not at its neutral value.
    """
    takes = layer._ipa_twins.takes
    in_order = [argument for argument in takes if not argument.by_name_only]
    if len(arguments) > len(in_order):
        raise TypeError(f"at most {len(in_order)} arguments by position were expected; got {len(arguments)}")
    given = {argument.name: value for argument, value in zip(in_order, arguments, strict=False)}
    for name in named:
        if name in given or all(name != argument.name for argument in takes):
            raise TypeError(f"{name} was {'given twice' if name in given else 'not expected'}")
    given.update(named)
    for argument in takes:
        name = argument.name
        if name not in given:
            if argument.is_needed:
                raise TypeError(f"{name} is missing")
            given[name] = argument.default
        if argument.neutral and not is_neutral(given[name], argument.neutral[0]):
            raise ValueError(
                f"{name}={argument.neutral[0]} was expected, since our attention has no such argument; got a "
                f"{type(given[name]).__name__}: call restore_ipa to use it"
            )
    return {argument.ours or argument.name: given[argument.name] for argument in takes}


def is_neutral(value: Any, neutral: Any) -> bool:
    """True if the value is the neutral one, at which the argument or attribute has no effect."""
    return value is neutral or (isinstance(value, bool | int | float | str) and value == neutral)


def check_untouched(layer: Any) -> None:
    """Raises if a submodule that is not called as before was changed, or if the layer would drop attention weights.

    A change is another class, or a hook that only the submodule's call would run.
    """
    for path in layer._ipa_twins.dropouts if layer.training else ():
        if probability := attribute_at(layer, path):
            raise NotImplementedError(
                f"{path} is {probability}, and our attention has no dropout: set it to 0, call eval(), or call "
                "restore_ipa to train with it"
            )
    for path, kind in layer._ipa_twins.untouched:
        if problem := alteration(layer.get_submodule(path), kind):
            raise NotImplementedError(
                f"{path} {problem}, which would have no effect: our attention does not call it as the layer did; call "
                "restore_ipa before you change it"
            )


def alteration(module: Any, kind: type[Any]) -> str:
    """Reason why a module's call differs from its class's forward; empty if it does not."""
    if module.__class__ is not kind:
        return f"is a {type(module).__name__} where a {kind.__name__} was"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks"
    return "has a forward set on the object" if "forward" in vars(module) else ""


def project_points(projection: Any, settings: Settings, s: Tensor) -> Tensor:
    """Projects to local points without autocast.

    In OpenFold 2 the linear layer is inside a module that also moves the points to the global frame.
    """
    linear = getattr(projection, settings.points) if settings.points else projection
    with without_autocast(s.device.type):
        return linear(s.to(linear.weight.dtype) if hasattr(linear, "weight") else s)


def attribute_at(module: Any, path: str) -> Any:
    """The attribute at a path with dots; None if there is none."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def place_points(
    projections: Projections, pair: Tensor | None, rigids: Rigid, mask: Tensor | None
) -> tuple[Projections, Rigid]:
    """Projections with their points in the global frame, and centred rigids, all in one dtype of at least float32."""
    dtype = at_least_float32(*(x.dtype for x in (*projections, *rigids, pair) if x is not None))
    rigids = centre(rigids.astype(dtype), mask)
    q, k, v, *points = (x.to(dtype) for x in projections)
    q_points, k_points, v_points = (rigids.apply(x) for x in points)
    return (q, k, v, q_points, k_points, v_points), rigids


def attend(
    settings: Settings,
    projections: Projections,
    pair: Tensor | None,
    mask: Tensor | None,
    linear: nn.Linear | None,
    gamma: Tensor,
    *,
    key_mask: Tensor | None = None,
    pair_mask: Tensor | None = None,
    added: Tensor | None = None,
    return_attention: bool = False,
) -> tuple[Any, ...]:
    """Lines 4 and 7–10; `linear` projects the pair to one bias per head, and `added` (*B, N, N) is added to all logits.

    Numbers to add become one more channel of the pair, which copies it.
    """
    config = settings.config
    options: dict[str, Any] = {"mask": mask, "key_mask": key_mask, "pair_mask": pair_mask}
    options["return_attention"] = return_attention
    weight = None if linear is None else weight_without_bias(linear)
    if added is not None:
        scale = added.new_full((1, config.num_head), config.num_logit_terms**0.5)
        shown = added[..., None]
        if pair is not None:
            of_pair = scale.new_zeros(pair.shape[-1], config.num_head) if weight is None else weight
            scale, shown = torch.cat([of_pair, scale]), torch.cat([pair, shown], -1)
        o, o_points, o_pair, *attention = _attend(settings, projections, shown, scale, gamma, **options)
        return o, o_points, None if pair is None else o_pair[..., :-1], *attention
    return _attend(settings, projections, pair, weight, gamma, **options)


def _attend(
    settings: Settings,
    projections: Projections,
    pair: Tensor | None,
    weight: Tensor | None,
    gamma: Tensor,
    **options: Any,
) -> tuple[Any, ...]:
    config = settings.config
    return point_attention(
        *projections,
        pair,
        pair_bias_weight=weight,
        point_weights=point_weights(config, gamma),
        logit_terms=config.num_logit_terms,
        distance_form=config.distance_form,
        distance_epsilon=config.distance_epsilon,
        implementation=settings.implementation,
        **options,
    )


def __getattr__(name: str) -> Any:
    """The adapters that were in this module in version 0.1.0, for pickles of replaced layers."""
    if name in ("OpenFoldAdapter", "LucidrainsAdapter"):
        systems = importlib.import_module("ipa_torch.replace.systems")
        return getattr(systems, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
