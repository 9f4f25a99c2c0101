"""Compares outputs and gradients of a layer before and after it is replaced, on random input.

The layer is called with rigids of its own package, whose class is searched for in the modules around the layer.
"""

from __future__ import annotations

import inspect
import math
import sys
import typing
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.replacement import RESIDUES
from ipa_bridge.tolerance import DTYPES, bound
from ipa_torch.dtypes import at_least_float32, without_autocast
from ipa_torch.replace.adapters import original_class
from ipa_torch.replace.recognise import Recognised


def compare_with_original(layer: Recognised) -> tuple[Recognised, float]:
    """A layer with its settings for replacement, and how far outputs before and after differ, in epsilons of its dtype.

    The reference is the original layer in wider arithmetic. If it cannot run in that, the difference contains the
    errors of both layers: bounds are then twice as wide, and the original's error is assumed to be as large as ours.

    Raises:
        ValueError: the difference is larger than rounding explains, or the layer cannot be run.
    """
    device, dtype = layer.module.get_submodule(layer.system.output).weight.device, layer.dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES or device.type == "meta":
        raise ValueError(
            f"{layer.where}: floating-point parameters on a device were expected, to compare before and after; they "
            f"are {dtype} on {device}: pass verify=False to replace it without comparison"
        )
    try:
        with _full_precision():
            wide, batch, truth = _reference(layer)
            layer = _with_nearest_norm(layer, truth, wide, batch)
            training = _run(layer, layer.original, wide, batch=batch, training=True)
            after = _run(layer, layer.replacement, dtype, batch=batch)
            wider = torch.finfo(wide).eps < torch.finfo(dtype).eps
            own = _own_errors(layer, after, truth, dtype if wider or dtype is torch.float64 else None, batch)
            if not all(map(math.isfinite, own.values())):  # float16 cannot store the number subtracted at masked keys
                nobody = {x: _run(layer, layer.original, x, batch=batch, masked=False) for x in (wide, dtype)}
                own = _errors(nobody[dtype], nobody[wide])
                own["masked"] = own["out"]
    except Exception as error:
        raise ValueError(
            f"{layer.where}: the layer could not be compared before and after on random input: "
            f"{type(error).__name__}: {error}; pass verify=False to replace it without comparison"
        ) from error
    sides = 1 if wider or dtype is torch.float64 else 2
    eps = torch.finfo(dtype).eps
    coarser = max(1.0, torch.finfo(layer.system.rounds_to or dtype).eps / eps)
    # Some layers subtract a large number from all logits of a masked row, which rounds them, also in the reference.
    rounded = layer.infinity * torch.finfo(wide).eps / eps
    parts = {
        "outputs": ("out", bound("out", name)),
        "outputs of masked residues": ("masked", bound("out", name) + rounded),
        "gradients to the single representation": ("to_single", bound("gradient", name)),
        "gradients to the pair representation": ("to_pair", bound("gradient", name)),
    }
    wrong = "outputs in training mode differ from those in evaluation mode" if _apart(training.out, truth.out) else ""
    errors = _errors(after, truth)
    for what, (part, within) in parts.items():
        now = errors[part] / eps
        explained = sides * max(coarser * within, 2 * own[part] / eps)  # large weights increase the layer's own error
        if not (wrong or now <= explained):
            wrong = f"{what} are {now:.3g} eps of {name} apart on random input, where rounding explains {explained:.3g}"
    if wrong:
        raise ValueError(
            f"{layer.where}: this {layer.original.__name__} has the parameters of {layer.title}'s attention but "
            f"computes another function: {wrong}; nothing was replaced"
        )
    return layer, errors["out"] / eps


def _reference(layer: Recognised) -> tuple[torch.dtype, tuple[int, ...], _Run]:
    """The widest dtype that the original layer runs in, the batch axes that it accepts, and its results."""
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


def _with_nearest_norm(layer: Recognised, truth: _Run, dtype: torch.dtype, batch: tuple[int, ...]) -> Recognised:
    """The layer with the norm form that fits its outputs best, among those of its system's versions."""
    config = layer.settings.config
    candidates = [
        replace(layer, settings=replace(layer.settings, config=replace(config, norm_form=form)))
        for form in layer.system.norm_forms.get(config.layout, ())
    ]
    if not candidates:
        return layer
    return min(candidates, key=lambda x: _apart(_run(x, x.replacement, dtype, batch=batch).out, truth.out))


