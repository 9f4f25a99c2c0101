"""Our attention inside other people's PyTorch models: their layers, parameters and calls, computed as ours is.

A layer stays the object that it is, with its parameters, buffers and hooks; only its class becomes a subclass of its
own whose `forward` is ours. Nothing of another package is imported: layers are known by the names and shapes of their
parameters.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, wraps
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipa_bridge.config import Implementation, IPAConfig, NormForm
from ipa_bridge.dialects import Found, modules
from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.replacement import RESIDUES, ReplacedLayer, ReplacementReport
from ipa_bridge.tolerance import DTYPES, bound
from ipa_torch.attention import choose_implementation, point_attention
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

LEAST_INFINITY = 1e4
"""What a layer that hides masked keys by subtracting a number must subtract at least: ours hides them altogether."""


def replace_ipa(
    model: nn.Module, *, implementation: Implementation | None = None, verify: bool = True
) -> ReplacementReport:
    """Lets every invariant point attention in a model compute as ours does.

    Layers of OpenFold 1 and 2 (monomer and multimer), ESMFold, FrameDiff and its family, and the package
    `invariant-point-attention` are known by their parameters. Each keeps its call, its conventions and its
    parameters, the same tensors: optimisers, hooks, `state_dict()`, device and dtype are as before, and a checkpoint
    saved after is one saved before. `restore_ipa` undoes it. Replacing again changes the implementation.

    Hooks on the layer, forward and backward, on its projections and on any parameter's tensor are called as before.
    What our attention does not call as the layer did cannot have any, nor give way to another module: the pair's bias
    (only its weight is read), `down_z` (called on the sum over the pair), `softmax` and its like. The call raises then.
    Arguments beyond single, pair, frames and mask must have the values at which they change nothing, else the call
    raises. Epsilon is what it is at the swap. Second derivatives and forward mode want `implementation="reference"`.

    Args:
        model: any module, an attention itself too.
        implementation: of the attention, see `point_attention`.
        verify: compare each layer with what it was, outputs and gradients, on random input, in its dtype and on its
            device. Its output projection is another one there, so that neither a zero nor a large bias hides anything.
            The reference is the layer in float64, or in float32 where it cannot run in that.

    Returns:
        What was replaced and how far before and after are apart, and what looked like an attention and was left alone.

    Raises:
        ValueError: there is no layer to replace, or one computes something else than it did or cannot be compared; the
            model is untouched then.
    """
    choose_implementation(implementation, RESIDUES)
    found = _find(model)
    left_alone = {path: reason for path, reason in found.items() if isinstance(reason, str)}
    layers = [
        replace(layer, settings=replace(layer.settings, implementation=implementation))
        for layer in found.values()
        if isinstance(layer, _Layer)
    ]
    if not layers:
        reasons = "".join(f"\n  {path or 'the model itself'}: {reason}" for path, reason in left_alone.items())
        raise ValueError(
            f"an invariant point attention of OpenFold, ESMFold, FrameDiff or invariant-point-attention was expected "
            f"somewhere in this {type(model).__name__}; there is none" + (f" but these:{reasons}" if reasons else "")
        )
    classes = [layer.adapted for layer in layers]
    verified = [_verify(layer) if verify else (layer, None) for layer in layers]
    layers, errors = [layer for layer, _ in verified], [error for _, error in verified]
    for layer, adapted in zip(layers, classes, strict=True):
        layer.module.__class__ = adapted
        layer.module._ipa_twins = layer.settings
    return ReplacementReport(
        tuple(
            ReplacedLayer(x.path, x.title, x.original.__name__, str(x.dtype).removeprefix("torch."), error, x.unused)
            for x, error in zip(layers, errors, strict=True)
        ),
        left_alone,
    )


def restore_ipa(model: nn.Module) -> list[str]:
    """Undoes `replace_ipa`; the paths of the layers that are their own again.

    Raises:
        ValueError: a layer was changed further since (a class or a forward on top, as sharding, parametrisation and
            hooks that move it put there), which has to be undone first; nothing is restored then.
    """
    replaced = {path: module for path, module in model.named_modules() if isinstance(module, _Adapter)}
    for path, module in replaced.items():
        if type(module) is not _adapted(_adapter(module), _original(module)) or "forward" in vars(module):
            raise ValueError(
                f"{path or 'the model itself'}: a layer as replace_ipa left it was expected; it is a "
                f"{type(module).__name__} with a class or a forward on top: undo that first"
            )
    for module in replaced.values():
        module.__class__ = _original(module)
        del module._ipa_twins
    return list(replaced)


class _Argument(NamedTuple):
    """An argument that a layer's own forward takes."""

    name: str
    default: Any
    """`inspect.Parameter.empty` where there is none."""
    by_name_only: bool
    neutral: tuple[Any, ...] = ()
    """The one value that it must have; empty if it may have any."""


