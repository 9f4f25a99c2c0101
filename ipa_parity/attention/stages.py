"""Runs of one case in a framework or in the oracle: every stage of Algorithm 22 as named arrays.

Stages are `logits`, `attention`, `o`, `points` (local), `norms`, `o_pair` and `out`; gradients of Σ cotangent·out
are `gradient/single`, `…/pair`, `…/rotation`, `…/translation` and `…/<canonical parameter name>`. All are recorded
from the model's own calls except the logits: the reference computes those from the model's own projections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ipa_bridge import oracle
from ipa_bridge.config import Implementation, IPAConfig
from ipa_bridge.weights import canonical_from_haiku, canonical_from_torch
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.attention.cases import Case

Arrays = dict[str, np.ndarray]


def run_oracle(case: Case) -> Arrays:
    """The stages in float64 numpy, without gradients."""
    inputs = (case.single, case.pair, case.rotation, case.translation, case.mask, case.key_mask, case.pair_mask)
    stages = oracle.invariant_point_attention(case.weights.arrays, case.config, *inputs)
    named = {"points" if name == "o_points" else name: array for name, array in stages._asdict().items()}
    return {name: array for name, array in named.items() if array is not None}


def run_jax(case: Case, *, gradients: bool = True, implementation: Implementation | None = None) -> Arrays:
    """The Haiku model in the case's dtype, under jit, at the highest matrix precision."""
    import jax

    import ipa_jax

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        params = jax.tree.map(jax.numpy.asarray, case.weights.to_haiku())
        inputs = {name: jax.numpy.asarray(x) for name, x in _inputs(case).items()}
        masks = {name: jax.numpy.asarray(x) for name, x in _masks(case).items()}
        cotangent = jax.numpy.asarray(case.cotangent)
        rigids = ipa_jax.Rigid(inputs["rotation"], inputs["translation"])
        forward, gradient = _compiled_by_jax(case.config, implementation)
        stages = jax.tree.map(np.asarray, forward(params, inputs["single"], inputs.get("pair"), rigids, masks))
        arrays = _named_stages(case.config, *stages)
        if gradients:
            by_module, by_input = jax.tree.map(np.asarray, gradient(params, inputs, masks, cotangent))
            by_name = canonical_from_haiku(by_module, case.weights.root)
            arrays |= {f"gradient/{name}": x for name, x in {**by_input, **by_name}.items()}
    return arrays


@lru_cache(maxsize=32)
def _compiled_by_jax(config: IPAConfig, implementation: Implementation | None) -> tuple[Callable, Callable]:
    """Functions for every stage and for the gradients of Σ cotangent·out; cached, because JAX compiles slowly."""
    import haiku as hk
    import jax

    import ipa_jax
    from ipa_jax.attention.reference import attention_logits

    def forward(single: Any, pair: Any, rigids: Any, masks: Mapping[str, Any]) -> Any:
        seen: dict[str, Any] = {}

        def watch(call: Callable, args: tuple, kwargs: dict, context: hk.MethodContext) -> Any:
            result = call(*args, **kwargs)
            if context.module.name == "output_projection":
                seen["features"] = args[0]
            seen[context.method_name] = result
            return result

        ipa = ipa_jax.InvariantPointAttention(config, implementation=implementation)
        with hk.intercept_methods(watch):
            out, attention = ipa(single, pair, rigids, **masks, return_attention=True)
        logits = _logits(config, attention_logits, seen, pair, masks["mask"], jax.numpy.astype)
        return out, attention, seen["features"], logits

    def loss(params: Any, inputs: Mapping[str, Any], masks: Mapping[str, Any], cotangent: Any) -> Any:
        rigids = ipa_jax.Rigid(inputs["rotation"], inputs["translation"])
        apply = ipa_jax.transform_ipa(config, implementation=implementation).apply
        return (apply(params, inputs["single"], inputs.get("pair"), rigids, **masks) * cotangent).sum()

    transformed: Any = hk.without_apply_rng(hk.transform(forward))
    return jax.jit(transformed.apply), jax.jit(jax.grad(loss, argnums=(0, 1)))


