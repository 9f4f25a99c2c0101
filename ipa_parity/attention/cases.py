"""The named catalogue of models, inputs and frames on which the frameworks are compared."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np

from ipa_bridge.config import IPAConfig, StructureModuleConfig
from ipa_bridge.proteins import Structure
from ipa_bridge.proteins.frames import idealised_peptide, random_frames
from ipa_bridge.weights import Weights
from ipa_bridge.weights.tensors import numpy_dtype

PRESETS: dict[str, Callable[[], IPAConfig]] = {
    "alphafold2": IPAConfig.alphafold2,
    "alphafold-multimer": IPAConfig.alphafold_multimer,
    "esmfold": IPAConfig.esmfold,
    "lucidrains": partial(IPAConfig.lucidrains, 64),
    "framediff": IPAConfig.framediff,
}
"""Configs by their names on the command line; lucidrains has the width of the example in its README."""

ODD = IPAConfig(
    num_channel=11,
    pair_channel=6,
    num_head=3,
    num_scalar_qk=4,
    num_scalar_v=2,
    num_point_qk=5,
    num_point_v=7,
    frame_unit=10.0,
)
"""Small widths that are odd or mutually distinct, so that swapping two axes always shows."""

ODD_MULTIMER = replace(ODD, layout="multimer", scalar_bias=False, norm_form="clamp", frame_unit=20.0)
ODD_NO_PAIR = replace(ODD, pair_channel=None)
ODD_DOWN_Z = replace(ODD, pair_value_channel=4, position_scale=10.0, frame_unit=1.0)
ODD_THREE_TERMS = replace(ODD_NO_PAIR, logit_terms=3)
ODD_ROTARY = replace(ODD, rotary_embedding=True, pair_bias=False)
ODD_UNSQUARED = replace(
    ODD,
    layout="multimer",
    attention_2d_bias=False,
    distance_form="unsquared",
    distance_epsilon=1e-8,
    point_weight_form="identity",
)
ODD_PAIR_VALUES = replace(
    ODD,
    layout="multimer",
    scalar_bias=False,
    point_bias=False,
    norm_epsilon=0.0,
    distance_form="unsquared",
    pair_value_channel=4,
    pair_value_per_head=True,
)
ODD_NO_BIAS = replace(ODD, layout="multimer", scalar_bias=False, point_bias=False, frame_unit=None, zero_init=False)

POSITION_SCALE = {"monomer": 10.0, "multimer": 20.0}
"""Å per unit of the frames in AlphaFold's layouts, used too for systems whose unit is unknown."""


@dataclass(frozen=True)
class Case:
    """One model on one input. Its numbers are drawn in float64; `astype` rounds them to the dtype of a run."""

    name: str
    weights: Weights
    single: np.ndarray  # (*B, N, c_s)
    pair: np.ndarray | None  # (*B, N, N, c_z)
    rotation: np.ndarray  # (*B, N, 3, 3)
    translation: np.ndarray  # (*B, N, 3), in units of the config's frames
    mask: np.ndarray  # (*B, N) bool
    cotangent: np.ndarray  # (*B, N, c_s), of the output
    key_mask: np.ndarray | None = None  # (*B, N) bool
    pair_mask: np.ndarray | None = None  # (*B, N, N) bool

    @property
    def config(self) -> IPAConfig:
        """The model's config."""
        return cast(IPAConfig, self.weights.config)

    def astype(self, dtype: str) -> Case:
        """The same case with every number rounded to that dtype."""
        to = numpy_dtype(dtype)
        fields = ("weights", "single", "rotation", "translation", "cotangent")
        rounded = {field: getattr(self, field).astype(to) for field in fields}
        return replace(self, **rounded, pair=None if self.pair is None else self.pair.astype(to))


def load_weights(path: str | os.PathLike[str], preset: str | None = None) -> Weights:
    """An attention's weights from a file of an attention or of a structure module.

    Args:
        path: the file.
        preset: name of a preset whose norm and units to use, which names and shapes do not determine; None keeps
            what `Weights.load` finds or assumes.
    """
    weights = Weights.load(path)
    if isinstance(weights.config, StructureModuleConfig):
        weights = weights.subtree("fold_iteration/invariant_point_attention")
    if preset is None:
        return weights
    known = PRESETS[preset]()
    config = cast(IPAConfig, weights.config)
    fields = ("norm_form", "norm_epsilon", "position_scale", "frame_unit")
    return replace(
        weights, config=replace(config, **{field: getattr(known, field) for field in fields}), assumed=frozenset()
    )


