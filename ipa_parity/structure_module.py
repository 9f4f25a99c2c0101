"""The whole structure module on one case: every layer's predictions, losses and gradients in both frameworks.

Stages are `rotation` and `translation` of the backbone and of the rigid groups, `unnormalized_angles`, `angles`,
`atom14` and `act`, each `…/layer 1` and so on, and `loss/…`, one per term. Gradients of a random combination of every
layer's outputs are `gradient/single`, `…/pair` and `…/<canonical parameter name>`; those of a loss's term
`gradient/loss/<term>/single` and `…/pair`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np

from ipa_bridge import oracle, tolerance
from ipa_bridge.config import Implementation, StructureModuleConfig
from ipa_bridge.proteins import Structure, residues
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_bridge.weights import Weights, canonical_from_haiku, canonical_from_torch
from ipa_bridge.weights.tensors import numpy_dtype, torch_tensor
from ipa_parity.report import Comparison, Norm, compare
from ipa_parity.stages import Arrays

PRESETS: dict[str, Callable[[], StructureModuleConfig]] = {
    "alphafold2": StructureModuleConfig.alphafold2,
    "alphafold-multimer": StructureModuleConfig.alphafold_multimer,
    "esmfold": StructureModuleConfig.esmfold,
}
"""Configs by the names that the command takes."""

TERMS = ("backbone", "sidechain_fape", "chi", "angle_norm", "violation")
"""The losses, as `StructureModuleLoss` names them."""

COTANGENT_SCALES = {"atom14": 0.1, "angles": 1.0, "act": 1.0}
"""Of the combination whose gradients are compared: atoms count in units of 10 Å."""

LONGEST_LEVER = 8.0
"""Å; no atom of a side chain lies farther from the axis of a torsion that turns it."""


@dataclass(frozen=True)
class StructureModuleCase:
    """One structure module on one protein. Drawn in float64; `astype` rounds all of it to the dtype of a run."""

    name: str
    weights: Weights
    single: np.ndarray  # (N, c_s)
    pair: np.ndarray  # (N, N, c_z)
    aatype: np.ndarray  # (N,)
    mask: np.ndarray  # (N,) bool
    residue_index: np.ndarray  # (N,)
    chain_id: np.ndarray | None  # (N,) integers, where the losses tell chains apart
    atom37: np.ndarray  # (N, 37, 3), of the true structure, Å
    atom37_mask: np.ndarray  # (N, 37) bool
    cotangents: Mapping[str, np.ndarray]  # of `atom14` in 10 Å, `angles` and `act`, layers first

    @property
    def config(self) -> StructureModuleConfig:
        """The model's config."""
        return cast(StructureModuleConfig, self.weights.config)

    def astype(self, dtype: str) -> StructureModuleCase:
        """The same case with every number rounded to that dtype."""
        to = numpy_dtype(dtype)
        rounded = {field: getattr(self, field).astype(to) for field in ("weights", "single", "pair", "atom37")}
        return replace(self, **rounded, cotangents={field: x.astype(to) for field, x in self.cotangents.items()})


def load_weights(path: str | os.PathLike[str], preset: str | None = None) -> Weights:
    """A structure module's weights out of a file, with what a preset tells and names and shapes do not.

    Raises:
        ValueError: the file holds an attention's weights only.
    """
    weights = Weights.load(path)
    if not isinstance(weights.config, StructureModuleConfig):
        raise ValueError(f"{os.fspath(path)} holds an attention's weights, not a structure module's: use --module ipa")
    if preset is None:
        return weights
    told, config = PRESETS[preset](), weights.config
    fields = ("norm_form", "norm_epsilon", "frame_unit")
    ipa = replace(config.ipa, **{field: getattr(told.ipa, field) for field in fields})
    layers = told.num_layer if config.tied_layers else config.num_layer
    config = replace(config, ipa=ipa, num_layer=layers, position_scale=told.position_scale)
    return replace(weights, config=config, assumed=frozenset())


