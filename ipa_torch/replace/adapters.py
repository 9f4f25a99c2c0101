"""Adapters: the class of a replaced layer is a subclass of its own class with our forward."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipa_bridge.config import Implementation, IPAConfig
from ipa_torch.attention import point_attention
from ipa_torch.dtypes import at_least_float32, without_autocast
from ipa_torch.invariant_point_attention import (
    Projections,
    centre,
    features,
    lengths,
    unpack_monomer,
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


class Adapter(nn.Module):
    """Base class of adapters. The class of a replaced layer inherits from an adapter and from the layer's own class.

    Attribute names start with `_ipa_twins`, so that they hide no attribute of a layer. Pickles refer to the subclasses,
    `Settings`, `Argument` and `empty_layer` by their names in this module: they must stay importable from it.
    """

    _ipa_twins: Settings
    _ipa_twins_classes: tuple[Any, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles refer to the two base classes, because the combined class cannot be imported."""
        reduced = cast(tuple, super().__reduce_ex__(protocol))
        if not is_as_replaced(self):  # its class was changed since
            return reduced
        return empty_layer, self._ipa_twins_classes, *reduced[2:]


class OpenFoldAdapter(Adapter):
    """Adapter of layers of OpenFold, ESMFold, FrameDiff and related systems, called with their own rigids."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The update of the single representation. `z` may be the only entry of `_z_reference_list` instead."""
        given = _bind_arguments(self, arguments, named)
        pairs = given.get("_z_reference_list")
        z = pairs[0] if given["z"] is None and pairs and len(pairs) == 1 else given["z"]
        return _update(self, given["s"], z, given["r"], given["mask"])


def _update(layer: Any, s: Tensor, z: Tensor | None, r: Any, mask: Tensor | None) -> Tensor:
    """The forward of `OpenFoldAdapter`. Frames, mask and pair may have fewer batch axes than s."""
    settings: Settings = layer._ipa_twins
    _check_untouched(layer)
    if z is None:
        raise ValueError("a pair representation was expected, as z or as the entry of _z_reference_list; got None")
    rotation, translation = _rotation_and_translation(r)
    batch = s.shape[:-1]
    rigids = Rigid(rotation.expand(*batch, 3, 3), translation.expand(*batch, 3))
    z, mask = z.expand(*batch, *z.shape[-2:]), None if mask is None else mask.expand(batch)
    projections, rigids = _place_points(_openfold_projections(layer, settings, s), z, rigids, mask)
    o, o_points, o_pair = _attend(settings, projections, z, mask, layer.linear_b, layer.head_weights)
    if settings.config.pair_value_channel is not None:  # linear, and weights sum to 1: may follow the sum
        o_pair = layer.down_z(o_pair.to(z.dtype)).to(o_pair.dtype)
    read = features(settings.config, o, rigids.apply_inverse(o_points), o_pair)
    return layer.linear_out(read.to(z.dtype))


class LucidrainsAdapter(Adapter):
    """Adapter of the package `invariant-point-attention`: row-vector frames; masked queries weight all keys equally."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The update of the single representation."""
        layer, settings = cast(Any, self), self._ipa_twins
        _check_untouched(layer)
        given = _bind_arguments(self, arguments, named)
        x, mask = given["single_repr"], given["mask"]
        pair = None if settings.config.pair_channel is None else given["pairwise_repr"]
        if settings.config.pair_channel is not None and pair is None:
            raise ValueError("a pair representation was expected as the second argument; got None")
        h = settings.config.num_head
        scalars = (to(x).unflatten(-1, (h, -1)) for to in (layer.to_scalar_q, layer.to_scalar_k, layer.to_scalar_v))
        points = (_project_points(to, settings, x) for to in (layer.to_point_q, layer.to_point_k, layer.to_point_v))
        local = (*scalars, *(y.unflatten(-1, (h, -1, 3)) for y in points))
        frames = Rigid(given["rotations"].transpose(-1, -2), given["translations"])
        projections, rigids = _place_points(cast(Projections, local), pair, frames, mask)
        linear = None if pair is None else layer.to_pairwise_attn_bias[0]
        o, o_points, o_pair = _attend(settings, projections, pair, mask, linear, layer.point_weights)
        if mask is not None:
            _, _, v, _, _, v_points = projections
            valid = mask.bool()[..., None, None]
            o = torch.where(valid, o, v.mean(-3, keepdim=True))
            o_points = torch.where(valid[..., None], o_points, v_points.mean(-4, keepdim=True))
            if pair is not None:
                o_pair = torch.where(valid, o_pair, pair.mean(-2, dtype=o.dtype)[..., None, :])
        o_points = rigids.apply_inverse(o_points)
        parts = [o, o_points.flatten(-2), lengths(settings.config, o_points), *(() if o_pair is None else (o_pair,))]
        return layer.to_out(torch.cat([part.flatten(-2) for part in parts], -1).to(x.dtype))


