"""Conversion between numpy arrays and torch tensors, including bfloat16, which numpy itself lacks."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike
    from torch import Tensor


def numpy_dtype(dtype: DTypeLike) -> np.dtype:
    """The numpy dtype of a name, including "bfloat16"."""
    if str(dtype) == "bfloat16":
        import ml_dtypes  # registers its names with numpy

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def import_torch() -> ModuleType:
    """Imports PyTorch, which tensors, state dicts and .pt files need.

    Raises:
        ImportError: PyTorch is not installed; the error names the extra to install.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("tensors, state dicts and .pt files need PyTorch: pip install 'ipa-twins[torch]'") from error
    return torch


def torch_tensor(array: np.ndarray) -> Tensor:
    """A contiguous CPU tensor with its own memory and the same bits."""
    torch = import_torch()
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def numpy_array(tensor: Tensor) -> np.ndarray:
    """A tensor's bits as a numpy array; bfloat16 becomes ml_dtypes' bfloat16."""
    torch = import_torch()
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
