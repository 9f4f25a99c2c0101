"""Our attention inside other people's PyTorch models: their layers, parameters and calls, computed as ours is.

A layer stays the object that it is, with its parameters, buffers and hooks; only its class becomes a subclass of its
own whose `forward` is ours. Nothing of another package is imported: layers are known by the names and shapes of their
parameters.
"""

from __future__ import annotations

import copy
import inspect
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
from ipa_bridge.replacement import ReplacedLayer, ReplacementReport
from ipa_torch.attention import choose_implementation, point_attention
from ipa_torch.invariant_point_attention import Projections, centre, features, lengths, unpack_monomer
from ipa_torch.layers import at_least_float32, without_autocast
from ipa_torch.rigid import Rigid

VERIFIED_WITHIN = {torch.float64: 32.0, torch.float32: 32.0, torch.bfloat16: 2.0, torch.float16: 2.0}
"""Epsilons of its dtype that a layer's outputs before and after may be apart; in half, before is run in float32."""

VERIFIED_ON = 101
"""Residues of the random input: enough for the streamed attention, and no multiple of a block."""


def replace_ipa(model: nn.Module, *, implementation: str | None = None, verify: bool = True) -> ReplacementReport:
    """Lets every invariant point attention in a model compute as ours does.

    Layers of OpenFold 1 and 2 (monomer and multimer), ESMFold, FrameDiff and its family, and the package
    `invariant-point-attention` are known by their parameters. Each keeps its call, its conventions and its
    parameters, the same tensors: optimisers, hooks, `state_dict()`, device and dtype are as before, and a checkpoint
    saved after is one saved before. `restore_ipa` undoes it. Replacing again changes the implementation.

    Args:
        model: any module, an attention itself too.
        implementation: of the attention, see `point_attention`.
        verify: compare each layer with what it was, on random input, in its dtype and on its device.

    Returns:
        What was replaced and how far before and after are apart, and what looked like an attention and was left alone.

    Raises:
        ValueError: there is no layer to replace, or one computes something else than it did or cannot be compared; the
            model is untouched then.
    """
    choose_implementation(implementation, VERIFIED_ON)
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
    errors = [_verify(layer) if verify else None for layer in layers]
    for layer in layers:
        layer.module.__class__ = layer.adapted
        layer.module._ipa_twins = layer.settings
    return ReplacementReport(
        tuple(
            ReplacedLayer(x.path, x.title, x.original.__name__, str(x.dtype).removeprefix("torch."), error)
            for x, error in zip(layers, errors, strict=True)
        ),
        left_alone,
    )


def restore_ipa(model: nn.Module) -> list[str]:
    """Undoes `replace_ipa`; the paths of the layers that are their own again."""
    restored = []
    for path, module in model.named_modules():
        if isinstance(module, _Adapter):
            module.__class__ = _original(module)
            del module._ipa_twins
            restored.append(path)
    return restored


@dataclass(frozen=True)
class _Settings:
    """What a replaced layer computes, and how."""

    config: IPAConfig
    implementation: str | None = None


class _Adapter(nn.Module):
    """What all replaced layers have; the class of one is a subclass of this and of its own.

    It defines nothing else that a layer could have an attribute of the name of.
    """

    _ipa_twins: _Settings

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles know the two classes, for nobody can import the one made of them."""
        _, _, *state = cast(tuple, super().__reduce_ex__(protocol))
        return _new, (_adapter(self), _original(self)), *state


class _OpenFold(_Adapter):
    """Layers of OpenFold, ESMFold and FrameDiff, called with their rigids, and with flags that are of no use here."""

    def forward(self, s: Tensor, z: Tensor | None, r: Any, mask: Tensor, *flags: Any, **options: Any) -> Tensor:
        """The update of the single representation. `z` may come as the only entry of a list, as theirs does."""
        if z is None:
            (z,) = options.get("_z_reference_list") or flags[-1]
        layer, settings = cast(Any, self), self._ipa_twins
        projections, rigids = _in_frames(_openfold_projections(layer, settings.config, s), z, Rigid(*_frames(r)), mask)
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
        pair = None if settings.config.pair_channel is None else pairwise_repr
        if settings.config.pair_channel is not None and pair is None:
            raise ValueError("a pair representation was expected as the second argument; got None")
        h = settings.config.num_head
        scalars = (to(x).unflatten(-1, (h, -1)) for to in (layer.to_scalar_q, layer.to_scalar_k, layer.to_scalar_v))
        points = (_points(to, x) for to in (layer.to_point_q, layer.to_point_k, layer.to_point_v))
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


def _openfold_projections(layer: Any, config: IPAConfig, s: Tensor) -> Projections:
    if config.layout == "monomer":
        points = [_points(x, s) for x in (layer.linear_q_points, layer.linear_kv_points)]
        return unpack_monomer(config, layer.linear_q(s), layer.linear_kv(s), *points)
    h = config.num_head
    q, k, v = (x(s).unflatten(-1, (h, -1)) for x in (layer.linear_q, layer.linear_k, layer.linear_v))
    q_points, k_points, v_points = (
        _points(x, s).unflatten(-1, (h, 3, -1)).transpose(-1, -2)
        for x in (layer.linear_q_points, layer.linear_k_points, layer.linear_v_points)
    )
    return q, k, v, q_points, k_points, v_points


class _System(NamedTuple):
    """What is to be known of a system's layers."""

    adapter: type[_Adapter]
    signature: tuple[str, ...]
    """The arguments that its forward begins with."""
    bias: Callable[[Any], Any]
    """What projects the pair to one number a head."""
    output: Callable[[Any], nn.Linear]
    """What reads the features."""
    epsilon: Callable[[Any], Any]
    """That of lengths."""
    call: Callable[..., Tensor]
    """Its forward on single, pair, rotation, translation, mask and what makes its rigids of two of these."""