def _own_errors(
    layer: Recognised, after: _Run, truth: _Run, dtype: torch.dtype | None, batch: tuple[int, ...]
) -> dict[str, float]:
    """Rounding errors of the original layer in a dtype; with None, or where it cannot run in it, those of ours.

    Ours are measured against itself in float64, and are zeros if it cannot run in float64.
    """
    with suppress(Exception):
        if dtype is not None:
            return _errors(_run(layer, layer.original, dtype, batch=batch), truth)
    try:
        return _errors(after, _run(layer, layer.replacement, torch.float64, batch=batch))
    except Exception:
        return dict.fromkeys(_Run._fields, 0.0)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Enables gradients and full precision of float32 matrix products; restores the previous settings afterwards.

    The older setting of precision raises if PyTorch's newer ones are in use, and changes them when it is set.
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
            switch.fp32_precision = "none"  # follow the setting one level up
            if switch.fp32_precision != value:
                switch.fp32_precision = value


class _Run(NamedTuple):
    """Results of a layer on random input, as float64 arrays."""

    out: np.ndarray
    """Outputs of valid residues."""
    masked: np.ndarray
    """Outputs of masked residues."""
    to_single: np.ndarray
    """Gradient to the single representation."""
    to_pair: np.ndarray
    """Gradient to the pair representation; empty without a pair."""


def _run(
    layer: Recognised,
    kind: Any,
    dtype: torch.dtype,
    *,
    batch: tuple[int, ...],
    training: bool = False,
    masked: bool = True,
) -> _Run:
    """Runs a copy of a layer with the class `kind` in a dtype, on random input that the layer's own dtype can store."""
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
    reads_pair = bool(system.bias) and config.pair_channel is not None and config.pair_bias
    if reads_pair and not cast(Any, copied.get_submodule(system.bias)).weight.any():
        draw(system.bias)
    for name in layer.unused:  # so that their use would change the results
        owner, _, leaf = name.rpartition(".")
        parameter = getattr(copied.get_submodule(owner), leaf)
        drawn = tensor(rng.standard_normal(tuple(parameter.shape)))
        setattr(copied.get_submodule(owner), leaf, nn.Parameter(drawn, requires_grad=False))
    if system.dropout:
        copied.add_module(system.dropout, _InsteadOfDropout())
    placed = (torch.from_numpy(x).to(device, at_least_float32(dtype)) for x in random_frames(rng, shape, spread=1.5))
    valid = (rng.random(shape) > 0.1) | (not masked)
    single = tensor(rng.standard_normal((*shape, config.num_channel))).requires_grad_()
    pair = None
    if config.pair_channel is not None:
        pair = tensor(rng.standard_normal((*shape, RESIDUES, config.pair_channel))).requires_grad_()
    cotangent = tensor(rng.standard_normal(single.shape) * valid[..., None])
    inputs = [single] if pair is None else [single, pair]
    given = system.inputs(single, pair, *placed, tensor(valid), partial(_make_rigids, layer))
    takes = layer.settings.takes
    needed = {x.name: next(iter(x.neutral), None) for x in takes if x.default is inspect.Parameter.empty}
    given = {name: x for name, x in given.items() if name in {argument.name for argument in takes}}
    with without_autocast(device.type), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.set_grad_enabled(system.differentiable):
            returned = getattr(type(copied), system.method)(copied, **(needed | given))
        out = returned[0] if isinstance(returned, tuple) else returned
        gradients: Sequence[Tensor | None] = [None] * len(inputs)
        if system.differentiable:
            gradients = torch.autograd.grad((out * cotangent).sum(), inputs, allow_unused=True)
    to_single, *to_pair = (
        _numpy(torch.zeros_like(x) if g is None else g) for g, x in zip(gradients, inputs, strict=True)
    )
    rows = _numpy(out)
    return _Run(rows[valid], rows[~valid], to_single, to_pair[0] if to_pair else np.zeros(0))


