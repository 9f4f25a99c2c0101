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
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipa_bridge.config import IPAConfig
from ipa_bridge.dialects import Found, modules
from ipa_bridge.frames import random_frames
from ipa_bridge.replacement import RESIDUES, WITHIN, ReplacedLayer, ReplacementReport
from ipa_torch.attention import choose_implementation, point_attention
from ipa_torch.dtypes import at_least_float32, without_autocast
from ipa_torch.invariant_point_attention import Projections, centre, features, lengths, unpack_monomer
from ipa_torch.rigid import Rigid

LEAST_INFINITY = 1e4
"""What a layer that hides masked keys by subtracting a number must subtract at least: ours hides them altogether."""


def replace_ipa(model: nn.Module, *, implementation: str | None = None, verify: bool = True) -> ReplacementReport:
    """Lets every invariant point attention in a model compute as ours does.

    Layers of OpenFold 1 and 2 (monomer and multimer), ESMFold, FrameDiff and its family, and the package
    `invariant-point-attention` are known by their parameters. Each keeps its call, its conventions and its
    parameters, the same tensors: optimisers, hooks, `state_dict()`, device and dtype are as before, and a checkpoint
    saved after is one saved before. `restore_ipa` undoes it. Replacing again changes the implementation.

    Of the pair's bias only the weight is read: hooks on it, or another layer in its place, make the call raise. Epsilon
    is what it is at the swap. Second derivatives and forward mode want `implementation="reference"`.

    Args:
        model: any module, an attention itself too.
        implementation: of the attention, see `point_attention`.
        verify: compare each layer with what it was, outputs and gradients, on random input, in its dtype and on its
            device. Its output projection is another one there, so that neither a zero nor a large bias hides anything.

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
    errors = [_verify(layer) if verify else None for layer in layers]
    for layer, adapted in zip(layers, classes, strict=True):
        layer.module.__class__ = adapted
        layer.module._ipa_twins = layer.settings
    return ReplacementReport(
        tuple(
            ReplacedLayer(x.path, x.title, x.original.__name__, str(x.dtype).removeprefix("torch."), error)
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


@dataclass(frozen=True)
class _Settings:
    """What a replaced layer computes, and how."""

    config: IPAConfig
    implementation: str | None = None
    read: tuple[tuple[str, type], ...] = ()
    """Submodules of which parts are read and not called, and the classes that they had."""
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


class _ESMFold(_Adapter):
    """A layer of ESMFold or FrameDiff, called with its rigids, and with flags that are of no use here."""

    def forward(
        self,
        s: Tensor,
        z: Tensor | None,
        r: Any,
        mask: Tensor,
        _offload_inference: bool = False,
        _z_reference_list: Any = None,
    ) -> Tensor:
        """The update of the single representation. `z` may come as the only entry of the list, as theirs does."""
        return _update(self, s, z, r, mask, _z_reference_list)


class _OpenFold(_ESMFold):
    """A layer of OpenFold, which has one flag more."""

    def forward(  # type: ignore[override]
        self, s: Tensor, z: Tensor | None, r: Any, mask: Tensor, inplace_safe: bool = False, *flags: Any, **named: Any
    ) -> Tensor:
        """The update of the single representation."""
        return super().forward(s, z, r, mask, *flags, **named)


def _update(layer: Any, s: Tensor, z: Tensor | None, r: Any, mask: Tensor, z_reference_list: Any) -> Tensor:
    """The forward of OpenFold's kin; frames, mask and pair may have fewer batch axes than the single representation."""
    settings: _Settings = layer._ipa_twins
    _check_read(layer)
    if z is None and z_reference_list:
        (z,) = z_reference_list
    if z is None:
        raise ValueError("a pair representation was expected, as z or as the entry of _z_reference_list; got None")
    rotation, translation = _frames(r)
    batch = s.shape[:-1]
    rigids = Rigid(rotation.expand(*batch, 3, 3), translation.expand(*batch, 3))
    z, mask = z.expand(*batch, *z.shape[-2:]), mask.expand(batch)
    projections, rigids = _in_frames(_openfold_projections(layer, settings, s), z, rigids, mask)
    o, o_points, o_pair = _attend(settings, projections, z, mask, layer.linear_b, layer.head_weights)
    if settings.config.pair_value_channel is not None:  # linear, and weights sum to 1: as good after the sum
        o_pair = layer.down_z(o_pair.to(z.dtype)).to(o_pair.dtype)
    read = features(settings.config, o, rigids.apply_inverse(o_points), o_pair)
    return layer.linear_out(read.to(z.dtype))