@dataclass(frozen=True)
class _Settings:
    """What a replaced layer computes, and how."""

    config: IPAConfig
    takes: tuple[_Argument, ...]
    implementation: Implementation | None = None
    untouched: tuple[tuple[str, type], ...] = ()
    """Submodules that our attention does not call, or not as the layer called them, and the classes that they had."""
    points: str = ""
    """Where in a point projection its linear layer lies."""


class _Adapter(nn.Module):
    """What all replaced layers have; the class of one is a subclass of this and of its own.

    It defines nothing else that a layer could have an attribute of the name of.
    """

    _ipa_twins: _Settings
    _ipa_twins_classes: tuple[Any, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles know the two classes, for nobody can import the one made of them."""
        reduced = cast(tuple, super().__reduce_ex__(protocol))
        if type(self) is not _adapted(_adapter(self), _original(self)):  # of whoever made a class of it
            return reduced
        return _new, (_adapter(self), _original(self)), *reduced[2:]


class _OpenFold(_Adapter):
    """A layer of OpenFold, ESMFold, FrameDiff or their kin, called with its rigids."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The update of the single representation. `z` may come as the only entry of the list, as theirs does."""
        given = _arguments(self, arguments, named)
        pairs = given.get("_z_reference_list")
        z = pairs[0] if given["z"] is None and pairs and len(pairs) == 1 else given["z"]
        return _update(self, given["s"], z, given["r"], given["mask"])


def _update(layer: Any, s: Tensor, z: Tensor | None, r: Any, mask: Tensor | None) -> Tensor:
    """The forward of OpenFold's kin; frames, mask and pair may have fewer batch axes than the single representation."""
    settings: _Settings = layer._ipa_twins
    _check_untouched(layer)
    if z is None:
        raise ValueError("a pair representation was expected, as z or as the entry of _z_reference_list; got None")
    rotation, translation = _frames(r)
    batch = s.shape[:-1]
    rigids = Rigid(rotation.expand(*batch, 3, 3), translation.expand(*batch, 3))
    z, mask = z.expand(*batch, *z.shape[-2:]), None if mask is None else mask.expand(batch)
    projections, rigids = _in_frames(_openfold_projections(layer, settings, s), z, rigids, mask)
    o, o_points, o_pair = _attend(settings, projections, z, mask, layer.linear_b, layer.head_weights)
    if settings.config.pair_value_channel is not None:  # linear, and weights sum to 1: as good after the sum
        o_pair = layer.down_z(o_pair.to(z.dtype)).to(o_pair.dtype)
    read = features(settings.config, o, rigids.apply_inverse(o_points), o_pair)
    return layer.linear_out(read.to(z.dtype))


class _Lucidrains(_Adapter):
    """The package `invariant-point-attention`: row-vector frames, and masked residues that attend to all alike."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The update of the single representation."""
        layer, settings = cast(Any, self), self._ipa_twins
        _check_untouched(layer)
        given = _arguments(self, arguments, named)
        x, mask = given["single_repr"], given["mask"]
        pair = None if settings.config.pair_channel is None else given["pairwise_repr"]
        if settings.config.pair_channel is not None and pair is None:
            raise ValueError("a pair representation was expected as the second argument; got None")
        h = settings.config.num_head
        scalars = (to(x).unflatten(-1, (h, -1)) for to in (layer.to_scalar_q, layer.to_scalar_k, layer.to_scalar_v))
        points = (_points(to, settings, x) for to in (layer.to_point_q, layer.to_point_k, layer.to_point_v))
        local = (*scalars, *(y.unflatten(-1, (h, -1, 3)) for y in points))
        frames = Rigid(given["rotations"].transpose(-1, -2), given["translations"])
        projections, rigids = _in_frames(cast(Projections, local), pair, frames, mask)
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


def _openfold_projections(layer: Any, settings: _Settings, s: Tensor) -> Projections:
    config = settings.config
    if config.layout == "monomer":
        points = [_points(x, settings, s) for x in (layer.linear_q_points, layer.linear_kv_points)]
        return unpack_monomer(config, layer.linear_q(s), layer.linear_kv(s), *points)
    h = config.num_head
    q, k, v = (x(s).unflatten(-1, (h, -1)) for x in (layer.linear_q, layer.linear_k, layer.linear_v))
    q_points, k_points, v_points = (
        _points(x, settings, s).unflatten(-1, (h, 3, -1)).transpose(-1, -2)
        for x in (layer.linear_q_points, layer.linear_k_points, layer.linear_v_points)
    )
    return q, k, v, q_points, k_points, v_points


def _arguments(layer: _Adapter, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that the layer's own forward has for them.

    Raises:
        TypeError: it would not take them.
        ValueError: one that must have the value at which it changes nothing has another.
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
        if argument.neutral and not _same(given[name], argument.neutral[0]):
            raise ValueError(
                f"{name}={argument.neutral[0]} was expected, at which it changes nothing, since our attention has no "
                f"such argument; got a {type(given[name]).__name__}: call restore_ipa to use it"
            )
    return given


def _same(value: Any, neutral: Any) -> bool:
    return value is neutral or (isinstance(value, bool | int | float | str) and value == neutral)


class _System(NamedTuple):
    """What is to be known of a system's layers."""

    adapter: type[_Adapter]
    takes: tuple[str, ...]
    """The arguments of its forward that are ours too."""
    inputs: Callable[..., dict[str, Any]]
    """Makes these arguments of single, pair, rotation, translation, mask and a function that makes the rigids."""
    bias: str
    """The submodule that projects the pair to one number a head."""
    output: str
    """That which reads the features."""
    epsilon: str = "eps"
    """The attribute in which its published class holds the epsilon of lengths; one of `_EPSILONS`."""
    points: str = ""
    """Where in a point projection its linear layer lies."""
    norm_forms: Mapping[str, tuple[NormForm, ...]] = {}
    """By layout, the forms of lengths that its versions compute; the comparison finds which one a layer does."""
    flags: tuple[str, ...] = ()
    """Arguments of some versions that change how the layer computes, but not what."""
    neutral_arguments: Mapping[str, Any] = {}
    """Arguments of some versions, and the value at which each changes nothing."""
    neutral_attributes: Mapping[str, Any] = {}
    """Attributes of some versions, and the value at which each changes nothing."""


_EPSILONS = ("eps", "config.epsilon")
"""Attributes in which a layer may hold its epsilon."""


def _openfold(**options: Any) -> _System:
    """OpenFold's kin."""
    return _System(
        _OpenFold,
        takes=("s", "z", "r", "mask"),
        inputs=lambda s, z, rotation, translation, mask, rigids: {
            "s": s,
            "z": z,
            "r": rigids(rotation, translation),
            "mask": mask,
        },
        bias="linear_b",
        output="linear_out",
        flags=("inplace_safe", "_offload_inference", "_z_reference_list"),
        **options,
    )


SYSTEMS = {
    "openfold": _openfold(
        points="linear",
        norm_forms={"multimer": ("clamp", "add")},  # OpenFold 2 has a class of each
    ),
    "openfold_v1": _openfold(),
    "esmfold": _openfold(epsilon="config.epsilon"),
    "frameflow": _openfold(
        neutral_arguments={
            "attention_mask": None,  # MultiFlow's
            "z_factor_1": None,  # FlashIPA's, of its flash mode
            "z_factor_2": None,
        },
        neutral_attributes={"dropout_prob": 0, "use_flash_attn": False},  # MultiFlow's and FlashIPA's
    ),
    "framediff": _openfold(),
    "lucidrains": _System(
        _Lucidrains,
        takes=("single_repr", "pairwise_repr", "rotations", "translations", "mask"),
        inputs=lambda s, z, rotation, translation, mask, _: {
            "single_repr": s,
            "pairwise_repr": z,
            "rotations": rotation.transpose(-1, -2).to(s.dtype),
            "translations": translation.to(s.dtype),
            "mask": mask.bool(),
        },
        bias="to_pairwise_attn_bias.0",
        output="to_out",
    ),
}
"""By dialect, whose layers can be replaced, and what of theirs is known to be without effect. All else is refused.

Parameters without effect are in the dialect itself.
"""


def _check_untouched(layer: Any) -> None:
    """Modules that are not called as they were must be what they were, with nothing on them that a call would do."""
    for path, kind in layer._ipa_twins.untouched:
        if problem := _altered(layer.get_submodule(path), kind):
            raise NotImplementedError(
                f"{path} {problem}, which would not be seen: our attention does not call it as the layer's own did; "
                "call restore_ipa before it is changed"
            )


def _altered(module: Any, kind: type[Any]) -> str:
    """The reason why a module would not do what its class does, or none."""
    if module.__class__ is not kind:
        return f"is a {type(module).__name__} where a {kind.__name__} was"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks"
    return "has a forward of its own" if "forward" in vars(module) else ""


def _points(projection: Any, settings: _Settings, s: Tensor) -> Tensor:
    """A projection to local points, outside of autocast; in OpenFold 2 in a module that would place them too."""
    linear = getattr(projection, settings.points) if settings.points else projection
    with without_autocast(s.device.type):
        return linear(s.to(linear.weight.dtype) if hasattr(linear, "weight") else s)


def _frames(r: Any) -> tuple[Tensor, Tensor]:
    """Rotation matrices and translations of OpenFold's `Rigid` or its multimer's `Rigid3Array`, or of their like."""
    if hasattr(r, "get_rots"):
        rotations = r.get_rots()  # in tFold's the matrices themselves
        return rotations if isinstance(rotations, Tensor) else rotations.get_rot_mats(), r.get_trans()
    return tuple(x if isinstance(x, Tensor) else x.to_tensor() for x in (r.rotation, r.translation))  # type: ignore[return-value]


def _in_frames(
    projections: Projections, pair: Tensor | None, rigids: Rigid, mask: Tensor | None
) -> tuple[Projections, Rigid]:
    """Projections with their points in the global frame, and centred rigids, all in one dtype of at least float32."""
    dtype = at_least_float32(*(x.dtype for x in (*projections, *rigids, pair) if x is not None))
    rigids = centre(rigids.astype(dtype), mask)
    q, k, v, *points = (x.to(dtype) for x in projections)
    q_points, k_points, v_points = (rigids.apply(x) for x in points)
    return (q, k, v, q_points, k_points, v_points), rigids


def _attend(
    settings: _Settings,
    projections: Projections,
    pair: Tensor | None,
    mask: Tensor | None,
    linear: nn.Linear | None,
    gamma: Tensor,
) -> tuple[Any, ...]:
    """Lines 4 and 7–10."""
    point_weights = F.softplus(gamma.to(at_least_float32(gamma.dtype)))
    return point_attention(
        *projections,
        pair,
        pair_bias_weight=None if linear is None else weight_without_bias(linear),
        point_weights=point_weights,
        mask=mask,
        implementation=settings.implementation,
    )


@dataclass(frozen=True)
class _Layer:
    """An attention that can be replaced."""

    path: str
    title: str
    module: Any
    system: _System
    settings: _Settings
    infinity: float
    """What it subtracts from the logits of masked keys; 0 for a layer that fills them."""
    unused: tuple[str, ...] = ()
    """Parameters that no forward reads."""
    callers: tuple[type, ...] = ()
    """Classes of the modules that it lies in, the innermost first."""

    @property
    def original(self) -> Any:
        return _original(self.module)

    @property
    def adapted(self) -> Any:
        return _adapted(cast(Any, self.system.adapter), self.original)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.get_submodule(self.system.output).weight.dtype

    @property
    def where(self) -> str:
        return self.path or "the model itself"


@cache
def _adapted(adapter: Any, original: Any) -> Any:
    """The class of a replaced layer."""

    @wraps(original.forward)
    def forward(self: Any, *arguments: Any, **named: Any) -> Tensor:
        return adapter.forward(self, *arguments, **named)

    namespace = {"__doc__": adapter.__doc__, "_ipa_twins_classes": (adapter, original), "forward": forward}
    return type(f"IPATwins{original.__name__}", (adapter, original), namespace)


def _new(adapter: Any, original: Any) -> Any:
    """An empty layer of that class, for a copy."""
    return object.__new__(_adapted(adapter, original))


def _adapter(module: Any) -> Any:
    return module._ipa_twins_classes[0]


def _original(module: Any) -> Any:
    """What a layer was made as."""
    return module._ipa_twins_classes[1] if isinstance(module, _Adapter) else type(module)


def _find(model: nn.Module) -> dict[str, _Layer | str]:
    """By path, every attention that can be replaced, and for what looks like one the reason why it cannot."""
    shapes = {name: tuple(x.shape) for name, x in model.named_parameters(remove_duplicate=False)}
    found: dict[str, _Layer | str] = {}
    seen: set[int] = set()
    attentions = [candidate for candidate in modules(shapes, haiku=False) if candidate.kind is IPAConfig]
    attentions.sort(key=lambda candidate: not _tells_its_way(candidate, model))
    for candidate in attentions:
        if isinstance(found.get(candidate.root), _Layer):
            continue
        module = model.get_submodule(candidate.root)
        if id(module) not in seen:
            layer = _recognise(candidate, module, shapes)
            if isinstance(layer, _Layer):
                layer = replace(layer, callers=_callers(model, candidate.root))
                found[candidate.root] = layer
            found.setdefault(candidate.root, layer)
            seen |= {id(module)} if isinstance(layer, _Layer) else set()
    # Ends of names that only such an attention has.
    ends = re.compile(r"(?<![^.])(head_weights|point_weights|(linear_\w+_points|to_point_\w)(\.linear)?\.weight)$")
    likely = {path for path, module in model.named_modules() if "pointattention" in type(module).__name__.lower()}
    likely |= {name.removesuffix(end[0]).removesuffix(".") for name in shapes if (end := ends.search(name))}
    for path in sorted(likely):
        if not any(_within(path, other) or _within(other, path) for other in found):
            found[path] = "its parameters have the names of no system that is known here"
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    return {path: found[path] for path in paths if path in found}


def _tells_its_way(found: Found, model: nn.Module) -> bool:
    """True if a layer holds its epsilon where that system's class does: two systems have the same parameters."""
    name = found.dialect.name
    return name in SYSTEMS and _attribute(model.get_submodule(found.root), SYSTEMS[name].epsilon) is not None


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _callers(model: nn.Module, path: str) -> tuple[type, ...]:
    """The classes of the modules around one, the innermost first."""
    steps = path.split(".") if path else []
    return tuple(type(model.get_submodule(".".join(steps[:n]))) for n in reversed(range(len(steps))))


def _within(inner: str, outer: str) -> bool:
    return not outer or f"{inner}.".startswith(f"{outer}.")


def _recognise(found: Found, module: Any, shapes: dict[str, tuple[int, ...]]) -> _Layer | str:
    """A layer that can be replaced, or why it cannot."""
    title = found.dialect.title
    if found.dialect.name not in SYSTEMS:
        return "it is this project's own"
    system, names = SYSTEMS[found.dialect.name], found.names(shapes)
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
        return f"its parameters are not {title}'s: missing, misshapen or of another are {', '.join(sorted(strange))}"
    if config.pair_channel is None and all(form.pair_required for form in found.dialect.forms.values()):
        return f"it has no {system.bias}, and {title}'s attention without a pair is not known here"
    if isinstance(module, _Adapter) and type(module) is not _adapted(_adapter(module), _original(module)):
        return f"a class was put on top of it since it was replaced: {type(module).__name__}"
    replaced = [path for path, x in module.named_modules() if "forward" in vars(x)]
    if replaced:
        where = replaced[0] or "itself"
        return f"the forward of {where} was replaced on that very object, as hooks that move layers between devices do"
    takes = _takes(system, _original(module))
    if isinstance(takes, str):
        return takes
    for name, neutral in system.neutral_attributes.items():
        if not _same(value := getattr(module, name, neutral), neutral):
            return f"its {name} is {value}, and only at {neutral} it computes what ours does"
    untouched = _untouched(module, system, {name.rpartition(".")[0] for name in expected}, unused)
    for path, kind in untouched:
        if problem := _altered(module.get_submodule(path), kind):
            return f"its {path} {problem}, which would not be seen: ours does not call it as it is called there"
    infinity = getattr(module, "inf", getattr(getattr(module, "config", None), "inf", 0))
    if not isinstance(infinity, float | int) or 0 < infinity < LEAST_INFINITY:
        return f"it hides masked keys by {infinity} only; ours hides them altogether"
    epsilons = {float(x) for x in (_attribute(module, path) for path in _EPSILONS) if isinstance(x, float | int)}
    if len(epsilons) != 1:
        told = f"tells {len(epsilons)} epsilons" if epsilons else "does not tell its epsilon"
        return f"it {told}, as .eps or .config.epsilon"
    try:
        ours = replace(config, norm_epsilon=epsilons.pop())
    except ValueError as error:
        return str(error)
    settings = _Settings(ours, takes, untouched=untouched, points=system.points)
    return _Layer(found.root, title, module, system, settings, infinity, tuple(sorted(unused)))


def _takes(system: _System, original: Any) -> tuple[_Argument, ...] | str:
    """The arguments of a layer's own forward, or why they are not those of its system."""
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    harmless = (*system.flags, *system.neutral_arguments)
    plain = all(x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY) for x in parameters)
    if not plain or set(names) - set(harmless) != set(system.takes):
        beside = f", beside them at most {', '.join(harmless)}" if harmless else ""
        return f"its forward takes {', '.join(names)}, and not {', '.join(system.takes)}{beside}"
    neutral = {name: (value,) for name, value in system.neutral_arguments.items()}
    return tuple(_Argument(x.name, x.default, x.kind is x.KEYWORD_ONLY, neutral.get(x.name, ())) for x in parameters)


def _untouched(
    module: nn.Module, system: _System, with_parameters: Iterable[str], unused: Iterable[str]
) -> tuple[tuple[str, type], ...]:
    """Submodules that ours does not call as the layer does, but for those that its own forward does not call either."""
    differently = (system.bias, "down_z")
    called = set(with_parameters) - set(differently)
    ignored = {name.rpartition(".")[0] for name in unused}
    return tuple(
        (path, nn.Linear if path in differently and not isinstance(x, nn.Linear) else type(x))
        for path, x in module.named_modules()
        if path and not any(_within(path, other) for other in (called | ignored) - {""})
    )


def _verify(layer: _Layer) -> tuple[_Layer, float]:
    """A layer as it is to be replaced, and how far it is from what it was, in epsilons of its dtype.

    The reference is what it was, run in wider arithmetic. If that cannot be, the difference holds the errors of both:
    bounds are twice as wide then, and its own error, which nobody can measure, is taken to be as large as ours.

    Raises:
        ValueError: further than rounding explains, or it cannot be told.
    """
    device, dtype = layer.module.get_submodule(layer.system.output).weight.device, layer.dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES or device.type == "meta":
        raise ValueError(
            f"{layer.where}: floating-point parameters on a device were expected, to compare before and after; they "
            f"are {dtype} on {device}: pass verify=False to replace it unseen"
        )
    try:
        with _full_precision():
            wide, batch, truth = _reference(layer)
            layer = _with_nearest_norm(layer, truth, wide, batch)
            training = _run(layer, layer.original, wide, batch=batch, training=True)
            after = _run(layer, layer.adapted, dtype, batch=batch)
            wider = torch.finfo(wide).eps < torch.finfo(dtype).eps
            if wider or dtype is torch.float64:
                own = _errors(_run(layer, layer.original, dtype, batch=batch), truth)
            else:
                own = _own_errors(layer, after, batch)
            if not all(map(math.isfinite, own.values())):  # float16 cannot hold what hides masked keys
                nobody = {x: _run(layer, layer.original, x, batch=batch, masked=False) for x in (wide, dtype)}
                own = _errors(nobody[dtype], nobody[wide])
                own["masked"] = own["out"]
    except Exception as error:
        raise ValueError(
            f"{layer.where}: it was run on random input, to compare before and after, and said {type(error).__name__}: "
            f"{error}; pass verify=False to replace it unseen"
        ) from error
    sides = 1 if wider or dtype is torch.float64 else 2
    eps = torch.finfo(dtype).eps
    # Subtracting a large number from all logits of a masked row has rounded them, in the truth too.
    rounded = layer.infinity * torch.finfo(wide).eps / eps
    parts = {
        "outputs": ("out", bound("out", name)),
        "outputs of masked residues": ("masked", bound("out", name) + rounded),
        "gradients to the single representation": ("to_single", bound("gradient", name)),
        "gradients to the pair representation": ("to_pair", bound("gradient", name)),
    }
    wrong = "outputs in training are others" if _apart(training.out, truth.out) else ""
    errors = _errors(after, truth)
    for what, (part, within) in parts.items():
        now = errors[part] / eps
        explained = sides * max(within, 2 * own[part] / eps)  # large weights put the layer itself off
        if not (wrong or now <= explained):
            wrong = f"{what} are {now:.3g} eps of {name} apart on random input, where rounding explains {explained:.3g}"
    if wrong:
        raise ValueError(
            f"{layer.where}: this {layer.original.__name__} has the parameters of {layer.title}'s attention but "
            f"computes another function: {wrong}; nothing was replaced"
        )
    return layer, errors["out"] / eps


def _reference(layer: _Layer) -> tuple[torch.dtype, tuple[int, ...], _Run]:
    """The widest arithmetic that a layer runs in as it is, the batch axes that it takes, and what it computes."""
    device = layer.module.get_submodule(layer.system.output).weight.device
    dtypes = [torch.float64] if layer.dtype is torch.float64 else [torch.float64, torch.float32]
    if device.type == "mps":
        dtypes = [torch.float32]
    errors: list[Exception] = []
    for dtype, batch in product(dtypes, ((1,), ())):
        try:
            return dtype, batch, _run(layer, layer.original, dtype, batch=batch)
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _with_nearest_norm(layer: _Layer, truth: _Run, dtype: torch.dtype, batch: tuple[int, ...]) -> _Layer:
    """The layer with the form of lengths that it computes, of those that its system's versions do."""
    config = layer.settings.config
    candidates = [
        replace(layer, settings=replace(layer.settings, config=replace(config, norm_form=form)))
        for form in layer.system.norm_forms.get(config.layout, ())
    ]
    if not candidates:
        return layer
    return min(candidates, key=lambda x: _apart(_run(x, x.adapted, dtype, batch=batch).out, truth.out))


def _own_errors(layer: _Layer, after: _Run, batch: tuple[int, ...]) -> dict[str, float]:
    """How far ours is from itself in float64, by rounding alone; zeros if it cannot run in that."""
    try:
        return _errors(after, _run(layer, layer.adapted, torch.float64, batch=batch))
    except Exception:
        return dict.fromkeys(_Run._fields, 0.0)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Turns gradients on, and lower precision in float32 matrix products off; afterwards all is as before.

    PyTorch's newer switches make the older one raise, and the older one writes into the newer ones.
    """
    switches = [
        x.matmul
        for x in (torch.backends.cuda, torch.backends.mkldnn)
        if hasattr(getattr(x, "matmul", None), "fp32_precision")
    ]
    before = [switch.fp32_precision for switch in switches]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        precision = None
    try:
        if precision is None:
            for switch in switches:
                switch.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = "none"  # as the switch above it says
            if switch.fp32_precision != value:
                switch.fp32_precision = value


class _Run(NamedTuple):
    """In float64."""

    out: np.ndarray
    """Of valid residues."""
    masked: np.ndarray
    to_single: np.ndarray
    to_pair: np.ndarray
    """Empty without a pair."""


def _run(
    layer: _Layer,
    kind: Any,
    dtype: torch.dtype,
    *,
    batch: tuple[int, ...],
    training: bool = False,
    masked: bool = True,
) -> _Run:
    """A copy of a layer as a class, on random input that its own dtype can hold, in a dtype."""
    config, system = layer.settings.config, layer.system
    copied = _bare_copy(layer.module, dtype).train(training)
    copied.__class__ = kind
    copied._ipa_twins = layer.settings
    rng, shape = np.random.default_rng(0), (*batch, RESIDUES)
    device = copied.get_submodule(system.output).weight.device

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(device, layer.dtype).to(dtype)

    def draw(path: str) -> None:
        linear = cast(Any, copied.get_submodule(path))
        drawn = rng.standard_normal(tuple(linear.weight.shape)) / math.sqrt(linear.weight.shape[1])
        linear.weight = nn.Parameter(tensor(drawn), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(torch.zeros_like(linear.bias), requires_grad=False)

    draw(system.output)
    if config.pair_channel is not None and not cast(Any, copied.get_submodule(system.bias)).weight.any():
        draw(system.bias)
    for name in layer.unused:  # so that it would show if they were used
        owner, _, leaf = name.rpartition(".")
        parameter = getattr(copied.get_submodule(owner), leaf)
        drawn = tensor(rng.standard_normal(tuple(parameter.shape)))
        setattr(copied.get_submodule(owner), leaf, nn.Parameter(drawn, requires_grad=False))
    placed = (torch.from_numpy(x).to(device, at_least_float32(dtype)) for x in random_frames(rng, shape, spread=1.5))
    valid = (rng.random(shape) > 0.1) | (not masked)
    single = tensor(rng.standard_normal((*shape, config.num_channel))).requires_grad_()
    pair = None
    if config.pair_channel is not None:
        pair = tensor(rng.standard_normal((*shape, RESIDUES, config.pair_channel))).requires_grad_()
    cotangent = tensor(rng.standard_normal(single.shape) * valid[..., None])
    inputs = [single] if pair is None else [single, pair]
    given = system.inputs(single, pair, *placed, tensor(valid), _rigids_of(layer))
    needed = {x.name: next(iter(x.neutral), None) for x in layer.settings.takes if x.default is inspect.Parameter.empty}
    with without_autocast(device.type), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = type(copied).forward(copied, **(needed | given))
        gradients = torch.autograd.grad((out * cotangent).sum(), inputs, allow_unused=True)
    to_single, *to_pair = (
        _numpy(torch.zeros_like(x) if g is None else g) for g, x in zip(gradients, inputs, strict=True)
    )
    rows = _numpy(out)
    return _Run(rows[valid], rows[~valid], to_single, to_pair[0] if to_pair else np.zeros(0))


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _errors(run: _Run, truth: _Run) -> dict[str, float]:
    """Of every part, how far one is from the other."""
    return {part: _apart(x, y) for part, x, y in zip(_Run._fields, run, truth, strict=True)}


def _apart(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest number."""
    largest = np.abs(expected).max(initial=0)
    difference = np.abs(actual - expected).max(initial=0)
    return float(difference / largest) if largest else float(difference)


def _bare_copy(module: Any, dtype: torch.dtype) -> Any:
    """The same modules without hooks, on the same numbers in that dtype, which are shared where it is theirs."""
    copied = object.__new__(_original(module))
    vars(copied).update(vars(module))
    for name, value in vars(module).items():
        if "hooks" in name and isinstance(value, dict):
            vars(copied)[name] = type(value)()

    def plain(x: Tensor) -> Tensor:
        """Those made in inference mode take no part in gradients elsewhere."""
        return x.clone() if x.is_inference() else x

    copied._parameters = {
        name: None if x is None else nn.Parameter(plain(x.detach().to(dtype)), requires_grad=False)
        for name, x in module._parameters.items()
    }
    copied._buffers = {name: None if x is None else plain(x) for name, x in module._buffers.items()}
    copied._modules = {name: None if x is None else _bare_copy(x, dtype) for name, x in module._modules.items()}
    return copied


def _rigids_of(layer: _Layer) -> Callable[[Tensor, Tensor], Any]:
    """The function that makes a layer's rigids of rotations and translations.

    Their class is the one that its forward is annotated with, or else one of the usual name that lies beside the layer,
    or beside a module that it lies in, which must make them to call it.
    """
    if layer.system.adapter is _Lucidrains:
        return Rigid
    kinds = _annotated_rigids(layer.original) or _rigids_beside((layer.original, *layer.callers))
    if not kinds:
        around = " or ".join(dict.fromkeys(x.__name__ for x in (layer.original, *layer.callers)))
        raise ValueError(
            f"a forward whose r is annotated with the class of its rigids, or a Rigid or Rigid3Array in the module "
            f"that defines {around}, was expected; there is none"
        )
    arrays = [kind for kind in kinds if not hasattr(kind, "get_rots") and hasattr(kind, "from_tensor_4x4")]
    if arrays and (layer.settings.config.layout == "multimer" or arrays == kinds):
        return lambda rotation, translation: arrays[0].from_tensor_4x4(_homogeneous(rotation, translation))
    rigid = next((kind for kind in kinds if kind not in arrays), kinds[0])
    rotations = vars(sys.modules[rigid.__module__]).get("Rotation")
    if rotations is None:
        raise ValueError(
            f"a Rotation was expected in {rigid.__module__}, which {rigid.__name__} is made of; there is none"
        )
    return lambda rotation, translation: rigid(rotations(rot_mats=rotation, quats=None), translation)


def _annotated_rigids(original: Any) -> list[Any]:
    """The classes that a forward's `r` may be of, by its annotation."""
    try:
        annotation = inspect.signature(original.forward, eval_str=True).parameters["r"].annotation
    except Exception:  # some name that only type checkers import
        return []
    named = typing.get_args(annotation) or (annotation,)
    return [x for x in named if isinstance(x, type) and _is_rigid(x)]


def _is_rigid(kind: type) -> bool:
    return hasattr(kind, "get_rots") or hasattr(kind, "from_tensor_4x4")


def _rigids_beside(kinds: Iterable[type]) -> list[Any]:
    """Classes called `Rigid` or `Rigid3Array` in the modules that define these, or in what those import as modules."""
    names = [x.__module__ for kind in kinds for x in kind.__mro__]
    for name in dict.fromkeys(x for x in names if x in sys.modules):
        own = vars(sys.modules[name])
        imported = [vars(x) for x in own.values() if isinstance(x, ModuleType)]
        for spaces in ([own], imported):
            found = [space[x] for x in ("Rigid", "Rigid3Array") for space in spaces if x in space]
            if rigids := [x for x in found if isinstance(x, type) and _is_rigid(x)]:
                return rigids
    return []


def _homogeneous(rotation: Tensor, translation: Tensor) -> Tensor:
    """Rotations and translations as 4×4 matrices."""
    last = torch.tensor([0.0, 0, 0, 1], dtype=rotation.dtype, device=rotation.device)
    upper = torch.cat([rotation, translation[..., None]], -1)
    return torch.cat([upper, last.expand(*upper.shape[:-2], 1, 4)], -2)