def make_case(
    name: str,
    config: StructureModuleConfig,
    *,
    structure: Structure | None = None,
    seed: int = 0,
    weights: Weights | None = None,
) -> StructureModuleCase:
    """Random representations and weights, on the sequence of a structure, which is the losses' truth.

    A tenth of the residues is masked. Without a structure: the idealised peptide with all 20 amino acids in random
    order and their side chains at random torsions.
    """
    rng = np.random.default_rng(seed)
    structure = dressed_peptide(rng) if structure is None else structure
    number = len(structure)
    mask = rng.random(number) > 0.1
    mask[number // 2] = False
    _, chains = np.unique(structure.chain_id, return_inverse=True)
    layers = (config.num_layer, number)
    return StructureModuleCase(
        name=name,
        weights=Weights.random(config, seed=seed + 1, dtype=np.float64) if weights is None else weights,
        single=rng.standard_normal((number, config.num_channel)),
        pair=rng.standard_normal((number, number, config.pair_channel)),
        aatype=structure.aatype,
        mask=mask,
        residue_index=structure.residue_number,
        chain_id=chains if config.ipa.layout == "multimer" else None,
        atom37=structure.atom37,
        atom37_mask=structure.atom37_mask & mask[:, None],
        cotangents={
            "atom14": rng.standard_normal((*layers, 14, 3)),
            "angles": rng.standard_normal((*layers, 7, 2)),
            "act": rng.standard_normal((*layers, config.num_channel)),
        },
    )


def dressed_peptide(rng: np.random.Generator) -> Structure:
    """The idealised peptide's backbone with every amino acid in random order, its side chains at random torsions."""
    bare = idealised_peptide()
    aatype = rng.permutation(np.resize(np.arange(len(residues.RESTYPES)), len(bare)))
    turns = rng.uniform(-np.pi, np.pi, (len(bare), 7))
    groups = oracle.rigid_groups(bare.rotation, bare.translation, np.stack([np.sin(turns), np.cos(turns)], -1), aatype)
    atom37 = np.take_along_axis(oracle.atom14(*groups, aatype), residues.ATOM37_TO_ATOM14[aatype][..., None], -2)
    mask = residues.ATOM37_MASK[aatype]
    return replace(bare, aatype=aatype, atom37=atom37 * mask[..., None], atom37_mask=mask)


def judge(
    case: StructureModuleCase,
    dtype: str,
    *,
    frameworks: Iterable[str] = ("jax", "torch"),
    gradients: bool = True,
    progress: Callable[[str], None] = lambda step: None,
) -> Iterator[Comparison]:
    """Every stage of a case in one dtype: each framework against the torch model in float64, and the two together.

    Where there is no torch the Haiku model in float64 is the truth; in float64 the frameworks judge each other.
    """
    rounded, frameworks = case.astype(dtype), tuple(frameworks)
    runs: dict[str, Arrays] = {}
    for name in frameworks:
        progress(f"{name} {dtype}")
        runs[name] = RUNNERS[name](rounded, gradients=gradients)
    pairs = []
    if dtype != "float64":
        truth = "torch" if "torch" in runs else "jax"
        progress(f"{truth} float64")
        exact = RUNNERS[truth](rounded.astype("float64"), gradients=gradients)
        pairs += [(name, arrays, "float64", exact) for name, arrays in runs.items()]
    if len(runs) == 2:
        (first, arrays), (second, others) = runs.items()
        pairs.append((first, arrays, second, others))
    for subject, arrays, reference, expected in pairs:
        for stage in expected:
            yield compare_stage(rounded, dtype, stage, subject, arrays, reference, expected)


def compare_stage(
    case: StructureModuleCase,
    dtype: str,
    stage: str,
    subject: str,
    arrays: Arrays,
    reference: str,
    expected: Arrays,
    *,
    valid_only: bool = False,
    norm: Norm = "max",
) -> Comparison:
    """Judges one stage by the tolerance table; with `valid_only` in residues that the mask keeps.

    An angle is the direction of a predicted vector, whose rounding turns it the more the shorter it is: errors of
    angles count in proportion to that length, those of atoms at the end of a lever that such an angle turns. What
    gradients are allowed grows with the shortness of the shortest.

    In float32 one of a million ReLUs, whose input is within rounding of zero, is open in one run and shut in the other,
    and gradients jump there: they are held to a much wider bound, in the Euclidean norm.
    """
    actual, wanted = arrays[stage].astype(np.float64), expected[stage].astype(np.float64)
    field, _, layer = stage.partition("/")
    scale, conditioning = None, 1.0
    if field == "angles":
        lengths = _lengths(expected, layer)[..., None]
        actual, wanted = actual * lengths, wanted * lengths
    if field in ("atom14", "group_rotation", "group_translation"):
        lengths = _lengths(expected, layer)
        lever = 1.0 if field == "group_rotation" else LONGEST_LEVER / np.abs(wanted).max()
        forgiven = 1 + lever * lengths.mean() / lengths.min(-1)
        actual = wanted + (actual - wanted) / np.expand_dims(forgiven, tuple(range(1, wanted.ndim)))
    if field == "gradient":
        norm = "euclidean" if dtype == "float32" else norm
        each = (_lengths(expected, f"layer {i + 1}") for i in range(case.config.num_layer))
        shortness = max(x.mean() / x.min() for x in each)
        conditioning = tolerance.KINKED if dtype == "float32" else 1 + shortness / 8
    if stage.endswith("attention_2d/bias"):
        # Zero in mathematics, like the sum of a row of logits' gradients.
        scale = float(np.abs(expected[stage.replace("/bias", "/weights")]).max())
    return compare(
        actual[case.mask] if valid_only else actual,
        wanted[case.mask] if valid_only else wanted,
        case=case.name,
        stage=stage,
        dtype=dtype,
        subject=subject,
        reference=reference,
        scale=scale,
        conditioning=conditioning,
        norm=norm,
    )


def _lengths(expected: Arrays, layer: str) -> np.ndarray:
    """Of the predicted vectors whose directions are the torsions, (N, 7)."""
    return np.linalg.norm(expected[f"unnormalized_angles/{layer}"].astype(np.float64), axis=-1)


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
            of_combination, *of_losses = (  # not at once: memory
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
    """Outputs with losses, and the gradients of a weighted sum; kept, since JAX compiles longer than it runs."""
    import jax

    import ipa_jax

    apply = ipa_jax.transform_structure_module(config, implementation=implementation).apply

    def predict(params: Any, inputs: Mapping[str, Any], aatype: Any, mask: Any, target: Any) -> Any:
        output = apply(params, None, inputs["single"], inputs["pair"], aatype, mask)
        return output, jax.numpy.stack(_losses(ipa_jax, output, target))

    def weighted(params: Any, inputs: Mapping[str, Any], *others: Any) -> Any:
        """The combination and then the terms of the loss, each by its weight."""
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
    """The true structure, as either package's losses take it."""
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
    """Stages of an output whose arrays are numpy's."""
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
