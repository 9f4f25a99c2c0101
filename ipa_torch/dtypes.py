"""The dtypes that arithmetic runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch

_WITH_AUTOCAST = frozenset(x for x in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(x))
"""Devices with autocast. Computed at import, because the Dynamo of PyTorch 2.6 cannot trace the check."""


def widest_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that holds all of these."""
    return reduce(torch.promote_types, dtypes)


def at_least_float32(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic that must not lose coordinates: the widest of these, float32 at the least."""
    return widest_dtype(torch.float32, *dtypes)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off: on CPU it would turn float32 matrix products into bfloat16."""
    if device_type in _WITH_AUTOCAST or torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
