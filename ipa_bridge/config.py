"""Configurations of all modules: frozen, typed dataclasses with named presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipa_bridge.attention_config import (
    DistanceForm,
    Implementation,
    IPAConfig,
    Layout,
    NormForm,
    PointWeightForm,
    check_number,
    check_width,
)
from ipa_bridge.structure_module_config import SidechainInput, StructureModuleConfig

__all__ = [
    "Config",
    "DistanceForm",
    "IPABlockConfig",
    "IPAConfig",
    "IPATransformerConfig",
    "Implementation",
    "Layout",
    "LossConfig",
    "NormForm",
    "PointWeightForm",
    "PredictedLDDTConfig",
    "SidechainInput",
    "StructureModuleConfig",
]


@dataclass(frozen=True, kw_only=True)
class IPABlockConfig:
    """An attention and a transition, each with a residual connection and a layer norm.

    Attributes:
        ipa: config of the attention; its c_s, layout and zero_init apply to the whole block.
        num_layer_in_transition: linear layers of the transition, with ReLUs between them.
        transition_factor: width of the transition's hidden layers, in multiples of c_s.
        post_norm: True if layer norms follow the residual sums, as in AlphaFold; False if they precede attention and
            transition.
        attention_dropout: dropout rate after the attention's residual sum, in training only.
        transition_dropout: dropout rate after the transition's residual sum, in training only.

    Raises:
        ValueError: a number of layers or a factor is not a positive integer, or a rate is outside [0, 1).
    """

    ipa: IPAConfig
    num_layer_in_transition: int = 3
    transition_factor: int = 1
    post_norm: bool = True
    attention_dropout: float = 0.0
    transition_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.ipa, IPAConfig):
            raise ValueError(f"ipa must be an IPAConfig; got {self.ipa!r}")
        for field in ("num_layer_in_transition", "transition_factor"):
            check_width(field, getattr(self, field))
        if not isinstance(self.post_norm, bool):
            raise ValueError(f"post_norm must be True or False; got {self.post_norm!r}")
        for field in ("attention_dropout", "transition_dropout"):
            check_number(field, getattr(self, field))
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must be a rate in [0, 1); got {getattr(self, field)!r}")

    @property
    def frame_unit(self) -> float | None:
        """Å per unit of the frames that the caller passes, from the attention's config; None if unknown."""
        return self.ipa.frame_unit

    @property
    def num_channel(self) -> int:
        """c_s, width of the single representation."""
        return self.ipa.num_channel

    @classmethod
    def lucidrains(
        cls,
        dim: int,
        *,
        ff_mult: int = 1,
        ff_num_layers: int = 3,
        post_norm: bool = True,
        post_attn_dropout: float = 0.0,
        post_ff_dropout: float = 0.0,
        **attention: Any,
    ) -> IPABlockConfig:
        """The package `invariant-point-attention`'s `IPABlock`, with its own argument names and defaults."""
        return cls(
            ipa=IPAConfig.lucidrains(dim, **attention),
            num_layer_in_transition=ff_num_layers,
            transition_factor=ff_mult,
            post_norm=post_norm,
            attention_dropout=post_attn_dropout,
            transition_dropout=post_ff_dropout,
        )


