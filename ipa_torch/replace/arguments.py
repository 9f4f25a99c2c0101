"""Recognises the arguments of another project's layer by their names, whatever their order."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from ipa_torch.replace.adapters import Argument
from ipa_torch.replace.pair_masks import PAIR_MASK
from ipa_torch.replace.systems import System

ROLES: Mapping[str, tuple[str, ...]] = {
    "single representation": (
        *("s", "single", "single_repr", "single_rep", "single_representation", "single_act", "inputs_1d", "s_i", "act"),
        *("node", "nodes", "node_embed", "node_repr", "node_feats", "node_features", "node_h", "x", "h", "inputs"),
    ),
    "pair representation": (
        *("z", "pair", "pairwise_repr", "pair_repr", "pair_rep", "pair_representation", "pair_act", "inputs_2d"),
        *("z_ij", "edge", "edges", "edge_embed", "edge_repr", "edge_feats", "edge_features", "edge_h", "p", "e"),
    ),
    "frames": (
        *("r", "rigid", "rigids", "frame", "frames", "affine", "affines", "transform", "transforms", "curr_rigids"),
        *("bb_to_global", "backb_to_global", "backbone", "backbone_frames", "rigids_t", "T", "t", "f"),
    ),
    "residue mask": (
        *("mask", "single_mask", "seq_mask", "node_mask", "residue_mask", "res_mask", "frame_mask", "frames_mask"),
        *("sequence_mask", "valid_mask", "bb_mask"),
    ),
    "pair mask": ("pair_mask", "square_mask", "attn_mask", "attention_mask", "mask_2d", "edge_mask"),
}
"""Names that layers give to an argument of each kind; the first one present counts."""


def arguments_taken(system: System, original: Any, *, pair_free: bool) -> tuple[Argument, ...] | str:
    """The arguments of a layer's own forward, or the reason why our attention cannot be called with them.

    An argument without a counterpart in our attention is accepted if it has a default, and later only at that value.

    Args:
        system: the system that the layer is from.
        original: class of the layer.
        pair_free: True if the layer has no parameters that read a pair.
    """
    every = list(inspect.signature(getattr(original, system.method)).parameters.values())[1:]
    parameters = [x for x in every if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)]
    taken = ", ".join(x.name for x in every)
    if any(x.kind is x.POSITIONAL_ONLY for x in parameters):
        return f"its {system.method} takes {taken}, and arguments with names were expected"
    flags = {x.lstrip("_"): x for x in system.flags}
    known = {*system.neutral_arguments, *system.optional, *(x.name for x in parameters if x.name.lstrip("_") in flags)}
    needed = [x.name for x in parameters if x.default is x.empty and x.name not in known]
    ours = _called(system.takes, [x.name for x in parameters if x.name not in known], needed)
    pair_mask = next((x.name for name in ROLES["pair mask"] for x in parameters if x.name == name), None)
    if system.pair_masks is not None and pair_mask and pair_mask not in ours:
        ours[pair_mask] = PAIR_MASK
    dispensable = {*system.dispensable} | {
        name for name in system.takes if pair_free and role(name) == "pair representation"
    }
    for name in system.takes:
        if name not in ours.values() and name not in dispensable:
            names = ", ".join(ROLES.get(role(name), (name,)))
            what = role(name) or name
            return f"its {system.method} takes {taken}, and none of them is the {what}: its name may be {names}"
    if strange := [x for x in needed if x not in ours]:
        return (
            f"its {system.method} takes {taken}, and our attention has nothing like {', '.join(strange)}: give it a "
            f"default at which it has no effect, or one of the names of {', '.join(ROLES)}"
        )
    return tuple(
        Argument(
            x.name,
            x.default,
            x.kind is x.KEYWORD_ONLY,
            _neutral(x, system, bool(ours.get(x.name)) or x.name in system.optional or x.name.lstrip("_") in flags),
            ours.get(x.name, flags.get(x.name.lstrip("_"), "")),
        )
        for x in parameters
    )


def _called(takes: Collection[str], names: list[str], needed: list[str]) -> dict[str, str]:
    """Their names of arguments to the system's names: equal names first, then names of the same role, then the rest."""
    ours = {name: name for name in takes if name in names}
    for name in takes:
        if name not in ours.values():
            candidates = [x for x in ROLES.get(role(name), ()) if x in names and x not in ours and x not in takes]
            ours |= {candidates[0]: name} if candidates else {}
    others, pair_masks = [x for x in takes if x not in ours.values()], ROLES["pair mask"]
    unclaimed = [x for x in needed if x not in ours and x not in pair_masks]
    if len(others) == len(unclaimed) == 1:
        ours[unclaimed[0]] = others[0]
    return ours


def role(name: str) -> str:
    """The role of an argument with this name; "" if it has none."""
    return next((title for title, names in ROLES.items() if name in names), "")


def _neutral(parameter: inspect.Parameter, system: System, free: bool) -> tuple[Any, ...]:
    """The only value allowed for an argument, in a tuple; empty if any value is."""
    if parameter.name in system.neutral_arguments:
        return (system.neutral_arguments[parameter.name],)
    return () if free else (parameter.default,)