def run_torch(case: Case, *, gradients: bool = True, implementation: Implementation | None = None) -> Arrays:
    """The torch model in the case's dtype, on CPU."""
    import torch

    import ipa_torch
    from ipa_torch.attention.reference import attention_logits

    state = case.weights.to_torch()
    module = ipa_torch.InvariantPointAttention(case.config, implementation=implementation)
    module.to(state["trainable_point_weights"].dtype).load_state_dict(state)
    inputs = {name: torch_tensor(x).requires_grad_(gradients) for name, x in _inputs(case).items()}
    masks: dict[str, Any] = {name: torch_tensor(x) for name, x in _masks(case).items()}
    cotangent = torch_tensor(case.cotangent)
    rigids = ipa_torch.Rigid(inputs["rotation"], inputs["translation"])
    seen: dict[str, Any] = {}

    def watch(name: str) -> None:
        method = getattr(module, name)
        setattr(module, name, lambda *args: seen.setdefault(name, method(*args)))

    with torch.no_grad():
        watch("project")
        watch("logit_weights")
        hook = module.output_projection.register_forward_pre_hook(lambda _, args: seen.update(features=args[0]))
        out, attention = module(inputs["single"], inputs.get("pair"), rigids, **masks, return_attention=True)
        logits = _logits(case.config, attention_logits, seen, inputs.get("pair"), masks["mask"], torch.Tensor.to)
        arrays = _named_stages(case.config, *(_from_torch(x) for x in (out, attention, seen["features"], logits)))
        hook.remove()
        del module.project, module.logit_weights
    if gradients:
        parameters = dict(module.named_parameters())
        loss = (module(inputs["single"], inputs.get("pair"), rigids, **masks) * cotangent).sum()
        grads = torch.autograd.grad(loss, [*inputs.values(), *parameters.values()])
        by_input = dict(zip(inputs, map(_from_torch, grads[: len(inputs)]), strict=True))
        by_name = dict(zip(parameters, map(_from_torch, grads[len(inputs) :]), strict=True))
        by_name = canonical_from_torch(by_name, case.config)
        arrays |= {f"gradient/{name}": x for name, x in {**by_input, **by_name}.items()}
    return arrays


RUNNERS: dict[str, Callable[..., Arrays]] = {"jax": run_jax, "torch": run_torch}


def _inputs(case: Case) -> Arrays:
    """The inputs that gradients are taken to."""
    inputs = {"single": case.single, "pair": case.pair, "rotation": case.rotation, "translation": case.translation}
    return {name: x for name, x in inputs.items() if x is not None}


def _masks(case: Case) -> Arrays:
    """The masks by the names of the modules' arguments."""
    masks = {"mask": case.mask, "key_mask": case.key_mask, "pair_mask": case.pair_mask}
    return {name: x for name, x in masks.items() if x is not None}


def _logits(
    config: IPAConfig, attention_logits: Callable, seen: Mapping[str, Any], pair: Any, mask: Any, cast: Callable
) -> Any:
    """The reference's logits from the model's own queries, keys and points; `cast(x, dtype)` converts an array."""
    q, k, _, q_points, k_points, _ = seen["project"]
    pair_bias_weight, point_weights = seen["logit_weights"]
    return attention_logits(
        q,
        k,
        q_points,
        k_points,
        None if pair is None else cast(pair, q.dtype),
        pair_bias_weight=None if pair_bias_weight is None else cast(pair_bias_weight, q.dtype),
        point_weights=cast(point_weights, q.dtype),
        mask=cast(mask, q.dtype),
        logit_terms=config.num_logit_terms,
        distance_epsilon=config.distance_epsilon if config.distance_form == "unsquared" else None,
    )


def _named_stages(
    config: IPAConfig, out: np.ndarray, attention: np.ndarray, features: np.ndarray, logits: np.ndarray
) -> Arrays:
    """The stages by name; those after the attention are slices of the output projection's input."""
    heads, point = config.num_head, config.num_head * config.num_point_v
    widths = [heads * config.num_scalar_v, point, point, point, point]
    o, x, y, z, norms, o_pair = np.split(features, np.cumsum(widths), -1)

    def per_head(f: np.ndarray, width: int) -> np.ndarray:
        return f.reshape(*f.shape[:-1], heads, width)

    stages = {
        "logits": logits,
        "attention": attention,
        "o": per_head(o, config.num_scalar_v),
        "points": np.stack([per_head(f, config.num_point_v) for f in (x, y, z)], -1),
        "norms": per_head(norms, config.num_point_v),
        "out": out,
    }
    if config.pair_channel is not None:
        stages["o_pair"] = per_head(o_pair, config.pair_value_channel or config.pair_channel)
    return stages


def _from_torch(tensor: Any) -> np.ndarray:
    """The tensor in numpy; half precision becomes float32, which is exact, because numpy has no bfloat16."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.element_size() == 2 else tensor).numpy()