@dataclass(frozen=True, kw_only=True)
class IPATransformerConfig:
    """A stack of IPA blocks, each with its own weights; the frames are updated after each block.

    Attributes:
        block: config of every block.
        num_layer: number of blocks.
        num_token: size of the vocabulary if the input is tokens to embed; None if it is a single representation.
        predict_points: also predict a point per residue, local to its last frame.
        detach_rotations: detach the rotations, so that neither the attention nor the next translations send gradients
            back through them.
        original_composition_order: compose rotations as the package `invariant-point-attention` does: it inverts each
            update and applies it on the wrong side, so that predictions are not equivariant. Only for weights trained
            with that package.

    Raises:
        ValueError: a number of layers or tokens is not a positive integer.
    """

    block: IPABlockConfig
    num_layer: int
    num_token: int | None = None
    predict_points: bool = False
    detach_rotations: bool = True
    original_composition_order: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.block, IPABlockConfig):
            raise ValueError(f"block must be an IPABlockConfig; got {self.block!r}")
        check_width("num_layer", self.num_layer)
        if self.num_token is not None:
            check_width("num_token", self.num_token, "; pass None for a single representation")
        for field in ("predict_points", "detach_rotations", "original_composition_order"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be True or False; got {getattr(self, field)!r}")

    @property
    def ipa(self) -> IPAConfig:
        """Every layer's attention."""
        return self.block.ipa

    @property
    def frame_unit(self) -> float | None:
        """Å per unit of the frames that the caller passes, from the attention's config; None if unknown."""
        return self.ipa.frame_unit

    @property
    def num_channel(self) -> int:
        """c_s, width of the single representation."""
        return self.block.num_channel

    @classmethod
    def lucidrains(
        cls,
        dim: int,
        *,
        depth: int,
        num_tokens: int | None = None,
        predict_points: bool = False,
        detach_rotations: bool = True,
        original_composition_order: bool = False,
        **block: Any,
    ) -> IPATransformerConfig:
        """The package `invariant-point-attention`'s `IPATransformer`, with its constructor's own argument names.

        The package composes rotations in an order that is not equivariant; weights trained with it need
        original_composition_order=True.
        """
        return cls(
            block=IPABlockConfig.lucidrains(dim, **block),
            num_layer=depth,
            num_token=num_tokens,
            predict_points=predict_points,
            detach_rotations=detach_rotations,
            original_composition_order=original_composition_order,
        )

    @classmethod
    def igfold(cls, dim: int, *, depth: int, stop_rotation_grad: bool = False, **block: Any) -> IPATransformerConfig:
        """IgFold's `IPATransformer`, with its constructor's own argument names.

        It returns ideal backbone atoms in the frames, which have no parameters, and the frames as translations and
        quaternions; this transformer returns the frames.
        """
        return cls(
            block=IPABlockConfig.lucidrains(dim, **block),
            num_layer=depth,
            detach_rotations=stop_rotation_grad,
            original_composition_order=True,
        )


@dataclass(frozen=True, kw_only=True)
class PredictedLDDTConfig:
    """The confidence head (Jumper et al. 2021, Suppl. Alg. 29).

    Attributes:
        num_channel: c_s, width of the activations it reads.
        hidden_channel: width of its two hidden layers.
        num_bin: bins of equal width over lDDT from 0 to 1.
        zero_init: the logits start at zero.

    Raises:
        ValueError: a width is not a positive integer.
    """

    num_channel: int = 384
    hidden_channel: int = 128
    num_bin: int = 50
    zero_init: bool = True

    def __post_init__(self) -> None:
        for field in ("num_channel", "hidden_channel", "num_bin"):
            check_width(field, getattr(self, field))


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The numbers in the structure module's losses; the defaults are AlphaFold's.

    Lengths are in Å. The losses read the defaults of their arguments and all other constants from here.

    Attributes:
        sidechain_weight: weight of the side chains' FAPE in the sum; the backbone's FAPE has 1 minus this weight.
        chi_weight: weight of the torsions' error.
        angle_norm_weight: weight of the error in the lengths of the torsions' vectors.
        violation_weight: weight of structural violations, 0 in AlphaFold's initial training and 1 in fine-tuning.
        use_clamped_fape: weight of the backbone's clamped FAPE; the unclamped FAPE has 1 minus this weight.
        clamp_distance: largest error that FAPE counts.
        length_scale: unit of FAPE.
        interface_clamp_distance: largest error that FAPE counts between chains.
        interface_length_scale: unit of FAPE between chains.
        fape_epsilon: added to FAPE's squared distances and to its number of pairs.
        angle_norm_epsilon: added to the squared lengths of the torsions' vectors.
        distance_epsilon: added to squared distances between atoms, and to squared differences of distances.
        mean_epsilon: added to the count in the denominator of a masked mean.
        tolerance_factor: allowed deviation from the literature's bonds and angles, in standard deviations.
        overlap_tolerance: allowed overlap of van der Waals spheres.
        ca_ca_tolerance: allowed excess of the distance between consecutive Cα over the literature's.
        violation_epsilon: added to squared lengths and deviations of bonds, and to the counts of bonds, pairs of atoms
            and atoms in the denominators of the violations' means.
        lddt_cutoff: largest true distance of a pair that counts in lDDT.
        lddt_thresholds: thresholds of the error of a pair; each one that the error is below scores an equal part of 1.
        lddt_epsilon: added to the number of pairs and to their score.
        min_resolution: best resolution of structures on which pLDDT is trained.
        max_resolution: worst resolution of structures on which pLDDT is trained.
        plddt_epsilon: added to the number of residues in the denominator.
    """

    sidechain_weight: float = 0.5
    chi_weight: float = 0.5
    angle_norm_weight: float = 0.01
    violation_weight: float = 1.0
    use_clamped_fape: float = 1.0
    clamp_distance: float = 10.0
    length_scale: float = 10.0
    interface_clamp_distance: float = 1000.0
    interface_length_scale: float = 20.0
    fape_epsilon: float = 1e-4
    angle_norm_epsilon: float = 1e-6
    distance_epsilon: float = 1e-10
    mean_epsilon: float = 1e-10
    tolerance_factor: float = 12.0
    overlap_tolerance: float = 1.5
    ca_ca_tolerance: float = 1.5
    violation_epsilon: float = 1e-6
    lddt_cutoff: float = 15.0
    lddt_thresholds: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    lddt_epsilon: float = 1e-10
    min_resolution: float = 0.1
    max_resolution: float = 3.0
    plddt_epsilon: float = 1e-8


Config = IPAConfig | IPABlockConfig | IPATransformerConfig | StructureModuleConfig | PredictedLDDTConfig
"""Config of any module that `Weights` can hold."""
