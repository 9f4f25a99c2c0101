"""What is measured: our modules and published ones, on the same inputs, called forwards and backwards.

A system prepares calls on given inputs: by direction a function that makes the call ready, which for JAX is to compile
it, and returns it. The call returns when its result is there. Backwards means gradients of the outputs' squared sum to
single, pair and all parameters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.clock import Timed
from ipa_bridge.config import Implementation, IPAConfig, StructureModuleConfig
from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.weights import Weights
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity import peers, structure_module
from ipa_parity.cases import Case

FORWARD, BACKWARD = "forward", "forward + backward"
DIRECTIONS = (FORWARD, BACKWARD)

Calls = Mapping[str, Callable[[], Timed]]
"""By direction, what makes a call ready."""


class Inputs(NamedTuple):
    """AlphaFold 2's sizes in float32, at random."""

    single: np.ndarray  # (N, c_s)
    pair: np.ndarray  # (N, N, c_z)
    rotation: np.ndarray  # (N, 3, 3)
    translation: np.ndarray  # (N, 3)
    mask: np.ndarray  # (N,) bool
    aatype: np.ndarray  # (N,)

    @classmethod
    def draw(cls, residues: int) -> Inputs:
        """Of so many residues."""
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


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Room for float32 numbers where JAX can use them as they lie, without a copy."""
    size = 4 * math.prod(shape)
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(np.float32).reshape(shape)


@dataclass(frozen=True)
class System:
    """One implementation; `against` names the published one in its framework that its ratios are to."""

    name: str
    framework: str
    against: str
    prepare: Callable[[Inputs], Calls]


def jax_calls(forward: Callable[..., Any], params: Any, *arrays: np.ndarray) -> Calls:
    """A function of parameters, single, pair and what gets no gradient, under jit."""
    import jax

    inputs = jax.device_put([params, *arrays])
    backward = jax.grad(lambda *xs: (forward(*xs) ** 2).sum(), (0, 1, 2))

    def ready(function: Callable) -> Timed:
        compiled = jax.jit(function).lower(*inputs).compile()
        return lambda: jax.block_until_ready(compiled(*inputs))

    return {FORWARD: lambda: ready(forward), BACKWARD: lambda: ready(backward)}


def torch_calls(module: Any, forward: Callable[..., Any], inputs: Inputs) -> Calls:
    """A function of single and pair that runs a module."""
    import torch

    module.eval()
    single, pair = (torch_tensor(x).requires_grad_() for x in (inputs.single, inputs.pair))

    def backward() -> Any:
        return torch.autograd.grad((forward(single, pair) ** 2).sum(), [single, pair, *module.parameters()])

    inference = torch.no_grad()(lambda: forward(single, pair))
    return {FORWARD: lambda: inference, BACKWARD: lambda: backward}


def our_haiku(implementation: Implementation | None) -> Callable[[Inputs], Calls]:
    """`ipa_jax`'s attention."""

    def prepare(inputs: Inputs) -> Calls:
        import ipa_jax

        config = IPAConfig.alphafold2()
        apply = ipa_jax.transform_ipa(config, implementation=implementation).apply

        def forward(params: Any, single: Any, pair: Any, mask: Any, rotation: Any, translation: Any) -> Any:
            return apply(params, single, pair, ipa_jax.Rigid(rotation, translation), mask)

        arrays = (inputs.single, inputs.pair, inputs.mask, inputs.rotation, inputs.translation)
        return jax_calls(forward, Weights.random(config).to_haiku(), *arrays)

    return prepare


def alphafold(config: IPAConfig) -> Callable[[Inputs], Calls]:
    """`alphafold-colabfold`'s attention of the config's layout."""

    def prepare(inputs: Inputs) -> Calls:
        import haiku as hk

        transformed: Any = hk.without_apply_rng(hk.transform(peers.alphafold_forward(config)))
        arrays = (inputs.single, inputs.pair, inputs.mask, inputs.rotation, inputs.translation)
        return jax_calls(transformed.apply, Weights.random(config).to_haiku(), *arrays)

    return prepare


def our_torch(implementation: Implementation | None) -> Callable[[Inputs], Calls]:
    """`ipa_torch`'s attention."""

    def prepare(inputs: Inputs) -> Calls:
        import ipa_torch

        module = ipa_torch.InvariantPointAttention(IPAConfig.alphafold2(), implementation=implementation)
        rigids = ipa_torch.Rigid(torch_tensor(inputs.rotation), torch_tensor(inputs.translation))
        mask = torch_tensor(inputs.mask)
        return torch_calls(module, lambda single, pair: module(single, pair, rigids, mask), inputs)

    return prepare