def _openfold(epsilon: Callable[[Any], Any]) -> _System:
    return _System(
        _OpenFold,
        signature=("s", "z", "r", "mask"),
        bias=lambda layer: layer.linear_b,
        output=lambda layer: layer.linear_out,
        epsilon=epsilon,
        call=lambda layer, s, z, rotation, translation, mask, rigids: type(layer).forward(
            layer, s, z, rigids(rotation, translation), mask
        ),
    )


def _lucidrains() -> _System:
    return _System(
        _Lucidrains,
        signature=("single_repr", "pairwise_repr", "rotations", "translations", "mask"),
        bias=lambda layer: layer.to_pairwise_attn_bias[0] if hasattr(layer, "to_pairwise_attn_bias") else None,
        output=lambda layer: layer.to_out,
        epsilon=lambda layer: getattr(layer, "eps", None),
        call=lambda layer, s, z, rotation, translation, mask, _: type(layer).forward(
            layer,
            s,
            z,
            rotations=rotation.transpose(-1, -2).to(s.dtype),
            translations=translation.to(s.dtype),
            mask=mask.bool(),
        ),
    )


SYSTEMS = {
    **dict.fromkeys(("openfold", "openfold_v1", "framediff"), _openfold(lambda layer: getattr(layer, "eps", None))),
    "esmfold": _openfold(lambda layer: getattr(getattr(layer, "config", None), "epsilon", None)),
    "lucidrains": _lucidrains(),
}
"""By dialect, whose layers can be replaced."""


def _points(projection: nn.Module, s: Tensor) -> Tensor:
    """A projection to local points, outside of autocast; in OpenFold 2 in a module that would place them too."""
    linear: Any = getattr(projection, "linear", projection)
    with without_autocast(s.device.type):
        return linear(s.to(linear.weight.dtype))


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
    linear: nn.Module | None,
    gamma: Tensor,
) -> tuple[Any, ...]:
    """Lines 4 and 7–10."""
    weight = None
    if linear is not None:
        if not isinstance(linear, nn.Linear):
            raise NotImplementedError(
                f"the pair's bias is projected by a {type(linear).__name__}, of which only the weight would be read: "
                "it must be a torch.nn.Linear; call restore_ipa before it is changed"
            )
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
    settings: _Settings

    @property
    def original(self) -> Any:
        return _original(self.module)

    @property
    def adapted(self) -> Any:
        return _adapted(cast(Any, self.system.adapter), self.original)

    @property
    def dtype(self) -> torch.dtype:
        return self.system.output(self.module).weight.dtype

    @property
    def where(self) -> str:
        return self.path or "the model itself"


@cache
def _adapted(adapter: Any, original: Any) -> Any:
    """The class of a replaced layer."""
    return type(f"IPATwins{original.__name__}", (adapter, original), {"__doc__": adapter.__doc__})


def _new(adapter: Any, original: Any) -> Any:
    """An empty layer of that class, for a copy."""
    cls = _adapted(adapter, original)
    return cls.__new__(cls)


def _adapter(module: nn.Module) -> Any:
    return type(module).__bases__[0]


def _original(module: nn.Module) -> Any:
    """What a layer was made as."""
    return type(module).__bases__[1] if isinstance(module, _Adapter) else type(module)


