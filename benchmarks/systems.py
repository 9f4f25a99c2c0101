"""The systems that are measured: our modules and published ones, on the same inputs, forward and with backward.

A system prepares calls on given inputs: for each direction a function that returns the call, in JAX after compiling it.
Gradients are taken to single, pair and all parameters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.calls import Call, Calls, as_jax, as_torch, jax_calls, torch_calls
from ipa_bridge.config import Implementation, IPAConfig, StructureModuleConfig
from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.weights import Weights
from ipa_parity import peers
from ipa_parity.attention.cases import Case
from ipa_parity.structure_module.cases import StructureModuleCase


class Inputs(NamedTuple):
    """Random float32 inputs of AlphaFold 2's sizes: numpy arrays, or tensors if they are on a device."""

    single: Any  # (N, c_s)
    pair: Any  # (N, N, c_z), or None
    rotation: Any  # (N, 3, 3)
    translation: Any  # (N, 3)
    mask: Any  # (N,) bool, or 1 and 0
    aatype: Any  # (N,), or None where only the attention is measured

    @classmethod
    def draw(cls, residues: int) -> Inputs:
        """Random inputs of the given length as numpy arrays, for a CPU."""
        rng = np.random.default_rng(residues)
        config = IPAConfig.alphafold2()
        rotation, translation = (x.astype(np.float32) for x in random_frames(rng, (residues,), spread=2.0))
        return cls(
            single=rng.standard_normal((residues, config.num_channel), np.float32),
            pair=rng.standard_normal(dtype=np.float32, out=aligned((residues, residues, config.pair_channel or 0))),
            rotation=rotation,
            translation=translation,
            mask=rng.random(residues) > 0.1,
            aatype=rng.integers(0, 20, residues),
        )

    @property
    def config(self) -> IPAConfig:
        """The config of AlphaFold 2's attention; without a pair if the inputs have none."""
        config = IPAConfig.alphafold2()
        return config if self.pair is not None else replace(config, pair_channel=None)


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array, aligned so that JAX can use its memory without a copy."""
    size = 4 * math.prod(shape)
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(np.float32).reshape(shape)


@dataclass(frozen=True)
class System:
    """One implementation, and the function that prepares its calls on inputs."""

    name: str
    framework: str
    """Either "jax" or "torch"."""
    against: str
    """Name of the published system, of the same framework, that its time and memory are divided by."""
    prepare: Callable[[Inputs], Calls]


def torch_inputs(inputs: Inputs) -> tuple[Any, Any, Any, Any, Any]:
    """Single, pair, rotation, translation and mask as tensors; single and pair require gradients."""
    single, pair = (None if x is None else as_torch(x).requires_grad_() for x in (inputs.single, inputs.pair))
    return single, pair, *map(as_torch, (inputs.rotation, inputs.translation, inputs.mask))


def haiku_calls(forward: Callable[..., Any], weights: Weights, inputs: Inputs) -> Calls:
    """Calls of `forward(params, single, pair, mask, rotation, translation)`; gradients are of the first three."""
    leaves = (weights.to_haiku(), as_jax(inputs.single), as_jax(inputs.pair))
    return jax_calls(forward, leaves, (as_jax(inputs.mask), as_jax(inputs.rotation), as_jax(inputs.translation)))


def our_haiku(implementation: Implementation | None) -> Callable[[Inputs], Calls]:
    """Prepares calls of `ipa_jax`'s attention."""

    def prepare(inputs: Inputs) -> Calls:
        import ipa_jax

        apply = ipa_jax.transform_ipa(inputs.config, implementation=implementation).apply

        def forward(params: Any, single: Any, pair: Any, mask: Any, rotation: Any, translation: Any) -> Any:
            return apply(params, single, pair, ipa_jax.Rigid(rotation, translation), mask)

        return haiku_calls(forward, Weights.random(inputs.config), inputs)

    return prepare


def alphafold(config: IPAConfig) -> Callable[[Inputs], Calls]:
    """Prepares calls of `alphafold-colabfold`'s attention of the config's layout."""

    def prepare(inputs: Inputs) -> Calls:
        import haiku as hk

        transformed: Any = hk.without_apply_rng(hk.transform(peers.alphafold_forward(config)))
        return haiku_calls(transformed.apply, Weights.random(config), inputs)

    return prepare


def our_torch(implementation: Implementation | None) -> Callable[[Inputs], Calls]:
    """Prepares calls of `ipa_torch`'s attention."""

    def prepare(inputs: Inputs) -> Calls:
        import ipa_torch

        single, pair, rotation, translation, mask = torch_inputs(inputs)
        module = ipa_torch.InvariantPointAttention(inputs.config, implementation=implementation)
        module.eval().to(single.device)
        rigids = ipa_torch.Rigid(rotation, translation)
        return torch_calls(lambda: [module(single, pair, rigids, mask)], [single, pair, *module.parameters()])

    return prepare


def esmfold(inputs: Inputs) -> Calls:
    """Calls of `transformers`' EsmFold attention, which is OpenFold's."""
    from transformers.models.esm.openfold_utils import Rigid, Rotation

    none = np.zeros(0, np.float32)
    case = Case("", Weights.random(IPAConfig.alphafold2()), none, None, none, none, none, none)
    single, pair, rotation, translation, mask = torch_inputs(inputs)
    module = peers.esmfold_module(case).eval().to(single.device)
    rigids, mask = Rigid(Rotation(rot_mats=rotation), translation), mask.float()
    return torch_calls(lambda: [module(single, pair, rigids, mask)], [single, pair, *module.parameters()])


