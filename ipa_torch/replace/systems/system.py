"""Definition of a system whose layers can be replaced: its call, its submodules and what may differ in its versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipa_bridge.config import NormForm
from ipa_torch.replace.adapters import Adapter


class System(NamedTuple):
    """Properties of a system's layers: one row of `SYSTEMS`."""

    adapter: type[Adapter]
    takes: tuple[str, ...]
    """Names of the arguments of its forward that our attention also has."""
    inputs: Callable[..., dict[str, Any]]
    """Makes these arguments from single, pair, rotation, translation, mask and a function that makes rigids."""
    bias: str
    """Submodule that projects the pair to one bias per head."""
    output: str
    """Submodule of the output projection."""
    pair_values: str = ""
    """Submodule that narrows the pair's channels, if any. Our attention calls it on the sum over the pair."""
    epsilon: str = "eps"
    """Attribute of its published class with the epsilon of lengths, one of `ipa_torch.replace.recognise.EPSILONS`.

    Empty if it has none.
    """
    dispensable: tuple[str, ...] = ()
    """Arguments without which its adapter can be called, for versions that do not take them."""
    pair_masks: Mapping[str, str] | None = None
    """Names of its versions' pair masks and their forms, of `ipa_torch.replace.pair_masks.FORMS`; the comparison finds
    the form of others. None if its adapter takes no pair mask."""
    points: str = ""
    """Path of the linear layer within a point projection; empty if the projection is that layer."""
    norm_forms: Mapping[str, tuple[NormForm, ...]] = {}
    """Norm forms of its versions, by layout. The comparison finds which of them a layer computes."""
    flags: tuple[str, ...] = ()
    """Arguments of some versions that change how the layer computes, but not its result."""
    optional: tuple[str, ...] = ()
    """Arguments of some versions that its adapter reads."""
    neutral_arguments: Mapping[str, Any] = {}
    """Arguments of some versions, with the neutral value at which each has no effect."""
    neutral_attributes: Mapping[str, Any] = {}
    """Attributes of some versions, with the neutral value at which each has no effect."""
    uncalled: tuple[str, ...] = ()
    """Submodules whose parameters our attention reads without calling them."""
    rigids: Callable[[type, Tensor, Tensor], Any] | None = None
    """Makes rigids that a class of layers takes, for the comparison; None for OpenFold's rigids and the like."""
    dropout: str = ""
    """Submodule that drops outputs in training, if any. The adapter calls it as the layer does."""
    rounds_to: torch.dtype | None = None
    """Dtype to which the layer rounds on the way, even if its parameters are in a wider one."""
    differentiable: bool = True
    """False if the layer itself raises where gradients are asked for. Then only outputs are compared."""
    method: str = "forward"
    """The method that computes the attention alone; the layer's own forward calls it."""
    calls_projections: bool = True
    """False if the adapter reads the projections' parameters without calling them."""
