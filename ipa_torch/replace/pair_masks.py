"""Masks of other projects that say for each pair of residues who may attend to whom."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PAIR_MASK = "pair_mask"
"""Our name of the argument that says who may attend to whom, for layers that have one."""

FORMS = ("added per head", "shown per head", "shown", "added")
"""Forms of such a mask: 1 where residue i may attend to residue j and else 0 ("shown"), or a number to add to their
logit. The mask is (*B, N, N), or has an axis for the heads before the last two, of size 1 ("per head")."""

HIDES = 1e4
"""A logit that is lower than another one of its row by this number or more has a weight of zero."""

_INFINITY = {"residues": 1e5, "shown": 1e7, "shown per head": 1e5}
"""Number to subtract where a mask hides, for the residue mask and by form.

Any number above `HIDES` gives the same weights, except in a row that one of two masks hides everywhere: the smaller
number counts there. MultiFlow's is 1e7, and MDGen's is that of its residue mask.
"""


class Allowed(NamedTuple):
    """Who may attend to whom: either a mask, or numbers to add to the logits."""

    pair_mask: Tensor | None
    added: Tensor | None


def allowed(
    pair_mask: Tensor, form: str, mask: Tensor | None, batch: torch.Size, *, keys_only: bool, name: str
) -> Allowed:
    """Who may attend to whom by another project's pair mask and its residue mask, which both add to the logits.

    A residue that may attend to none, such as a masked one, attends by its logits: subtracting the same number from
    all of them changes nothing.

    Args:
        pair_mask: the pair mask, as the layer takes it.
        form: one of `FORMS`.
        mask: residue mask, *B + (N,); None for none.
        batch: *B + (N,).
        keys_only: True if the residue mask hides keys from masked residues too.
        name: the layer's name for the pair mask.

    Raises:
        ValueError: the shape or the values are none that the form has.
    """
    if form.endswith("per head"):
        if pair_mask.ndim > 2 and pair_mask.shape[-3] != 1:
            raise ValueError(
                f"{name} must have one mask for all heads, with an axis of size 1 before the last two; got shape "
                f"{tuple(pair_mask.shape)}: call restore_ipa to mask heads differently"
            )
        pair_mask = pair_mask.squeeze(-3) if pair_mask.ndim > 2 else pair_mask
    dtype = torch.promote_types(pair_mask.dtype, torch.float32)
    added = pair_mask.to(dtype)
    if form.startswith("shown"):
        added = _INFINITY[form] * (added - 1)
    if mask is not None:
        valid = mask.to(dtype)
        added = added + _INFINITY["residues"] * ((1 if keys_only else valid[..., :, None]) * valid[..., None, :] - 1)
    added = added.expand(*batch, batch[-1])
    below = added - added.amax(-1, keepdim=True).detach()
    hidden = below <= -HIDES
    if _may_read_values(added):
        partly = bool(((below.detach() < 0) & ~hidden).any())
        if partly and form.startswith("shown"):
            raise ValueError(f"{name} must hold 1 where a residue may attend to another and 0 elsewhere; it has others")
        if not partly:
            return Allowed(~hidden, None)
    elif form.startswith("shown"):
        return Allowed(~hidden, None)
    return Allowed(None, below.clamp(min=-10 * HIDES))


def _may_read_values(x: Tensor) -> bool:
    """True unless values are unknown, as in a trace, or a gradient to them is needed."""
    functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return not (torch.compiler.is_compiling() or functorch or x.requires_grad or x.device.type == "meta")
