"""Cases on which the frameworks' structure modules are compared: weights, inputs and true structures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from ipa_bridge import oracle
from ipa_bridge.config import StructureModuleConfig
from ipa_bridge.proteins import Structure, residues
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_bridge.weights import Weights
from ipa_bridge.weights.tensors import numpy_dtype

PRESETS: dict[str, Callable[[], StructureModuleConfig]] = {
    "alphafold2": StructureModuleConfig.alphafold2,
    "alphafold-multimer": StructureModuleConfig.alphafold_multimer,
    "esmfold": StructureModuleConfig.esmfold,
    "abodybuilder3": StructureModuleConfig.abodybuilder3,
}
"""Configs by their names on the command line."""


@dataclass(frozen=True)
class StructureModuleCase:
    """One structure module on one protein, drawn in float64; `astype` rounds all numbers to the dtype of a run."""

    name: str
    weights: Weights
    single: np.ndarray  # (N, config.input_channels[0])
    pair: np.ndarray  # (N, N, config.input_channels[1])
    aatype: np.ndarray  # (N,)
    mask: np.ndarray  # (N,) bool
    residue_index: np.ndarray  # (N,)
    chain_id: np.ndarray | None  # (N,) integers; None if the losses treat all as one chain
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
    """A structure module's weights from a file.

    Args:
        path: the file.
        preset: name of a preset whose norm, units, (for shared weights) number of layers and other fields to use that
            names and shapes do not determine; None keeps what `Weights.load` finds or assumes.

    Raises:
        ValueError: the file holds an attention's weights only.
    """
    weights = Weights.load(path)
    if not isinstance(weights.config, StructureModuleConfig):
        raise ValueError(f"{os.fspath(path)} holds an attention's weights, not a structure module's: use --module ipa")
    if preset is None:
        return weights
    known, config = PRESETS[preset](), weights.config
    fields = ("norm_form", "norm_epsilon", "frame_unit")
    ipa = replace(config.ipa, **{field: getattr(known.ipa, field) for field in fields})
    layers = known.num_layer if config.tied_layers else config.num_layer
    untold = ("position_scale", "project_initial_act", "skip_connection", "detach_rotations", "smallest_angle_length")
    config = replace(config, ipa=ipa, num_layer=layers, **{field: getattr(known, field) for field in untold})
    return replace(weights, config=config, assumed=frozenset())


def make_case(
    name: str,
    config: StructureModuleConfig,
    *,
    structure: Structure | None = None,
    seed: int = 0,
    weights: Weights | None = None,
) -> StructureModuleCase:
    """A case with random representations and weights; the structure gives the sequence and the losses' target.

    About a tenth of the residues is masked. Without a structure, the idealised peptide is used, with all 20 amino
    acids in random order and their side chains at random torsions.
    """
    rng = np.random.default_rng(seed)
    structure = dressed_peptide(rng) if structure is None else structure
    number = len(structure)
    mask = rng.random(number) > 0.1
    mask[number // 2] = False
    _, chains = np.unique(structure.chain_id, return_inverse=True)
    layers = (config.num_layer, number)
    width, pair_width = config.input_channels
    return StructureModuleCase(
        name=name,
        weights=Weights.random(config, seed=seed + 1, dtype=np.float64) if weights is None else weights,
        single=rng.standard_normal((number, width)),
        pair=rng.standard_normal((number, number, pair_width)),
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
    """The idealised peptide's backbone with all amino acids in random order and side chains at random torsions."""
    bare = idealised_peptide()
    aatype = rng.permutation(np.resize(np.arange(len(residues.RESTYPES)), len(bare)))
    turns = rng.uniform(-np.pi, np.pi, (len(bare), 7))
    groups = oracle.rigid_groups(bare.rotation, bare.translation, np.stack([np.sin(turns), np.cos(turns)], -1), aatype)
    atom37 = np.take_along_axis(oracle.atom14(*groups, aatype), residues.ATOM37_TO_ATOM14[aatype][..., None], -2)
    mask = residues.ATOM37_MASK[aatype]
    return replace(bare, aatype=aatype, atom37=atom37 * mask[..., None], atom37_mask=mask)
