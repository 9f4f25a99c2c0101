"""Runs of a whole structure module on one case: every layer's predictions, losses and gradients, in either framework.

Stages are `rotation` and `translation` of the backbone and of the rigid groups, `unnormalized_angles`, `angles`,
`atom14` and `act`, each with `/layer 1` and so on, and `loss/…`, one per term. Gradients of a random combination of
every layer's outputs are `gradient/single`, `…/pair` and `…/<canonical parameter name>`; gradients of one loss term are
`gradient/loss/<term>/single` and `…/pair`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from ipa_bridge.config import Implementation, StructureModuleConfig
from ipa_bridge.weights import canonical_from_haiku, canonical_from_torch
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.attention.stages import Arrays
from ipa_parity.structure_module.cases import StructureModuleCase

TERMS = ("backbone", "sidechain_fape", "chi", "angle_norm", "violation")
"""The loss terms, by their names in `StructureModuleLoss`."""

COTANGENT_SCALES = {"atom14": 0.1, "angles": 1.0, "act": 1.0}
"""Factors in the combination of outputs whose gradients are compared; atoms count in units of 10 Å."""


def run_jax(
    case: StructureModuleCase, *, gradients: bool = True, implementation: Implementation | None = None
) -> Arrays:
    """The Haiku model in the case's dtype, under jit, at the highest matrix precision."""
    import jax

    import ipa_jax

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        to_jax = partial(jax.tree.map, jax.numpy.asarray)
        params, inputs = to_jax(case.weights.to_haiku()), to_jax({"single": case.single, "pair": case.pair})
        aatype, mask, cotangents = to_jax((case.aatype, case.mask, dict(case.cotangents)))
        target = target_of(ipa_jax, case, jax.numpy.asarray)
        predict, pull_back = _compiled_by_jax(case.config, implementation)
        output, losses = jax.tree.map(np.asarray, predict(params, inputs, aatype, mask, target))
        arrays = named_layers(output) | _named_losses(losses)
        if gradients:
            of_combination, *of_losses = (  # one at a time, to save memory
                jax.tree.map(np.asarray, pull_back(params, inputs, aatype, mask, target, cotangents, one))
                for one in jax.numpy.eye(1 + len(TERMS), dtype=inputs["single"].dtype)
            )
            by_module, by_input = of_combination
            by_name = canonical_from_haiku(by_module, case.weights.root)
            rows = {name: [x[name] for _, x in of_losses] for name in inputs}
            arrays |= _named_gradients({**by_input, **by_name}, rows)
    return arrays


@lru_cache(maxsize=16)
def _compiled_by_jax(config: StructureModuleConfig, implementation: Implementation | None) -> tuple[Callable, Callable]:
    """Functions for outputs with losses and for gradients of a weighted sum; cached, because JAX compiles slowly."""
    import jax

    import ipa_jax

    apply = ipa_jax.transform_structure_module(config, implementation=implementation).apply

    def predict(params: Any, inputs: Mapping[str, Any], aatype: Any, mask: Any, target: Any) -> Any:
        output = apply(params, None, inputs["single"], inputs["pair"], aatype, mask)
        return output, jax.numpy.stack(_losses(ipa_jax, output, target))

    def weighted(params: Any, inputs: Mapping[str, Any], *others: Any) -> Any:
        """The weighted sum of the combination of outputs (first weight) and the loss terms (the others)."""
        *target, cotangents, weights = others
        output, losses = predict(params, inputs, *target)
        return weights[0] * _combination(output, cotangents) + (weights[1:] * losses).sum()

    return jax.jit(predict), jax.jit(jax.grad(weighted, (0, 1)))


def run_torch(
    case: StructureModuleCase, *, gradients: bool = True, implementation: Implementation | None = None
) -> Arrays:
    """The torch model in the case's dtype, on CPU."""
    import torch

    import ipa_torch

    state = case.weights.to_torch()
    module = ipa_torch.StructureModule(case.config, implementation=implementation).eval()
    module.to(state["initial_projection.weight"].dtype).load_state_dict(state)
    inputs = {name: torch_tensor(x).requires_grad_(gradients) for name, x in _inputs(case).items()}
    cotangents = {name: torch_tensor(x) for name, x in case.cotangents.items()}
    output = module(inputs["single"], inputs["pair"], torch_tensor(case.aatype), torch_tensor(case.mask))
    losses = _losses(ipa_torch, output, target_of(ipa_torch, case, torch_tensor))
    detached: list[Any] = [
        x.detach().numpy() if isinstance(x, torch.Tensor) else type(x)(*(y.detach() for y in x)) for x in output
    ]
    arrays = named_layers(type(output)(*detached)) | _named_losses(np.array([x.item() for x in losses]))
    if gradients:
        parameters = dict(module.named_parameters())
        leaves = [*inputs.values(), *parameters.values()]
        grads = [x.numpy() for x in torch.autograd.grad(_combination(output, cotangents), leaves, retain_graph=True)]
        by_input = dict(zip(inputs, grads[: len(inputs)], strict=True))
        by_name = canonical_from_torch(dict(zip(parameters, grads[len(inputs) :], strict=True)), case.config)
        rows = [torch.autograd.grad(x, list(inputs.values()), retain_graph=True) for x in losses]
        of_losses = {name: [row[i].numpy() for row in rows] for i, name in enumerate(inputs)}
        arrays |= _named_gradients({**by_input, **by_name}, of_losses)
    return arrays


RUNNERS: dict[str, Callable[..., Arrays]] = {"jax": run_jax, "torch": run_torch}


def _inputs(case: StructureModuleCase) -> Arrays:
    return {"single": case.single, "pair": case.pair}


def _combination(output: Any, cotangents: Mapping[str, Any]) -> Any:
    """Σ cotangent·output over all layers, atoms in units of 10 Å."""
    return sum(COTANGENT_SCALES[field] * (getattr(output, field) * x).sum() for field, x in cotangents.items())


def target_of(ipa: Any, case: StructureModuleCase, array: Callable[[np.ndarray], Any]) -> Any:
    """The true structure as the target that the losses of `ipa` (either package) take."""
    return ipa.structure_target(
        array(case.atom37),
        array(case.atom37_mask),
        array(case.aatype),
        array(case.mask),
        array(case.residue_index),
        chain_id=None if case.chain_id is None else array(case.chain_id),
    )


def _losses(ipa: Any, output: Any, target: Any) -> list[Any]:
    terms = ipa.structure_module_loss(output, target)
    return [getattr(terms, term) for term in TERMS]


def named_layers(output: Any) -> Arrays:
    """Stages by name and layer from an output that holds numpy arrays."""
    fields = {
        "rotation": output.rigids.rotation,
        "translation": output.rigids.translation,
        "group_rotation": output.frames.rotation,
        "group_translation": output.frames.translation,
        "angles": output.angles,
        "unnormalized_angles": output.unnormalized_angles,
        "atom14": output.atom14,
        "act": output.act,
    }
    return {f"{field}/layer {i + 1}": np.asarray(x) for field, layers in fields.items() for i, x in enumerate(layers)}


def _named_losses(values: np.ndarray) -> Arrays:
    return {f"loss/{term}": values[i : i + 1] for i, term in enumerate(TERMS)}


def _named_gradients(of_combination: Mapping[str, np.ndarray], of_losses: Mapping[str, Sequence[np.ndarray]]) -> Arrays:
    arrays = {f"gradient/{name}": x for name, x in of_combination.items()}
    for name, rows in of_losses.items():
        arrays |= {f"gradient/loss/{term}/{name}": rows[i] for i, term in enumerate(TERMS)}
    return arrays