@cache
def replaced_class(adapter: Any, original: Any) -> Any:
    """The class of a replaced layer."""

    @wraps(original.forward)
    def forward(self: Any, *arguments: Any, **named: Any) -> Tensor:
        return adapter.forward(self, *arguments, **named)

    namespace = {"__doc__": adapter.__doc__, "_ipa_twins_classes": (adapter, original), "forward": forward}
    return type(f"IPATwins{original.__name__}", (adapter, original), namespace)


def empty_layer(adapter: Any, original: Any) -> Any:
    """A replaced layer without attributes, which copies and pickles then fill."""
    return object.__new__(replaced_class(adapter, original))


def original_class(attention: Any) -> Any:
    """The class of a layer before it was replaced, or its class if it was not."""
    return attention._ipa_twins_classes[1] if isinstance(attention, Adapter) else type(attention)


def is_as_replaced(attention: Adapter) -> bool:
    """True unless the class of a replaced layer was changed since."""
    return type(attention) is replaced_class(*attention._ipa_twins_classes)


def _openfold_projections(layer: Any, settings: Settings, s: Tensor) -> Projections:
    config = settings.config
    if config.layout == "monomer":
        points = [_project_points(x, settings, s) for x in (layer.linear_q_points, layer.linear_kv_points)]
        return unpack_monomer(config, layer.linear_q(s), layer.linear_kv(s), *points)
    h = config.num_head
    q, k, v = (x(s).unflatten(-1, (h, -1)) for x in (layer.linear_q, layer.linear_k, layer.linear_v))
    q_points, k_points, v_points = (
        _project_points(x, settings, s).unflatten(-1, (h, 3, -1)).transpose(-1, -2)
        for x in (layer.linear_q_points, layer.linear_k_points, layer.linear_v_points)
    )
    return q, k, v, q_points, k_points, v_points


def _bind_arguments(layer: Adapter, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call, by their names in the layer's own forward.

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
            if argument.default is inspect.Parameter.empty:
                raise TypeError(f"{name} is missing")
            given[name] = argument.default
        if argument.neutral and not is_neutral(given[name], argument.neutral[0]):
            raise ValueError(
                f"{name}={argument.neutral[0]} was expected, since our attention has no such argument; got a "
                f"{type(given[name]).__name__}: call restore_ipa to use it"
            )
    return given


def is_neutral(value: Any, neutral: Any) -> bool:
    """True if the value is the neutral one, at which the argument or attribute has no effect."""
    return value is neutral or (isinstance(value, bool | int | float | str) and value == neutral)


def _check_untouched(layer: Any) -> None:
    """Raises if a submodule that is not called as before was exchanged, or has hooks that only its call would run."""
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


def _project_points(projection: Any, settings: Settings, s: Tensor) -> Tensor:
    """Projects to local points without autocast.

    In OpenFold 2 the linear layer is inside a module that also moves the points to the global frame.
    """
    linear = getattr(projection, settings.points) if settings.points else projection
    with without_autocast(s.device.type):
        return linear(s.to(linear.weight.dtype) if hasattr(linear, "weight") else s)


def _rotation_and_translation(r: Any) -> tuple[Tensor, Tensor]:
    """Rotation matrices and translations of OpenFold's `Rigid`, its multimer's `Rigid3Array` or similar classes."""
    if hasattr(r, "get_rots"):
        rotations = r.get_rots()  # tFold returns the matrices themselves
        return rotations if isinstance(rotations, Tensor) else rotations.get_rot_mats(), r.get_trans()
    return tuple(x if isinstance(x, Tensor) else x.to_tensor() for x in (r.rotation, r.translation))  # type: ignore[return-value]


def _place_points(
    projections: Projections, pair: Tensor | None, rigids: Rigid, mask: Tensor | None
) -> tuple[Projections, Rigid]:
    """Projections with their points in the global frame, and centred rigids, all in one dtype of at least float32."""
    dtype = at_least_float32(*(x.dtype for x in (*projections, *rigids, pair) if x is not None))
    rigids = centre(rigids.astype(dtype), mask)
    q, k, v, *points = (x.to(dtype) for x in projections)
    q_points, k_points, v_points = (rigids.apply(x) for x in points)
    return (q, k, v, q_points, k_points, v_points), rigids


def _attend(
    settings: Settings,
    projections: Projections,
    pair: Tensor | None,
    mask: Tensor | None,
    linear: nn.Linear | None,
    gamma: Tensor,
) -> tuple[Any, ...]:
    """Lines 4 and 7–10 of Alg. 22."""
    point_weights = F.softplus(gamma.to(at_least_float32(gamma.dtype)))
    return point_attention(
        *projections,
        pair,
        pair_bias_weight=None if linear is None else weight_without_bias(linear),
        point_weights=point_weights,
        mask=mask,
        implementation=settings.implementation,
    )