def _find(model: nn.Module) -> dict[str, _Layer | str]:
    """By path, every attention that can be replaced, and for what looks like one the reason why it cannot."""
    shapes = {name: tuple(x.shape) for name, x in model.named_parameters(remove_duplicate=False)}
    found: dict[str, _Layer | str] = {}
    for candidate in modules(shapes, haiku=False):
        if candidate.kind is IPAConfig and not isinstance(found.get(candidate.root), _Layer):
            found[candidate.root] = _recognise(candidate, model.get_submodule(candidate.root), shapes)
    for path, module in model.named_modules():
        inside_or_around = any(f"{x}.".startswith(f"{path}.") or f"{path}.".startswith(f"{x}.") for x in found)
        if "pointattention" in type(module).__name__.lower().replace("_", "") and not inside_or_around:
            found[path] = "its parameters have the names of no system that is known here"
    return found


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
    if "forward" in vars(module):
        return "its forward was replaced on this very object, as hooks that move a layer between devices do"
    takes = tuple(inspect.signature(_original(module).forward).parameters)[1:]
    if takes[: len(system.signature)] != system.signature:
        return f"its forward takes {', '.join(takes)}, and not {', '.join(system.signature)} first"
    bias, epsilon = system.bias(module), system.epsilon(module)
    if not isinstance(bias, nn.Linear | None):
        return f"its pair's bias is projected by a {type(bias).__name__}, not by a torch.nn.Linear"
    if not isinstance(epsilon, float | int):
        return "it does not tell its epsilon, as .eps or .config.epsilon"
    try:
        return _Layer(found.root, title, module, system, _Settings(replace(config, norm_epsilon=float(epsilon))))
    except ValueError as error:
        return str(error)


def _verify(layer: _Layer) -> float:
    """How far a layer is from what it was, in epsilons.

    Raises:
        ValueError: further than rounding explains, or it cannot be told.
    """
    output, dtype = layer.system.output(layer.module), layer.dtype
    if dtype not in VERIFIED_WITHIN or output.weight.device.type == "meta":
        raise ValueError(
            f"{layer.where}: floating-point parameters on a device were expected, to compare before and after; they "
            f"are {dtype} on {output.weight.device}: pass verify=False to replace it unseen"
        )
    drawn = None
    if not output.weight.any():  # as it starts: all outputs would be equal
        drawn = torch.randn(output.weight.shape, generator=torch.Generator().manual_seed(0)) / output.in_features**0.5
    before = _bare_copy(layer.module, at_least_float32(dtype))
    after = _bare_copy(layer.module, dtype)
    before.__class__, after.__class__ = layer.original, layer.adapted
    after._ipa_twins = layer.settings
    try:
        expected, actual = (_run(layer, copied, drawn) for copied in (before, after))
    except Exception as error:
        raise ValueError(
            f"{layer.where}: it was run on random input, to compare before and after, and said {type(error).__name__}: "
            f"{error}; pass verify=False to replace it unseen"
        ) from error
    apart = float(np.abs(actual - expected).max() / np.abs(expected).max() / torch.finfo(dtype).eps)
    if not apart <= VERIFIED_WITHIN[dtype]:
        raise ValueError(
            f"{layer.where}: this {layer.original.__name__} has the parameters of {layer.title}'s attention but "
            f"computes another function: {apart:.3g} eps of {dtype} apart on random input, where rounding explains "
            f"{VERIFIED_WITHIN[dtype]:.0f}; nothing was replaced"
        )
    return apart


def _run(layer: _Layer, copied: Any, drawn: Tensor | None) -> np.ndarray:
    """The valid rows of a copy's output on random input, in float64."""
    config, output = layer.settings.config, layer.system.output(copied)
    dtype, device = output.weight.dtype, output.weight.device
    if drawn is not None:
        output.weight = nn.Parameter(drawn.to(device, layer.dtype).to(dtype), requires_grad=False)
    rng, number = np.random.default_rng(0), VERIFIED_ON
    frames = random_frames(rng, (1, number), spread=1.5)
    valid = rng.random((1, number)) > 0.1
    arrays = [rng.standard_normal((1, number, config.num_channel)), valid]
    arrays += [] if config.pair_channel is None else [rng.standard_normal((1, number, number, config.pair_channel))]
    single, mask, *pair = (torch.from_numpy(x).to(device, layer.dtype).to(dtype) for x in arrays)
    placed = (torch.from_numpy(x).to(device, at_least_float32(dtype)) for x in frames)
    with torch.no_grad(), without_autocast(device.type), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = layer.system.call(copied, single, pair[0] if pair else None, *placed, mask, _rigids_of(layer))
    return out.double().cpu().numpy()[valid]


def _bare_copy(module: nn.Module, dtype: torch.dtype) -> Any:
    """The same modules without hooks, on the same numbers in that dtype, which are shared where it is theirs."""
    copied = copy.copy(module)
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
    if layer.system.adapter is _Lucidrains:
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
