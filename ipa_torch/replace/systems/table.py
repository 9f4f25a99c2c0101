"""Layers whose dialect says all: our module computes with their parameters, rearranged by the dialect's table.

This is the adapter of classes that `ipa_torch.register_adapter` adds.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ipa_bridge.config import Implementation, IPAConfig
from ipa_bridge.weights.dialects import find_dialect
from ipa_bridge.weights.finding import Found
from ipa_bridge.weights.registration import attention_rows
from ipa_bridge.weights.translation import from_dialect, in_dialect
from ipa_torch.invariant_point_attention import InvariantPointAttention
from ipa_torch.replace.adapters import Adapter, Settings, bind_arguments, check_untouched
from ipa_torch.replace.systems.system import System


class Call(NamedTuple):
    """How a layer's call maps to ours and back."""

    to_ours: Callable[..., Mapping[str, Any]]
    result: Callable[..., Any] | None = None


CALLS: dict[str, Call] = {}
"""Calls of the registered systems, by dialect."""


class TableAdapter(Adapter):
    """Adapter of a registered class: our module, called with the layer's parameters in our names and layout."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Computes our attention on the layer's parameters and returns the result in the layer's form."""
        settings: Settings = self._ipa_twins
        if settings.dialect not in CALLS:
            raise ValueError(
                f"an adapter for the dialect {settings.dialect!r} was expected; there is none in this process: import "
                "the module that calls ipa_torch.register_adapter"
            )
        call = CALLS[settings.dialect]
        check_untouched(self)
        given = bind_arguments(self, arguments, named)
        known = inspect.signature(call.to_ours).parameters
        given = {name: x for name, x in given.items() if name in known}  # others are at their defaults
        module = _module(settings.config, settings.implementation, threading.get_ident())
        out = torch.func.functional_call(module, _our_parameters(self, settings), (), dict(call.to_ours(self, **given)))
        return out if call.result is None else call.result(self, out, **given)


def system_of(
    dialect: str, to_ours: Callable[..., Any], to_theirs: Callable[..., Mapping[str, Any]], method: str
) -> System:
    """The row of `SYSTEMS` for a class whose dialect is registered.

    Raises:
        ValueError: there is no such dialect, or it has no row for an output projection.
    """
    rows = attention_rows(find_dialect(dialect))
    if "output_projection" not in rows:
        raise ValueError(f"{find_dialect(dialect).title} has no row for our output_projection: add it to its dialect")
    takes = list(inspect.signature(to_ours).parameters.values())[1:]
    if any(x.kind in (x.VAR_POSITIONAL, x.VAR_KEYWORD) for x in takes):
        raise ValueError("to_ours must name the layer and then each argument of the layer's call; it has * or **")

    def inputs(single: Tensor, pair: Tensor | None, rotation: Tensor, translation: Tensor, mask: Tensor, _: Any) -> Any:
        return dict(to_theirs(single, pair, rotation.to(single.dtype), translation.to(single.dtype), mask))

    return System(
        TableAdapter,
        takes=tuple(x.name for x in takes if x.default is x.empty),
        optional=tuple(x.name for x in takes if x.default is not x.empty),
        inputs=inputs,
        rigids=lambda original, rotation, translation: None,
        bias=rows.get("attention_2d", ""),
        output=rows["output_projection"],
        method=method,
        calls_projections=False,
    )


@cache
def _module(config: IPAConfig, implementation: Implementation | None, thread: int) -> InvariantPointAttention:
    """Our module without numbers, which takes frames in whatever unit the layer does.

    Each thread has its own, since a call puts the layer's numbers in for as long as it runs.
    """
    with torch.device("meta"):
        return InvariantPointAttention(replace(config, frame_unit=None), implementation=implementation)


class _Source(NamedTuple):
    """Where the numbers of one of our parameters lie in theirs."""

    theirs: str
    shape: tuple[int, ...]
    indices: np.ndarray | None
    """Positions in their flat array; None for all in order."""


def _our_parameters(layer: Any, settings: Settings) -> dict[str, Tensor]:
    """The layer's parameters by our names and in our layout; gradients reach the layer's."""
    found = {}
    for name, source in _sources(settings.dialect, settings.config).items():
        owner, _, leaf = source.theirs.rpartition(".")
        x = getattr(layer.get_submodule(owner), leaf)
        if source.indices is not None:
            x = x.reshape(-1)[torch.from_numpy(source.indices).to(x.device)]
        found[name] = x.reshape(source.shape)
    return found


@cache
def _sources(dialect: str, config: IPAConfig) -> dict[str, _Source]:
    """Where the numbers of each of our parameters lie, found by converting numbered positions."""
    theirs = find_dialect(dialect)
    shapes = {name: transform.their_shape for name, transform in theirs.names(config).values()}
    starts = dict(zip(shapes, np.cumsum([0, *(math.prod(x) for x in shapes.values())])[:-1], strict=True))

    def positions(name: str) -> np.ndarray:
        return starts[name] + np.arange(math.prod(shapes[name])).reshape(shapes[name])

    arrays = from_dialect(Found(theirs, IPAConfig, ""), config, shapes, positions)
    found = {}
    for name, x in in_dialect(arrays, config, find_dialect("ipa_torch")).items():
        owner = max((start, key) for key, start in starts.items() if start <= x.min())[1]
        indices = (x - starts[owner]).reshape(-1)
        in_order = indices.size == math.prod(shapes[owner]) and bool((np.diff(indices) == 1).all())
        found[name] = _Source(owner, x.shape, None if in_order else indices)
    return found


def forget_tables() -> None:
    """Drops what was derived from dialects, which may have been unregistered."""
    _sources.cache_clear()
