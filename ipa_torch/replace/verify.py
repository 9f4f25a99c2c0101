"""Compares outputs and gradients of a layer before and after it is replaced, on random input.

The layer is called with rigids of its own package, whose class is searched for in the modules around the layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.replacement import RESIDUES
from ipa_bridge.tolerance import DTYPES, bound
from ipa_torch.dtypes import at_least_float32, without_autocast
from ipa_torch.replace.arguments import role
from ipa_torch.replace.copies import randomised_copy
from ipa_torch.replace.pair_masks import PAIR_MASK
from ipa_torch.replace.recognise import Recognised
from ipa_torch.replace.rigids import homogeneous, makers_of_rigids, rotation_and_translation


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
            wide, call, layer, truth = _settled(layer)
            other = _run(layer, layer.original, wide, call, other_mode=True)
            after = _run(layer, layer.replacement, dtype, call)
            wider = torch.finfo(wide).eps < torch.finfo(dtype).eps
            own = _own_errors(layer, after, truth, call, runs=wider or dtype is torch.float64)
            if dtype is torch.float64:
                own = _with_casts(layer, own, truth, call)
            if not all(map(math.isfinite, own.values())):  # float16 cannot store the number subtracted at masked keys
                nobody = {x: _run(layer, layer.original, x, call, masked=False) for x in (wide, dtype)}
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
    wrong = "outputs in training mode differ from those in evaluation mode" if _differ(other, truth) else ""
    if reads := sorted(truth.read ^ after.read):
        wrong = f"only one of its forward and ours reads {', '.join(reads)}"
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
    unused = {*layer.unused, *(set(layer.unknown) - truth.read)}
    return replace(layer, unused=tuple(sorted(unused))), errors["out"] / eps


def _settled(layer: Recognised) -> tuple[torch.dtype, _Call, Recognised, _Run]:
    """The widest dtype that the original layer runs in, how it is called, the layer as it computes, and its results.

    What names and shapes leave open is found with an implementation that has every dtype and mask.
    """
    implementation = layer.settings.implementation
    layer = replace(layer, settings=replace(layer.settings, implementation="reference"))
    wide, call, layer, truth = _reference(layer)
    layer = _with_pair_mask(_with_nearest_config(layer, truth, wide, call), wide, call)
    return wide, call, replace(layer, settings=replace(layer.settings, implementation=implementation)), truth


class _Call(NamedTuple):
    """How the layer's own forward is called."""

    batch: tuple[int, ...]
    """Axes before the residues."""
    mask_is_boolean: bool
    in_training: bool
    """True for a layer that can be differentiated in training mode only."""
    make_rigids: Callable[[Tensor, Tensor], Any]


def _reference(layer: Recognised) -> tuple[torch.dtype, _Call, Recognised, _Run]:
    """The widest dtype that the original layer runs in, how it is called, the layer, and its results.

    A layer that needs a pair mask gets the form of it for which our outputs are nearest.
    """
    device = layer.module.get_submodule(layer.system.output).weight.device
    dtypes = [torch.float64] if layer.dtype is torch.float64 else [torch.float64, torch.float32]
    if device.type == "mps":
        dtypes = [torch.float32]
    errors: list[Exception] = []
    makers, problem = _makers(layer)
    needs = bool(layer.pair_masks) and any(PAIR_MASK in (x.ours, x.name) and x.is_needed for x in layer.settings.takes)
    layers = [_with_form(layer, form) for form in layer.pair_masks] if needs else [layer]
    for dtype, *how in product(dtypes, ((1,), ()), (False, True), (False, True), makers):
        call, ran = _Call(*how), []
        for each in layers:
            try:
                truth = _run(each, each.original, dtype, call)
                ours = _run(each, each.replacement, dtype, call) if len(layers) > 1 else truth
                ran.append((_apart(ours.out, truth.out) + _apart(ours.masked, truth.masked), each, truth))
            except Exception as error:
                errors.append(error)
        if ran:
            _, layer, truth = min(ran, key=lambda x: x[0] if math.isfinite(x[0]) else math.inf)
            return dtype, call, layer, truth
    raise problem or errors[0]


def _with_form(layer: Recognised, form: str) -> Recognised:
    return replace(layer, settings=replace(layer.settings, pair_mask=form))