def esmfold(inputs: Inputs) -> Calls:
    """`transformers`' EsmFold attention, which is OpenFold's."""
    from transformers.models.esm.openfold_utils import Rigid, Rotation

    weights = Weights.random(IPAConfig.alphafold2())
    module = peers.esmfold_module(
        Case("", weights, inputs.single, None, inputs.rotation, inputs.translation, inputs.mask, inputs.single)
    )
    rigids = Rigid(Rotation(rot_mats=torch_tensor(inputs.rotation)), torch_tensor(inputs.translation))
    mask = torch_tensor(inputs.mask).float()
    return torch_calls(module, lambda single, pair: module(single, pair, rigids, mask), inputs)


def lucidrains(inputs: Inputs) -> Calls:
    """The attention of `invariant-point-attention`."""
    module = peers.lucidrains_module(IPAConfig.alphafold2())
    frames = {"rotations": torch_tensor(inputs.rotation)[None], "translations": torch_tensor(inputs.translation)[None]}
    mask = torch_tensor(inputs.mask)[None]

    def forward(single: Any, pair: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return module(single[None], pair[None], **frames, mask=mask)

    return torch_calls(module, forward, inputs)


def our_haiku_structure_module(inputs: Inputs) -> Calls:
    """`ipa_jax`'s structure module."""
    import ipa_jax

    config = StructureModuleConfig.alphafold2()
    apply = ipa_jax.transform_structure_module(config).apply

    def forward(params: Any, single: Any, pair: Any, aatype: Any, mask: Any) -> Any:
        return apply(params, None, single, pair, aatype, mask).atom14[-1]

    arrays = (inputs.single, inputs.pair, inputs.aatype, inputs.mask)
    return jax_calls(forward, Weights.random(config).to_haiku(), *arrays)


def alphafold_structure_module(inputs: Inputs) -> Calls:
    """`alphafold-colabfold`'s structure module, without its losses."""
    import haiku as hk
    import jax

    weights = Weights.random(StructureModuleConfig.alphafold2())
    none = np.zeros(0, np.float32)
    case = structure_module.StructureModuleCase(
        "", weights, none, none, inputs.aatype, inputs.mask, none, None, none, none, {}
    )
    transformed: Any = hk.transform(peers.alphafold_structure_module(case))

    def forward(params: Any, single: Any, pair: Any) -> Any:
        return transformed.apply(params, jax.random.key(0), single, pair)["atom14"][-1]

    return jax_calls(forward, weights.to_haiku(), inputs.single, inputs.pair)


def swapped_alphafold_structure_module(inputs: Inputs) -> Calls:
    """The same, compiled while it builds our attention."""
    import ipa_jax

    calls = alphafold_structure_module(inputs)

    def ready(direction: str) -> Timed:
        with ipa_jax.replace_alphafold_ipa(verify=False):
            return calls[direction]()

    return {direction: partial(ready, direction) for direction in calls}


def our_torch_structure_module(inputs: Inputs) -> Calls:
    """`ipa_torch`'s structure module."""
    import ipa_torch

    config = StructureModuleConfig.alphafold2()
    module = ipa_torch.StructureModule(config)
    module.load_state_dict(Weights.random(config).to_torch())
    aatype, mask = torch_tensor(inputs.aatype), torch_tensor(inputs.mask)
    return torch_calls(module, lambda single, pair: module(single, pair, aatype, mask).atom14[-1], inputs)


def esmfold_structure_module(inputs: Inputs, *, swapped: bool = False) -> Calls:
    """`transformers`' EsmFold structure module, as it is or with our attention."""
    module = peers.esmfold_structure_module(Weights.random(StructureModuleConfig.alphafold2()))
    if swapped:
        import ipa_torch

        ipa_torch.replace_ipa(module)
    aatype, mask = torch_tensor(inputs.aatype)[None], torch_tensor(inputs.mask)[None].float()

    def forward(single: Any, pair: Any) -> Any:
        return module({"single": single[None], "pair": pair[None]}, aatype, mask)["positions"][-1, 0]

    return torch_calls(module, forward, inputs)


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
"""By module; names are unique within one."""


def named(module: str, name: str) -> System:
    """The system of that name."""
    return next(system for system in MODULES[module] if system.name == name)