def make_case(
    name: str,
    config: IPAConfig,
    shape: tuple[int, ...] = (7,),
    *,
    seed: int = 0,
    spread: float = 2.0,
    offset: float = 0.0,
    cluster: int = 1,
    weights: Weights | None = None,
    structure: Structure | None = None,
    hidden: tuple[str, ...] = (),
) -> Case:
    """A case with random activations and weights, on random frames or on those of a structure.

    About a tenth of the residues is masked (at least one, if there are several), besides those without a backbone.

    Args:
        name: name of the case.
        config: the model's config.
        shape: (*B, N), the shape of random frames.
        seed: seed of all random numbers.
        spread: half the side of the cube that random frames fill.
        offset: distance of that cube from the origin.
        cluster: this many successive residues lie within one unit of a random point of the cube, so that each has
            others close by, as in a protein. A residue far from all others attends to itself only, and the
            logits' gradients are then nothing but rounding.
        weights: the model's weights; None for seeded ones.
        structure: a protein to use instead of random frames.
        hidden: masks beside the residue mask, "key_mask" and "pair_mask". A third of the keys or pairs are hidden, and
            by a pair mask all keys from the first query.
    """
    rng = np.random.default_rng(seed)
    if structure is None:
        rotation, translation = random_frames(rng, shape, spread=spread, offset=offset)
        if cluster > 1:
            centres = np.repeat(translation[..., ::cluster, :], cluster, -2)[..., : shape[-1], :]
            translation = centres + rng.uniform(-1, 1, translation.shape)
        translation = translation * config.position_scale
        mask = np.ones(shape, bool)
    else:
        shape = structure.mask.shape
        usual = POSITION_SCALE[config.layout] if config.position_scale == 1 else 1.0
        rotation, translation = structure.rigids(replace(config, frame_unit=config.frame_unit or usual))
        mask = structure.mask
    if shape[-1] > 1:
        mask = mask & (rng.random(shape) > 0.1)
        mask[..., shape[-1] // 2] = False
    pair = None if config.pair_channel is None else rng.standard_normal((*shape, shape[-1], config.pair_channel))
    return Case(
        name=name,
        weights=Weights.random(config, seed=seed + 1, dtype=np.float64) if weights is None else weights,
        single=rng.standard_normal((*shape, config.num_channel)),
        pair=pair,
        rotation=rotation,
        translation=translation,
        mask=mask,
        cotangent=rng.standard_normal((*shape, config.num_channel)),
        **{kind: _hide(rng, shape, kind) for kind in hidden},
    )


def _hide(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """A key mask or a pair mask that hides a third; a pair mask leaves the first query no key, and others one."""
    if kind == "key_mask":
        mask = rng.random(shape) > 1 / 3
        mask[..., 0] = True
        return mask
    mask = (rng.random((*shape, shape[-1])) > 1 / 3) | np.eye(shape[-1], dtype=bool)
    mask[..., 0, :] = False
    return mask


CATALOGUE: dict[str, Callable[[], Case]] = {
    name: partial(make_case, name, config, **options)
    for name, config, options in (
        ("monomer", ODD, {}),
        ("multimer", ODD_MULTIMER, {}),
        ("no-pair", ODD_NO_PAIR, {}),
        ("no-bias", ODD_NO_BIAS, {}),
        ("down-z", ODD_DOWN_Z, {"shape": (2, 7)}),
        ("three-terms", ODD_THREE_TERMS, {}),
        ("rotary", ODD_ROTARY, {}),
        ("unsquared", ODD_UNSQUARED, {}),
        ("pair-values", ODD_PAIR_VALUES, {"shape": (2, 7)}),
        ("key-mask", ODD_MULTIMER, {"shape": (2, 7), "hidden": ("key_mask",)}),
        ("pair-mask", ODD, {"shape": (2, 7), "hidden": ("key_mask", "pair_mask")}),
        ("pair-mask-unsquared", ODD_UNSQUARED, {"hidden": ("pair_mask",)}),
        ("batch", ODD, {"shape": (2, 5)}),
        ("batch-of-batches", ODD_MULTIMER, {"shape": (2, 3, 5)}),
        ("batch-no-pair", ODD_NO_PAIR, {"shape": (3, 5)}),
        ("spread-50", ODD, {"spread": 50.0, "cluster": 4, "shape": (13,)}),
        ("offset-1000", ODD, {"offset": 1000.0, "shape": (13,)}),
        ("alphafold2", IPAConfig.alphafold2(), {"shape": (31,)}),
        ("alphafold-multimer", IPAConfig.alphafold_multimer(), {"shape": (31,)}),
        ("esmfold", IPAConfig.esmfold(), {"shape": (31,)}),
        ("lucidrains", IPAConfig.lucidrains(64), {"shape": (2, 31)}),
        ("framediff", IPAConfig.framediff(), {"shape": (31,)}),
        ("peptide", IPAConfig.alphafold2(), {"structure": idealised_peptide()}),
    )
}
"""Functions that build the suite's cases, by name."""