class _InsteadOfDropout(nn.Module):
    """Multiplies channels by fixed numbers: it shows where a layer drops, without random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies the last axis."""
        return x * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype, device=x.device)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _errors(run: _Run, truth: _Run) -> dict[str, float]:
    """Relative error of each part of a run."""
    return {part: _apart(x, y) for part, x, y in zip(_Run._fields, run, truth, strict=True)}


def _apart(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference over the largest expected magnitude."""
    largest = np.abs(expected).max(initial=0)
    difference = np.abs(actual - expected).max(initial=0)
    return float(difference / largest) if largest else float(difference)


def _bare_copy(module: Any, dtype: torch.dtype) -> Any:
    """A copy of the modules without hooks, in another dtype. It shares tensors that have this dtype already."""
    copied = object.__new__(original_class(module))
    vars(copied).update(vars(module))
    for name, value in vars(module).items():
        if "hooks" in name and isinstance(value, dict):
            vars(copied)[name] = type(value)()

    def plain(x: Tensor) -> Tensor:
        """A clone of tensors made in inference mode, which autograd does not accept outside of it."""
        return x.clone() if x.is_inference() else x

    copied._parameters = {
        name: None if x is None else nn.Parameter(plain(x.detach().to(dtype)), requires_grad=False)
        for name, x in module._parameters.items()
    }
    copied._buffers = {name: None if x is None else plain(x) for name, x in module._buffers.items()}
    copied._modules = {name: None if x is None else _bare_copy(x, dtype) for name, x in module._modules.items()}
    return copied


def _make_rigids(layer: Recognised, rotation: Tensor, translation: Tensor) -> Any:
    """The rigids that a layer's forward takes.

    Their class is the annotation of forward's `r`. Without one, it is a class with a usual name in the Python file of
    the layer, or of a module around the layer, since that module has to make rigids to call it.
    """
    if layer.system.rigids is not None:
        return layer.system.rigids(layer.original, rotation, translation)
    kinds = _annotated_rigids(layer.original) or _rigids_beside((layer.original, *layer.callers))
    if not kinds:
        around = " or ".join(dict.fromkeys(x.__name__ for x in (layer.original, *layer.callers)))
        raise ValueError(
            f"a forward whose r is annotated with the class of its rigids, or a Rigid or Rigid3Array in the module "
            f"that defines {around}, was expected; there is neither"
        )
    arrays = [kind for kind in kinds if not hasattr(kind, "get_rots") and hasattr(kind, "from_tensor_4x4")]
    if arrays and (layer.settings.config.layout == "multimer" or arrays == kinds):
        return arrays[0].from_tensor_4x4(_homogeneous(rotation, translation))
    rigid = next((kind for kind in kinds if kind not in arrays), kinds[0])
    rotations = vars(sys.modules[rigid.__module__]).get("Rotation")
    if rotations is None:
        raise ValueError(
            f"a class Rotation was expected in {rigid.__module__}, to make a {rigid.__name__}; there is none"
        )
    return rigid(rotations(rot_mats=rotation, quats=None), translation)


def _annotated_rigids(original: Any) -> list[Any]:
    """The classes that a forward's `r` may be of, by its annotation."""
    try:
        annotation = inspect.signature(original.forward, eval_str=True).parameters["r"].annotation
    except Exception:  # a name that only type checkers import
        return []
    named = typing.get_args(annotation) or (annotation,)
    return [x for x in named if isinstance(x, type) and _is_rigid(x)]


def _is_rigid(kind: type) -> bool:
    return hasattr(kind, "get_rots") or hasattr(kind, "from_tensor_4x4")


def _rigids_beside(kinds: Iterable[type]) -> list[Any]:
    """Classes named `Rigid` or `Rigid3Array` in the modules that define `kinds`, or in modules that those import."""
    names = [x.__module__ for kind in kinds for x in kind.__mro__]
    for name in dict.fromkeys(x for x in names if x in sys.modules):
        own = vars(sys.modules[name])
        imported = [vars(x) for x in own.values() if isinstance(x, ModuleType)]
        package = name.partition(".")[0]
        sources = {getattr(x, "__module__", None) or "" for x in own.values() if inspect.isroutine(x)}
        imported += [
            vars(sys.modules[x]) for x in sorted(sources) if x.partition(".")[0] == package and x in sys.modules
        ]
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
