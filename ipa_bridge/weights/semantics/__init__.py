"""Every system's computation with parameters in its own names and layout, in float64 numpy for small inputs.

It is written from each system's conventions, not from our tables of its names, and thus checks a conversion: the
source's parameters in the source's semantics and the target's in the target's must be the same function.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
from numpy import ndarray

from ipa_bridge.config import (
    Config,
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    StructureModuleConfig,
)
from ipa_bridge.kinds import attention_of, has_attention
from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.weights.semantics import modules
from ipa_bridge.weights.semantics.abodybuilder2 import ABODYBUILDER2
from ipa_bridge.weights.semantics.abodybuilder3 import ABODYBUILDER3
from ipa_bridge.weights.semantics.alphafold import IPA_JAX, IPA_TORCH
from ipa_bridge.weights.semantics.bioemu import BIOEMU
from ipa_bridge.weights.semantics.flashabb import FLASHABB
from ipa_bridge.weights.semantics.lucidrains import LUCIDRAINS
from ipa_bridge.weights.semantics.omegafold import OMEGAFOLD
from ipa_bridge.weights.semantics.openfold import OPENFOLD, OPENFOLD_V1
from ipa_bridge.weights.semantics.system import Parameters, System

SYSTEMS: dict[str, System] = {
    "alphafold": IPA_JAX,
    "ipa_jax": IPA_JAX,
    "ipa_torch": IPA_TORCH,
    "openfold": OPENFOLD,
    "openfold_v1": OPENFOLD_V1,
    "esmfold": OPENFOLD_V1,
    "frameflow": OPENFOLD_V1,
    "framediff": OPENFOLD_V1,
    "lucidrains": LUCIDRAINS,
    "abodybuilder2": ABODYBUILDER2,
    "flashabb": FLASHABB,
    "abodybuilder3": ABODYBUILDER3,
    "ibex": ABODYBUILDER3,
    "bioemu": BIOEMU,
    "omegafold": OMEGAFOLD,
    "igfold": LUCIDRAINS,
    "lociparse": OPENFOLD_V1,
    "mdgen": OPENFOLD_V1,
    "unifold": OPENFOLD_V1,
}
"""The semantics of every dialect by its name."""

PROBE_RESIDUES = 9
"""Number of residues in the random input of `probe`."""


def probe(dialect: str, parameters: Parameters, config: Config, *, seed: int = 0) -> ndarray:
    """Outputs on random inputs, the same ones for every dialect.

    Args:
        dialect: the system whose semantics to run.
        parameters: parameters by the system's names below the module.
        config: the module's config.
        seed: seed of the inputs.
    """
    p = {name: np.asarray(x, np.float64) for name, x in parameters.items()}
    rng = np.random.default_rng(seed)
    if not has_attention(config):
        return modules.confidence(SYSTEMS[dialect], p, rng.standard_normal((PROBE_RESIDUES, config.num_channel)))
    ipa = attention_of(config)
    width, pair_width = ipa.num_channel, ipa.pair_channel
    if isinstance(config, StructureModuleConfig):
        width, pair_width = config.input_channels
    single: ndarray = rng.standard_normal((PROBE_RESIDUES, width))
    pair = None if pair_width is None else rng.standard_normal((PROBE_RESIDUES, PROBE_RESIDUES, pair_width))
    rotation, translation = random_frames(rng, (PROBE_RESIDUES,), spread=2.0)
    mask = np.arange(PROBE_RESIDUES) != PROBE_RESIDUES // 2
    if isinstance(config, StructureModuleConfig):
        layers = structure_module(dialect, p, config, single, cast(ndarray, pair), mask)
        return np.concatenate([x[:, mask].ravel() for x in layers.values()])
    inputs = (pair, rotation, translation * ipa.position_scale, mask)
    if isinstance(config, IPATransformerConfig):
        tokens = rng.integers(0, config.num_token or 1, PROBE_RESIDUES)
        outputs = transformer(dialect, p, config, single if config.num_token is None else tokens, *inputs)
        return np.concatenate([x[mask].ravel() for x in outputs if x is not None])
    if isinstance(config, IPABlockConfig):
        return block(dialect, p, config, single, *inputs)[mask]
    return attention(dialect, p, ipa, single, *inputs)[mask]


def attention(
    dialect: str,
    p: Parameters,
    config: IPAConfig,
    single: ndarray,
    pair: ndarray | None,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray,
) -> ndarray:
    """One invariant point attention's output, from column-vector frames in the caller's unit for every system."""
    return SYSTEMS[dialect].attention(p, config, single, pair, rotation, translation, mask)


def structure_module(
    dialect: str, p: Parameters, config: StructureModuleConfig, single: ndarray, pair: ndarray, mask: ndarray
) -> dict[str, ndarray]:
    """Suppl. Alg. 20 up to the angles: act, rotation, translation (Å) and unnormalized_angles, layers first."""
    return modules.structure_module(SYSTEMS[dialect], p, config, single, pair, mask)


def block(
    dialect: str,
    p: Parameters,
    config: IPABlockConfig,
    act: ndarray,
    pair: ndarray | None,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray,
) -> ndarray:
    """An IPA block's output."""
    return modules.block(SYSTEMS[dialect], p, config, act, pair, rotation, translation, mask)


def transformer(
    dialect: str,
    p: Parameters,
    config: IPATransformerConfig,
    single: ndarray,
    pair: ndarray | None,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray,
) -> tuple[ndarray, ndarray, ndarray, ndarray | None]:
    """An IPA transformer's activations, rotations, translations and points."""
    return modules.transformer(SYSTEMS[dialect], p, config, single, pair, rotation, translation, mask)


def distance(one: ndarray, other: ndarray) -> float:
    """Largest difference over the largest value of `other`; infinite if that is zero, since zeros prove nothing."""
    largest = float(np.abs(other).max())
    return float(np.abs(one - other).max()) / largest if largest else math.inf