def lucidrains(inputs: Inputs) -> Calls:
    """Calls of the attention of `invariant-point-attention`."""
    module = peers.lucidrains_module(IPAConfig.alphafold2()).eval()
    single, pair, rotation, translation, mask = torch_inputs(inputs)
    frames = {"rotations": rotation[None], "translations": translation[None]}

    def forward() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [module(single[None], pair[None], **frames, mask=mask[None])]

    return torch_calls(forward, [single, pair, *module.parameters()])


def our_haiku_structure_module(inputs: Inputs) -> Calls:
    """Calls of `ipa_jax`'s structure module."""
    import ipa_jax

    config = StructureModuleConfig.alphafold2()
    apply = ipa_jax.transform_structure_module(config).apply

    def forward(params: Any, single: Any, pair: Any, aatype: Any, mask: Any) -> Any:
        return apply(params, None, single, pair, aatype, mask).atom14[-1]

    leaves = (Weights.random(config).to_haiku(), inputs.single, inputs.pair)
    return jax_calls(forward, leaves, (inputs.aatype, inputs.mask))


def alphafold_structure_module(inputs: Inputs) -> Calls:
    """Calls of `alphafold-colabfold`'s structure module, without its losses."""
    import haiku as hk
    import jax

    weights = Weights.random(StructureModuleConfig.alphafold2())
    none = np.zeros(0, np.float32)
    case = StructureModuleCase("", weights, none, none, inputs.aatype, inputs.mask, none, None, none, none, {})
    transformed: Any = hk.transform(peers.alphafold_structure_module(case))

    def forward(params: Any, single: Any, pair: Any) -> Any:
        return transformed.apply(params, jax.random.key(0), single, pair)["atom14"][-1]

    return jax_calls(forward, (weights.to_haiku(), inputs.single, inputs.pair))


def swapped_alphafold_structure_module(inputs: Inputs) -> Calls:
    """Calls of `alphafold-colabfold`'s structure module, compiled while it builds our attention."""
    import ipa_jax

    calls = alphafold_structure_module(inputs)

    def ready(direction: str) -> Call:
        with ipa_jax.replace_alphafold_ipa(verify=False):
            return calls[direction]()

    return {direction: partial(ready, direction) for direction in calls}


def our_torch_structure_module(inputs: Inputs) -> Calls:
    """Calls of `ipa_torch`'s structure module."""
    import ipa_torch

    config = StructureModuleConfig.alphafold2()
    module = ipa_torch.StructureModule(config)
    module.load_state_dict(Weights.random(config).to_torch())
    module.eval()
    single, pair, _, _, mask = torch_inputs(inputs)
    aatype = as_torch(inputs.aatype)
    return torch_calls(lambda: [module(single, pair, aatype, mask).atom14[-1]], [single, pair, *module.parameters()])


def esmfold_structure_module(inputs: Inputs, *, swapped: bool = False) -> Calls:
    """Calls of `transformers`' EsmFold structure module, as it is or with our attention."""
    module = peers.esmfold_structure_module(Weights.random(StructureModuleConfig.alphafold2()))
    if swapped:
        import ipa_torch

        ipa_torch.replace_ipa(module)
    module.eval()
    single, pair, _, _, mask = torch_inputs(inputs)
    aatype, mask = as_torch(inputs.aatype)[None], mask[None].float()

    def forward() -> Any:
        return [module({"single": single[None], "pair": pair[None]}, aatype, mask)["positions"][-1, 0]]

    return torch_calls(forward, [single, pair, *module.parameters()])


AF, AF_MULTIMER, ESM, LUCIDRAINS = "AlphaFold (jit)", "AlphaFold-Multimer (jit)", "ESMFold", "invariant-point-attention"

MODULES: dict[str, tuple[System, ...]] = {
    "ipa": (
        System("ipa_jax", "jax", AF, our_haiku("streamed")),
        System("ipa_jax, reference", "jax", AF, our_haiku("reference")),
        System(AF, "jax", AF, alphafold(IPAConfig.alphafold2())),
        System(AF_MULTIMER, "jax", AF, alphafold(IPAConfig.alphafold_multimer())),
        System("ipa_torch", "torch", ESM, our_torch("streamed")),
        System("ipa_torch, reference", "torch", ESM, our_torch("reference")),
        System(ESM, "torch", ESM, esmfold),
        System(LUCIDRAINS, "torch", ESM, lucidrains),
    ),
    "structure-module": (
        System("ipa_jax", "jax", AF, our_haiku_structure_module),
        System(AF, "jax", AF, alphafold_structure_module),
        System("AlphaFold, swapped (jit)", "jax", AF, swapped_alphafold_structure_module),
        System("ipa_torch", "torch", ESM, our_torch_structure_module),
        System(ESM, "torch", ESM, esmfold_structure_module),
        System("ESMFold, swapped", "torch", ESM, partial(esmfold_structure_module, swapped=True)),
    ),
}
"""Systems by module; names are unique within a module."""


def find_system(module: str, name: str) -> System:
    """The system with this name in a module."""
    return next(system for system in MODULES[module] if system.name == name)