def _with_nearest_config(layer: Recognised, truth: _Run, dtype: torch.dtype, call: _Call) -> Recognised:
    """The layer with the norm form and epsilon that fit its outputs best, and with a mask of keys if that fits better.

    Norm forms are those of its system's versions; another one than the first must fit better by a factor.
    """
    config, best, least = layer.settings.config, layer, math.inf
    forms = layer.system.norm_forms.get(config.layout, ()) or (config.norm_form,)
    candidates = list(product(forms, layer.epsilons or (config.norm_epsilon,)))
    for form, epsilon in candidates if len(candidates) > 1 else ():
        try:
            changed = replace(config, norm_form=form, norm_epsilon=epsilon)
        except ValueError:  # this form cannot have this epsilon
            continue
        each = replace(layer, settings=replace(layer.settings, config=changed))
        apart = _apart(_run(each, each.replacement, dtype, call).out, truth.out)
        if apart < least / 4:
            best, least = each, apart
    keys = replace(best, settings=replace(best.settings, keys_only=True))
    for each in (best, keys):
        if _apart(_run(each, each.replacement, dtype, call).masked, truth.masked) < 1e-3:
            return each
    return best


def _with_pair_mask(layer: Recognised, dtype: torch.dtype, call: _Call) -> Recognised:
    """The layer with the form of its pair mask for which outputs and gradients agree; without one if none does."""
    argument = next((x for x in layer.settings.takes if PAIR_MASK in (x.ours, x.name)), None)
    if argument is None or argument.is_needed:
        return layer
    for form in layer.pair_masks:
        each = _with_form(layer, form)
        try:
            theirs, ours = (_run(each, kind, dtype, call, pairs=True) for kind in (each.original, each.replacement))
        except Exception:  # another shape, or another meaning of the argument
            continue
        if all(_errors(ours, theirs)[part] < 1e6 * torch.finfo(dtype).eps for part in ("out", "to_single", "to_pair")):
            return each
    return _with_form(layer, "")


def _own_errors(layer: Recognised, after: _Run, truth: _Run, call: _Call, *, runs: bool) -> dict[str, float]:
    """Rounding errors of the original layer in its dtype, or of ours if it has none (`runs` is False) or cannot run.

    Ours are measured against itself in float64, and are zeros if it cannot run in float64.
    """
    with suppress(Exception):  # some layers in half precision run under autocast only
        if runs:
            return _errors(_run(layer, layer.original, layer.dtype, call), truth)
    try:
        return _errors(after, _run(layer, layer.replacement, torch.float64, call))
    except Exception:
        return dict.fromkeys(_PARTS, 0.0)


def _with_casts(layer: Recognised, own: dict[str, float], truth: _Run, call: _Call) -> dict[str, float]:
    """Errors of a float64 layer with those of casts to float32 in it, found by turning all frames alike.

    Only errors of float32's size count. Frames that the rigids' class casts are the same for both layers.
    """
    try:
        probe = torch.eye(3, dtype=torch.float64)[None, None]
        made = rotation_and_translation(call.make_rigids(probe, probe[..., 0]))
        if any(x.dtype is not torch.float64 for x in made):
            return own
        turned = _errors(_run(layer, layer.original, torch.float64, call, turned=True), truth)
    except Exception:
        return own
    largest = 64 * torch.finfo(torch.float32).eps
    return {part: max(x, turned[part] if turned[part] < largest else 0) for part, x in own.items()}


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
    read: frozenset[str]
    """Unknown parameters that have a gradient."""


_PARTS = ("out", "masked", "to_single", "to_pair")