class _Lucidrains(_Adapter):
    """The package `invariant-point-attention`: row-vector frames, and masked residues that attend to all alike."""

    def forward(
        self,
        single_repr: Tensor,
        pairwise_repr: Tensor | None = None,
        *,
        rotations: Tensor,
        translations: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The update of the single representation."""
        layer, settings, x = cast(Any, self), self._ipa_twins, single_repr
        _check_read(layer)
        pair = None if settings.config.pair_channel is None else pairwise_repr
        if settings.config.pair_channel is not None and pair is None:
            raise ValueError("a pair representation was expected as the second argument; got None")
        h = settings.config.num_head
        scalars = (to(x).unflatten(-1, (h, -1)) for to in (layer.to_scalar_q, layer.to_scalar_k, layer.to_scalar_v))
        points = (_points(to, settings, x) for to in (layer.to_point_q, layer.to_point_k, layer.to_point_v))
        local = (*scalars, *(y.unflatten(-1, (h, -1, 3)) for y in points))
        frames = Rigid(rotations.transpose(-1, -2), translations)
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


class _System(NamedTuple):
    """What is to be known of a system's layers."""

    adapters: dict[tuple[str, ...], type[_Adapter]]
    """By the arguments that its forward takes."""
    bias: str
    """The submodule that projects the pair to one number a head."""
    output: str
    """That which reads the features."""
    epsilon: Callable[[Any], Any]
    """That of lengths."""
    call: Callable[..., Tensor]
    """Its forward on single, pair, rotation, translation, mask and what makes its rigids of two of these."""
    points: str = ""
    """Where in a point projection its linear layer lies."""


def _openfold(epsilon: Callable[[Any], Any], points: str = "") -> _System:
    plain = ("s", "z", "r", "mask")
    offloads = ("_offload_inference", "_z_reference_list")
    return _System(
        {plain: _ESMFold, (*plain, *offloads): _ESMFold, (*plain, "inplace_safe", *offloads): _OpenFold},
        bias="linear_b",
        output="linear_out",
        epsilon=epsilon,
        call=lambda layer, s, z, rotation, translation, mask, rigids: type(layer).forward(
            layer, s, z, rigids(rotation, translation), mask
        ),
        points=points,
    )


def _lucidrains() -> _System:
    return _System(
        {("single_repr", "pairwise_repr", "rotations", "translations", "mask"): _Lucidrains},
        bias="to_pairwise_attn_bias.0",
        output="to_out",
        epsilon=_own_epsilon,
        call=lambda layer, s, z, rotation, translation, mask, _: type(layer).forward(
            layer,
            s,
            z,
            rotations=rotation.transpose(-1, -2).to(s.dtype),
            translations=translation.to(s.dtype),
            mask=mask.bool(),
        ),
    )


def _own_epsilon(layer: Any) -> Any:
    return getattr(layer, "eps", None)


def _epsilon_of_its_config(layer: Any) -> Any:
    return getattr(getattr(layer, "config", None), "epsilon", None)


SYSTEMS = {
    "openfold": _openfold(_own_epsilon, points="linear"),
    "openfold_v1": _openfold(_own_epsilon),
    "esmfold": _openfold(_epsilon_of_its_config),
    "framediff": _openfold(_own_epsilon),
    "lucidrains": _lucidrains(),
}
"""By dialect, whose layers can be replaced."""


def _check_read(layer: Any) -> None:
    """Modules that are read and not called must be what they were, with nothing on them that a call would do."""
    for path, kind in layer._ipa_twins.read:
        if problem := _altered(layer.get_submodule(path), kind):
            raise NotImplementedError(
                f"{path} {problem}, which would not be seen: of it our attention reads the weight and calls nothing; "
                "call restore_ipa before it is changed"
            )


def _altered(module: Any, kind: type[Any]) -> str:
    """What stands between a module and what its class does with its weight."""
    if module.__class__ is not kind:
        return f"is a {type(module).__name__} where a {kind.__name__} was"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks"
    return "has a forward of its own" if "forward" in vars(module) else ""


def _points(projection: Any, settings: _Settings, s: Tensor) -> Tensor:
    """A projection to local points, outside of autocast; in OpenFold 2 in a module that would place them too."""
    linear = getattr(projection, settings.points) if settings.points else projection
    with without_autocast(s.device.type):
        return linear(s.to(linear.weight.dtype) if hasattr(linear, "weight") else s)


def _frames(r: Any) -> tuple[Tensor, Tensor]:
    """Rotation matrices and translations of OpenFold's `Rigid` or its multimer's `Rigid3Array`, or of their like."""
    if hasattr(r, "get_rots"):
        return r.get_rots().get_rot_mats(), r.get_trans()
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
    weight = None
    if linear is not None:
        weight = linear.weight.T if linear.bias is None else linear.weight.T + 0 * linear.bias
    point_weights = F.softplus(gamma.to(at_least_float32(gamma.dtype)))
    return point_attention(
        *projections,
        pair,
        pair_bias_weight=weight,
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
    adapter: type[_Adapter]
    settings: _Settings
    infinity: float
    """What it subtracts from the logits of masked keys; 0 for a layer that fills them."""

    @property
    def original(self) -> Any:
        return _original(self.module)

    @property
    def adapted(self) -> Any:
        return _adapted(cast(Any, self.adapter), self.original)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.get_submodule(self.system.output).weight.dtype

    @property
    def where(self) -> str:
        return self.path or "the model itself"


@cache
def _adapted(adapter: Any, original: Any) -> Any:
    """The class of a replaced layer."""
    namespace = {"__doc__": adapter.__doc__, "_ipa_twins_classes": (adapter, original)}
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
    for candidate in modules(shapes, haiku=False):
        if candidate.kind is not IPAConfig or isinstance(found.get(candidate.root), _Layer):
            continue
        module = model.get_submodule(candidate.root)
        if id(module) not in seen:
            found[candidate.root] = layer = _recognise(candidate, module, shapes)
            seen |= {id(module)} if isinstance(layer, _Layer) else set()
    # Ends of names that only such an attention has.
    ends = re.compile(r"(?<![^.])(head_weights|point_weights|(linear_\w+_points|to_point_\w)(\.linear)?\.weight)$")
    likely = {path for path, module in model.named_modules() if "pointattention" in type(module).__name__.lower()}
    likely |= {name.removesuffix(end[0]).removesuffix(".") for name in shapes if (end := ends.search(name))}
    for path in sorted(likely):
        if not any(_within(path, other) or _within(other, path) for other in found):
            found[path] = "its parameters have the names of no system that is known here"
    return found


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
    strange = {name for name in expected if name in names and shapes[names[name]] != expected[name]}
    strange |= set(expected) ^ set(names)
    if strange:
        return f"its parameters are not {title}'s: missing, misshapen or of another are {', '.join(sorted(strange))}"
    if isinstance(module, _Adapter) and type(module) is not _adapted(_adapter(module), _original(module)):
        return f"a class was put on top of it since it was replaced: {type(module).__name__}"
    replaced = [path for path, x in module.named_modules() if "forward" in vars(x)]
    if replaced:
        where = replaced[0] or "itself"
        return f"the forward of {where} was replaced on that very object, as hooks that move layers between devices do"
    takes = tuple(inspect.signature(_original(module).forward).parameters)[1:]
    if takes not in system.adapters:
        known = "; or ".join(", ".join(x) for x in system.adapters)
        return f"its forward takes {', '.join(takes)}, and not {known}"
    read: list[tuple[str, type]] = []
    if config.pair_channel is not None:
        linear = module.get_submodule(system.bias)
        read += [(system.bias, type(linear) if isinstance(linear, nn.Linear) else nn.Linear)]
    if system.points:
        read += [(path, type(x)) for path, x in module.named_children() if hasattr(x, system.points)]
    for path, kind in read:
        if problem := _altered(module.get_submodule(path), kind):
            return f"its {path} {problem}, and only the weight of it would be read"
    infinity = getattr(module, "inf", getattr(getattr(module, "config", None), "inf", 0))
    if not isinstance(infinity, float | int) or 0 < infinity < LEAST_INFINITY:
        return f"it hides masked keys by {infinity} only; ours hides them altogether"
    epsilon = system.epsilon(module)
    if not isinstance(epsilon, float | int):
        return "it does not tell its epsilon, as .eps or .config.epsilon"
    try:
        settings = _Settings(replace(config, norm_epsilon=float(epsilon)), read=tuple(read), points=system.points)
    except ValueError as error:
        return str(error)
    return _Layer(found.root, title, module, system, system.adapters[takes], settings, infinity)


def _verify(layer: _Layer) -> float:
    """How far a layer is from what it was, run in wider arithmetic, in epsilons of its dtype.

    Raises:
        ValueError: further than rounding explains, or it cannot be told.
    """
    device, dtype = layer.module.get_submodule(layer.system.output).weight.device, layer.dtype
    name = str(dtype).removeprefix("torch.")
    if name not in WITHIN or device.type == "meta":
        raise ValueError(
            f"{layer.where}: floating-point parameters on a device were expected, to compare before and after; they "
            f"are {dtype} on {device}: pass verify=False to replace it unseen"
        )
    wide = torch.float32 if device.type == "mps" else torch.float64
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        truth = _run(layer, layer.original, wide)
        training = _run(layer, layer.original, wide, training=True)
        after = _run(layer, layer.adapted, dtype)
        own = _errors(_run(layer, layer.original, dtype), truth)
        if not all(map(math.isfinite, own.values())):  # float16 cannot hold what hides masked keys
            nobody = {kind: _run(layer, layer.original, kind, masked=False) for kind in (wide, dtype)}
            own = _errors(nobody[dtype], nobody[wide])
            own["masked"] = own["out"]
    except Exception as error:
        raise ValueError(
            f"{layer.where}: it was run on random input, to compare before and after, and said {type(error).__name__}: "
            f"{error}; pass verify=False to replace it unseen"
        ) from error
    finally:
        torch.set_float32_matmul_precision(precision)
    eps = torch.finfo(dtype).eps
    # Subtracting a large number from all logits of a masked row has rounded them, in the truth too.
    rounded = layer.infinity * torch.finfo(wide).eps / eps
    parts = {
        "outputs": ("out", WITHIN[name]["out"]),
        "outputs of masked residues": ("masked", WITHIN[name]["out"] + rounded),
        "gradients to the single representation": ("to_single", WITHIN[name]["gradient"]),
        "gradients to the pair representation": ("to_pair", WITHIN[name]["gradient"]),
    }
    wrong = "outputs in training are others" if _apart(training.out, truth.out) else ""
    errors = _errors(after, truth)
    for what, (part, within) in parts.items():
        now, bound = errors[part] / eps, max(within, 2 * own[part] / eps)  # large weights put the layer itself off
        if not (wrong or now <= bound):
            wrong = f"{what} are {now:.3g} eps of {name} apart on random input, where rounding explains {bound:.3g}"
    if wrong:
        raise ValueError(
            f"{layer.where}: this {layer.original.__name__} has the parameters of {layer.title}'s attention but "
            f"computes another function: {wrong}; nothing was replaced"
        )
    return errors["out"] / eps


class _Run(NamedTuple):
    """In float64."""

    out: np.ndarray
    """Of valid residues."""
    masked: np.ndarray
    to_single: np.ndarray
    to_pair: np.ndarray
    """Empty without a pair."""


def _run(layer: _Layer, kind: Any, dtype: torch.dtype, *, training: bool = False, masked: bool = True) -> _Run:
    """A copy of a layer as a class, on random input that its own dtype can hold, in a dtype."""
    config, system = layer.settings.config, layer.system
    copied = _bare_copy(layer.module, dtype).train(training)
    copied.__class__ = kind
    copied._ipa_twins = layer.settings
    rng, number = np.random.default_rng(0), RESIDUES
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
    placed = (
        torch.from_numpy(x).to(device, at_least_float32(dtype)) for x in random_frames(rng, (1, number), spread=1.5)
    )
    valid = (rng.random((1, number)) > 0.1) | (not masked)
    single = tensor(rng.standard_normal((1, number, config.num_channel))).requires_grad_()
    pair = None
    if config.pair_channel is not None:
        pair = tensor(rng.standard_normal((1, number, number, config.pair_channel))).requires_grad_()
    cotangent = tensor(rng.standard_normal(single.shape) * valid[..., None])
    inputs = [single] if pair is None else [single, pair]
    with torch.enable_grad(), without_autocast(device.type), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = system.call(copied, single, pair, *placed, tensor(valid), _rigids_of(layer))
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
    copied._parameters = {
        name: None if x is None else nn.Parameter(x.detach().to(dtype), requires_grad=False)
        for name, x in module._parameters.items()
    }
    copied._buffers = dict(module._buffers)
    copied._modules = {name: None if x is None else _bare_copy(x, dtype) for name, x in module._modules.items()}
    return copied


def _rigids_of(layer: _Layer) -> Callable[[Tensor, Tensor], Any]:
    """What makes the rigids that a layer is called with, by the classes that its package has."""
    if layer.adapter is _Lucidrains:
        return Rigid
    classes = ("Rigid", "Rotation", "Rigid3Array")
    namespaces = [vars(sys.modules[x.__module__]) for x in layer.original.__mro__ if x.__module__ in sys.modules]
    known = {name: space[name] for space in reversed(namespaces) for name in classes if name in space}
    if layer.settings.config.layout == "multimer" and "Rigid3Array" in known:
        return lambda rotation, translation: known["Rigid3Array"].from_tensor_4x4(_homogeneous(rotation, translation))
    if "Rigid" in known:
        rotations = known.get("Rotation") or vars(sys.modules[known["Rigid"].__module__])["Rotation"]
        return lambda rotation, translation: known["Rigid"](rotations(rot_mats=rotation, quats=None), translation)
    raise ValueError(f"there is no {' or '.join(classes)} beside {layer.original.__name__} in its module")


def _homogeneous(rotation: Tensor, translation: Tensor) -> Tensor:
    """Rotations and translations as 4×4 matrices."""
    last = torch.tensor([0.0, 0, 0, 1], dtype=rotation.dtype, device=rotation.device)
    upper = torch.cat([rotation, translation[..., None]], -1)
    return torch.cat([upper, last.expand(*upper.shape[:-2], 1, 4)], -2)
