"""Compares trained models before and after the swap: every attention, and the whole."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from trained_layers import Call, Result, run_haiku, run_theirs, run_torch
from trained_models import Trained, in_float64

import ipa_torch
from ipa_bridge.replacement import ReplacementReport
from ipa_bridge.weights import Weights
from ipa_parity.report import Comparison, compare

DTYPES = {"float32": torch.float32, "float64": torch.float64}
DRAWS = 3
"""Draws of random noise, of which the one with the largest effect counts."""


@cache
def loaded(trained: Trained) -> nn.Module:
    """The model as its package loads it. It is never run: its class keeps tables in the dtype of the first run."""
    return trained.load()


@cache
def swapped(trained: Trained) -> tuple[nn.Module, ReplacementReport]:
    """The model with our attention, and the report of `replace_ipa`, which compared each layer with its class."""
    model = copy.deepcopy(loaded(trained))
    return model, ipa_torch.replace_ipa(model)


@cache
def calls(trained: Trained) -> dict[str, Call]:
    """Calls of every attention by path, while the whole model runs in float32."""
    model, found = copy.deepcopy(loaded(trained)), {}

    def hook(path: str) -> Any:
        return lambda _, arguments, named: found.update({path: trained.read(arguments, named)})

    for row in swapped(trained)[1].replaced:
        model.get_submodule(row.path).register_forward_pre_hook(hook(row.path), with_kwargs=True)
    trained.predict(model)
    return found


def compare_attention(name: str, trained: Trained, path: str) -> list[Comparison]:
    """One attention: the swapped layer and our modules against the real class in float64, on the file's weights.

    Rows of the subject "before" tell how far the real class itself is off in float32.
    """
    root = path.removeprefix(trained.within)
    weights = Weights.load(trained.path, root=f"{trained.root}{root}", dialect=trained.dialect)
    call, rows = calls(trained)[path], []

    def theirs(model: nn.Module, call: Call, dtype: torch.dtype) -> Result:
        layer = copy.deepcopy(model.get_submodule(path)).to(dtype)
        with in_float64(trained) if dtype is torch.float64 else nullcontext():
            return run_theirs(layer, call, weights, trained.dialect, trained.run)

    def judge(subject: str, dtype: str, actual: Result, expected: Result) -> None:
        assert actual.gradients.keys() == expected.gradients.keys()
        stages = {"out": (actual.out, expected.out)}
        for leaf, exact in expected.gradients.items():
            if exact.any():
                stages[f"gradient/{leaf}"] = actual.gradients[leaf], exact
            else:  # where a mask hides all keys, nothing depends on the logits
                assert not actual.gradients[leaf].any()
        names = {"case": f"{name}: {path}", "dtype": dtype, "subject": subject, "reference": "float64"}
        rows.extend(compare(*pair, stage=stage, **names) for stage, pair in stages.items())

    before = theirs(loaded(trained), call, torch.float64)
    judge("before", "float32", theirs(loaded(trained), call, torch.float32), before)
    for dtype, kind in DTYPES.items():
        judge("swapped", dtype, theirs(swapped(trained)[0], call, kind), before)
        if trained.comparable(call):
            judge("PyTorch", dtype, run_torch(call, weights, kind), before)
            judge("Haiku", dtype, run_haiku(call, weights, kind), before)
    return rows


# --- The whole model


@dataclass(frozen=True)
class Whole:
    """Distances between predictions of a whole model; the reference is the original model in float64."""

    name: str
    dtype: str
    apart: float
    """After the swap from before it."""
    noise: float
    """With half an ulp of relative noise on the embedded inputs from without it."""
    before: float
    """Before the swap from the reference."""
    after: float
    """After the swap from the reference."""


def compare_whole(name: str, trained: Trained, dtype: str, after: nn.Module | None = None) -> Whole:
    """Predictions before and after the swap, beside what noise at the inputs does.

    Args:
        name: the model's name.
        trained: the model.
        dtype: dtype of both runs.
        after: the model to compare; None for the one with our attention swapped in.
    """
    kind = DTYPES[dtype]
    before = predict(trained, loaded(trained), kind)
    exact = predict(trained, loaded(trained), torch.float64)
    new = predict(trained, after or swapped(trained)[0], kind)
    noisy = [predict(trained, loaded(trained), kind, seed=seed) for seed in range(DRAWS)]
    far = superposed if trained.structure else largest
    return Whole(name, dtype, far(new, before), max(far(x, before) for x in noisy), far(before, exact), far(new, exact))


def predict(trained: Trained, model: nn.Module, dtype: torch.dtype, seed: int | None = None) -> np.ndarray:
    """The prediction of a copy of the model in a dtype; with a seed, embedded inputs are noisy by half an ulp."""
    model = copy.deepcopy(model).to(dtype)
    generator = torch.Generator().manual_seed(seed or 0)

    def add_noise(module: nn.Module, arguments: Any, out: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, out.shape, generator=generator) * 2 - 1
        return out * (1 + signs.to(out.dtype) * (torch.finfo(dtype).eps / 2))

    for path in trained.noisy if seed is not None else ():
        model.get_submodule(path).register_forward_hook(add_noise)
    with in_float64(trained) if dtype is torch.float64 else nullcontext():
        return trained.predict(model).double().numpy()


def superposed(x: np.ndarray, y: np.ndarray) -> float:
    """Root mean square distance of atoms after superposition."""
    x, y = x - x.mean(0), y - y.mean(0)
    u, _, v = np.linalg.svd(x.T @ y)
    u[:, -1] *= np.sign(np.linalg.det(u @ v))
    return float(np.sqrt(((x @ u @ v - y) ** 2).sum(-1).mean()))


def largest(x: np.ndarray, y: np.ndarray) -> float:
    """Largest difference."""
    return float(np.abs(x - y).max())