def _run(
    layer: Recognised,
    kind: Any,
    dtype: torch.dtype,
    call: _Call,
    *,
    other_mode: bool = False,
    masked: bool = True,
    pairs: bool = False,
    turned: bool = False,
) -> _Run:
    """Runs a copy of a layer with the class `kind` in a dtype, on random input that the layer's own dtype can store.

    Args:
        layer: the layer.
        kind: class of the copy.
        dtype: dtype of parameters and inputs.
        call: how the layer is called.
        other_mode: True to run it in evaluation mode if it is usually run in training mode, and the reverse. Dropout is
            off in both. Gradients are left out then.
        masked: False for a mask that hides nobody.
        pairs: True to give a pair mask, also if it has a default.
        turned: True to turn all frames alike, which changes nothing but rounding.
    """
    config, system = layer.settings.config, layer.system
    rng, shape = np.random.default_rng(0), (*call.batch, RESIDUES)
    device = layer.module.get_submodule(system.output).weight.device

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(device, layer.dtype).to(dtype)

    copied, drawn = randomised_copy(layer, kind, dtype, rng, tensor)
    copied.train(call.in_training != other_mode)
    frames = random_frames(rng, shape, spread=1.5)
    if turned:
        turn = random_frames(np.random.default_rng(1), ())[0]
        frames = turn @ frames[0], frames[1] @ turn.T
    placed = (torch.from_numpy(x).to(device, at_least_float32(dtype)) for x in frames)
    valid = (rng.random(shape) > 0.1) | (not masked)
    single = tensor(rng.standard_normal((*shape, config.num_channel))).requires_grad_()
    pair = None
    if config.pair_channel is not None:
        pair = tensor(rng.standard_normal((*shape, RESIDUES, config.pair_channel))).requires_grad_()
    cotangent = tensor(rng.standard_normal(single.shape) * valid[..., None])
    inputs = [single, *(() if pair is None else (pair,)), *drawn.values()]
    given = system.inputs(
        single, pair, *placed, tensor(valid).bool() if call.mask_is_boolean else tensor(valid), call.make_rigids
    )
    if layer.settings.pair_mask:
        shown = (rng.random((*shape, RESIDUES)) > 0.1) | (not masked) | np.eye(RESIDUES, dtype=bool) if pairs else True
        given[PAIR_MASK] = _pair_mask(layer, tensor((valid[..., :, None] & valid[..., None, :] & shown).astype(float)))
    with without_autocast(device.type), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.set_grad_enabled(system.differentiable):
            returned = getattr(type(copied), system.method)(copied, **_by_their_names(layer, given, pairs=pairs))
        out = returned[0] if isinstance(returned, tuple) else returned
        gradients: Sequence[Tensor | None] = [None] * len(inputs)
        if system.differentiable and not other_mode:
            gradients = torch.autograd.grad((out * cotangent).sum(), inputs, allow_unused=True)
    read = frozenset(name for name, g in zip(drawn, gradients[-len(drawn) :], strict=False) if g is not None)
    to_single, *to_pair = (
        _numpy(torch.zeros_like(x) if g is None else g)
        for g, x in zip(gradients, inputs[: 1 + (pair is not None)], strict=False)
    )
    rows = _numpy(out)
    return _Run(rows[valid], rows[~valid], to_single, to_pair[0] if to_pair else np.zeros(0), read)


def _by_their_names(layer: Recognised, given: dict[str, Any], *, pairs: bool) -> dict[str, Any]:
    """Arguments of a call by the names in the layer's own forward; those without a default get their neutral value."""
    named = {}
    for argument in layer.settings.takes:
        ours = argument.ours or argument.name
        is_asked = ours != PAIR_MASK or pairs or argument.is_needed or layer.system.pair_masks is None
        if ours in given and is_asked:
            named[argument.name] = given[ours]
        elif argument.is_needed:
            named[argument.name] = next(iter(argument.neutral), None)
    return named


def _pair_mask(layer: Recognised, shown: Tensor) -> Tensor:
    """A pair mask in the layer's form, from 1 where residue i may attend to residue j and else 0."""
    form = layer.settings.pair_mask
    x = shown if form.startswith("shown") else 3e4 * (shown - 1)  # float16 can store it
    return x.unsqueeze(-3) if form.endswith("per head") else x


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _errors(run: _Run, truth: _Run) -> dict[str, float]:
    """Relative error of each part of a run."""
    return {part: _apart(x, y) for part, x, y in zip(_PARTS, run[:4], truth[:4], strict=True)}


def _apart(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference over the largest expected magnitude."""
    largest = np.abs(expected).max(initial=0)
    difference = np.abs(actual - expected).max(initial=0)
    return float(difference / largest) if largest else float(difference)


def _differ(run: _Run, truth: _Run) -> bool:
    """True if outputs differ by more than a cast to float32 explains."""
    return _apart(run.out, truth.out) > 64 * torch.finfo(torch.float32).eps


def _makers(layer: Recognised) -> tuple[list[Callable[[Tensor, Tensor], Any]], Exception | None]:
    """Functions that may make the rigids that a layer's forward takes, and the error if none of them can."""
    if layer.system.rigids is not None:
        return [partial(layer.system.rigids, layer.original)], None
    argument = next((x.name for x in layer.settings.takes if role(x.ours or x.name) == "frames"), "")
    arrays = layer.settings.config.layout == "multimer"
    makers = list(makers_of_rigids(layer.original, argument, layer.callers, arrays=arrays)) if argument else []
    if not argument:  # its system makes its frames itself
        return [lambda rotation, translation: None], None
    plain: list[Callable[[Tensor, Tensor], Any]] = [homogeneous, lambda rotation, translation: (rotation, translation)]
    if makers:
        return [*makers, *plain], None
    around = " or ".join(dict.fromkeys(x.__name__ for x in (layer.original, *layer.callers)))
    problem = ValueError(
        f"a forward whose {argument} is annotated with the class of its rigids, or a Rigid or Rigid3Array in the "
        f"module that defines {around}, was expected; there is neither"
    )
    return plain, problem
