"""numpy arrays to torch tensors and back, bfloat16 included, which numpy has no name for of its own."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike
    from torch import Tensor


def numpy_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of that name, "bfloat16" included."""
    if str(dtype) == "bfloat16":
        import ml_dtypes  # registers its names with numpy

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def import_torch() -> ModuleType:
    """PyTorch, which tensors, state dicts and .pt files need.

    Raises:
        ImportError: it is not installed; the error says what to install.
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
    """The same bits as an array; bfloat16 as ml_dtypes' bfloat16."""
    torch = import_torch()
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
