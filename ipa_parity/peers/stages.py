"""Results of published implementations under the names of our stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.attention.cases import Case
from ipa_parity.attention.stages import Arrays


def torch_gradients(case: Case, module: Any, call: Callable) -> tuple[np.ndarray, Arrays, Arrays]:
    """The output of `call`, and the gradients of Σ cotangent·out to the inputs and to the module's parameters."""
    import torch

    names = ("single", "pair", "rotation", "translation")
    inputs = {name: x for name in names if (x := getattr(case, name)) is not None}
    leaves = {name: torch_tensor(x).requires_grad_() for name, x in inputs.items()}
    parameters = dict(module.named_parameters())
    out = call(*(leaves.get(name) for name in names))
    loss = (out * torch_tensor(case.cotangent)).sum()
    grads = [x.numpy() for x in torch.autograd.grad(loss, [*leaves.values(), *parameters.values()])]
    return (
        out.detach().numpy(),
        dict(zip(leaves, grads[: len(leaves)], strict=True)),
        dict(zip(parameters, grads[len(leaves) :], strict=True)),
    )


def name_stages(out: np.ndarray, by_input: Arrays, by_name: Arrays) -> Arrays:
    """Stages of an attention: its output, and gradients to inputs and to parameters by canonical name."""
    return {"out": out} | {f"gradient/{name}": x for name, x in {**by_input, **by_name}.items()}


def name_layers(output: Mapping[str, np.ndarray], num_layer: int) -> Arrays:
    """Stages by layer; a field without one entry per layer belongs to the last layer."""
    arrays: Arrays = {}
    for field, x in output.items():
        layers = {f"{field}/layer {i + 1}": y for i, y in enumerate(x)} if len(x) == num_layer else {}
        arrays |= layers or {f"{field}/layer {num_layer}": x}
    return arrays
