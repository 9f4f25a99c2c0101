"""What a model is: frozen, typed configurations and their named presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

Layout = Literal["monomer", "multimer"]
NormForm = Literal["add", "clamp"]
Implementation = Literal["reference", "streamed", "fused"]
"""Names of the attention's implementations; see `point_attention`."""

UNIT_SOFTPLUS = math.log(math.e - 1.0)
"""The γ at which softplus(γ) = 1, AlphaFold's initial point weight."""

SMALLEST_FLOAT32 = 2.0**-126
"""The least normal number of float32: below it, hardware may take a number for zero."""


@dataclass(frozen=True, kw_only=True)
class IPAConfig:
    """One invariant point attention (Jumper et al. 2021, Suppl. Alg. 22).

    Attributes:
        num_channel: c_s, width of the single representation, in and out.
        pair_channel: c_z, width of the pair representation; None for an attention without one,
            whose logits then have two terms and scale √(1/2) instead of √(1/3).
        num_head: H, attention heads.
        num_scalar_qk: C, scalar query and key channels per head.
        num_scalar_v: scalar value channels per head.
        num_point_qk: P, query and key points per head.
        num_point_v: value points per head.
        layout: how the projections are named and packed: AlphaFold's "monomer" or "multimer" parameters.
        scalar_bias: the scalar query, key and value projections have biases.
        point_bias: the point projections have biases.
        norm_form: the length of a value point x: "add" is √(|x|² + ε), "clamp" is √max(|x|², ε²).
        norm_epsilon: that ε.
        pair_value_channel: width that the attended pair representation is projected down to before it is read (`down_z`
            of FrameDiff and its family; the bias reads the whole pair); None for the pair as it is.
        position_scale: what the frames' translations are divided by before anything reads them: 10 for frames in Å and
            weights trained on nm; 1 where the caller scales, as the structure module does.
        frame_unit: Å per unit of the translations that the caller passes: 10 where frames in Å must be divided by 10
            first, 1 where they go in as they are; None for unknown. It changes no output: `Structure.rigids` divides by
            it, and a module called with frames in Å warns where it is 10 or more.
        point_weight_init: γ before training; the point weight is softplus(γ).
        zero_init: the output projection starts at zero, so that a residual branch starts as the identity.

    Raises:
        ValueError: a width is not a positive integer, a name is not one of those listed, ε is no positive number that
            float32 can hold, a position_scale or frame_unit that is not positive, or a pair_value_channel without a
            pair_channel.
    """

    num_channel: int
    pair_channel: int | None
    num_head: int
    num_scalar_qk: int
    num_scalar_v: int
    num_point_qk: int
    num_point_v: int
    layout: Layout = "monomer"
    scalar_bias: bool = True
    point_bias: bool = True
    norm_form: NormForm = "add"
    norm_epsilon: float = 1e-8
    pair_value_channel: int | None = None
    position_scale: float = 1.0
    frame_unit: float | None = None
    point_weight_init: float = UNIT_SOFTPLUS
    zero_init: bool = True

    def __post_init__(self) -> None:
        for field in ("num_channel", "num_head", "num_scalar_qk", "num_scalar_v", "num_point_qk", "num_point_v"):
            _check_width(field, getattr(self, field))
        if self.pair_channel is not None:
            _check_width("pair_channel", self.pair_channel, "; pass None for no pair representation")
        if self.pair_value_channel is not None:
            _check_width("pair_value_channel", self.pair_value_channel, "; pass None for the pair as it is")
            if self.pair_channel is None:
                raise ValueError("pair_value_channel must be None where pair_channel is: there is no pair to project")
        for field, names in (("layout", get_args(Layout)), ("norm_form", get_args(NormForm))):
            if getattr(self, field) not in names:
                raise ValueError(f"{field} must be one of {', '.join(names)}; got {getattr(self, field)!r}")
        for field in ("scalar_bias", "point_bias", "zero_init"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be True or False; got {getattr(self, field)!r}")
        _check_number("norm_epsilon", self.norm_epsilon)
        least = SMALLEST_FLOAT32 if self.norm_form == "add" else math.sqrt(SMALLEST_FLOAT32)
        if self.norm_epsilon < least:
            raise ValueError(
                f"norm_epsilon must be a positive number, at least {least:.2g} for float32 to hold what is under the "
                f"root, or the norm's gradient at a zero-length point is not finite; got {self.norm_epsilon!r}"
            )
        _check_number("point_weight_init", self.point_weight_init)
        _check_number("position_scale", self.position_scale)
        if not self.position_scale > 0:
            raise ValueError(f"position_scale must be positive; got {self.position_scale!r}")
        if self.frame_unit is not None:
            _check_number("frame_unit", self.frame_unit, "; pass None for unknown")
            if not self.frame_unit > 0:
                raise ValueError(f"frame_unit must be positive, in Å; got {self.frame_unit!r}; pass None for unknown")

    @property
    def num_logit_terms(self) -> int:
        """T, the number of logit terms: scalars, points and, if there is a pair representation, its bias."""
        return 2 if self.pair_channel is None else 3

    @property
    def num_feature(self) -> int:
        """Width of the concatenated features that the output projection reads (line 11)."""
        pair_value = self.pair_value_channel or self.pair_channel or 0
        return self.num_head * (self.num_scalar_v + 4 * self.num_point_v + pair_value)

    @classmethod
    def alphafold2(cls) -> IPAConfig:
        """AlphaFold 2 monomer (`model_1` … `model_5`, with or without `_ptm`); also OpenFold's sizes."""
        return cls(
            num_channel=384,
            pair_channel=128,
            num_head=12,
            num_scalar_qk=16,
            num_scalar_v=16,
            num_point_qk=4,
            num_point_v=8,
            frame_unit=10.0,
        )

    @classmethod
    def alphafold_multimer(cls) -> IPAConfig:
        """AlphaFold-Multimer: one projection each for q, k and v, scalars without bias, clamped norms; 20 Å."""
        return replace(cls.alphafold2(), layout="multimer", scalar_bias=False, norm_form="clamp", frame_unit=20.0)

    @classmethod
    def esmfold(cls) -> IPAConfig:
        """ESMFold's structure module: AlphaFold 2's attention, but that γ starts at 0."""
        return replace(cls.alphafold2(), point_weight_init=0.0)

    @classmethod
    def framediff(cls) -> IPAConfig:
        """One block of FrameDiff, and of FrameFlow and FoldFlow: frames in Å, which it reads in nm, and `down_z`.

        Each of its blocks (`trunk.ipa_0` …) has weights of its own.
        """
        return cls(
            num_channel=256,
            pair_channel=128,
            num_head=8,
            num_scalar_qk=256,
            num_scalar_v=256,
            num_point_qk=8,
            num_point_v=12,
            pair_value_channel=32,
            position_scale=10.0,
            frame_unit=1.0,
        )

    @classmethod
    def lucidrains(
        cls,
        dim: int,
        *,
        heads: int = 8,
        scalar_key_dim: int = 16,
        scalar_value_dim: int = 16,
        point_key_dim: int = 4,
        point_value_dim: int = 4,
        pairwise_repr_dim: int | None = None,
        require_pairwise_repr: bool = True,
        eps: float = 1e-8,
    ) -> IPAConfig:
        """The PyPI package `invariant-point-attention`, with its constructor's own argument names and defaults.

        Its mask leaves a masked residue attending to all keys uniformly; here such a row attends to them
        by their logits, as in AlphaFold. Valid rows are the same.
        """
        return cls(
            num_channel=dim,
            pair_channel=(dim if pairwise_repr_dim is None else pairwise_repr_dim) if require_pairwise_repr else None,
            num_head=heads,
            num_scalar_qk=scalar_key_dim,
            num_scalar_v=scalar_value_dim,
            num_point_qk=point_key_dim,
            num_point_v=point_value_dim,
            layout="multimer",
            scalar_bias=False,
            point_bias=False,
            norm_epsilon=eps,
            zero_init=False,
        )


@dataclass(frozen=True, kw_only=True)
class StructureModuleConfig:
    """One structure module (Jumper et al. 2021, Suppl. Alg. 20).

    Attributes:
        ipa: its attention, whose widths c_s and c_z, layout and zero_init are the module's too. Its frame_unit becomes
            position_scale, whatever it was, since the module divides by that.
        num_layer: how often the fold iteration runs.
        tied_layers: one set of weights serves all layers, as in AlphaFold; else each has its own.
        num_layer_in_transition: linear layers of the transition.
        dropout: rate, in training only.
        position_scale: Å per unit of the frames that the attention sees.
        sidechain_channel: width of the side chains' residual network.
        num_residual_block: its depth.

    Raises:
        ValueError: an attention without pair representation or with a unit of its own, a number of layers or a width
            that is not a positive integer, a dropout outside [0, 1), or a position_scale that is not positive.
    """

    ipa: IPAConfig
    num_layer: int = 8
    tied_layers: bool = True
    num_layer_in_transition: int = 3
    dropout: float = 0.1
    position_scale: float = 10.0
    sidechain_channel: int = 128
    num_residual_block: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.ipa, IPAConfig):
            raise ValueError(f"ipa must be an IPAConfig; got {self.ipa!r}")
        if self.ipa.pair_channel is None:
            raise ValueError("ipa.pair_channel must be a width: a structure module reads a pair representation")
        if self.ipa.position_scale != 1:
            raise ValueError(
                f"ipa.position_scale must be 1 in a structure module, whose own position_scale says the unit; got "
                f"{self.ipa.position_scale!r}"
            )
        for field in ("num_layer", "num_layer_in_transition", "sidechain_channel", "num_residual_block"):
            _check_width(field, getattr(self, field))
        if not isinstance(self.tied_layers, bool):
            raise ValueError(f"tied_layers must be True or False; got {self.tied_layers!r}")
        for field in ("dropout", "position_scale"):
            _check_number(field, getattr(self, field))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a rate in [0, 1); got {self.dropout!r}")
        if not self.position_scale > 0:
            raise ValueError(f"position_scale must be positive, in Å; got {self.position_scale!r}")
        if self.ipa.frame_unit != self.position_scale:
            object.__setattr__(self, "ipa", replace(self.ipa, frame_unit=self.position_scale))

    @property
    def frame_unit(self) -> float:
        """Å per unit of the frames that the caller passes: they are in Å."""
        return 1.0

    @property
    def num_channel(self) -> int:
        """c_s, width of the single representation."""
        return self.ipa.num_channel

    @property
    def pair_channel(self) -> int:
        """c_z, width of the pair representation."""
        return cast(int, self.ipa.pair_channel)

    @classmethod
    def alphafold2(cls) -> StructureModuleConfig:
        """AlphaFold 2 monomer, all five models."""
        return cls(ipa=IPAConfig.alphafold2())

    @classmethod
    def alphafold_multimer(cls) -> StructureModuleConfig:
        """AlphaFold-Multimer: frames in units of 20 Å."""
        return cls(ipa=IPAConfig.alphafold_multimer(), position_scale=20.0)

    @classmethod
    def esmfold(cls) -> StructureModuleConfig:
        """ESMFold: the monomer form."""
        return cls(ipa=IPAConfig.esmfold())


@dataclass(frozen=True, kw_only=True)
class IPABlockConfig:
    """An attention and a transition, each with a residual connection and a layer norm.

    Attributes:
        ipa: the attention, whose c_s, layout and zero_init are the block's too.
        num_layer_in_transition: linear layers of the transition, ReLUs between them.
        transition_factor: width of its hidden layers over c_s.
        post_norm: layer norms follow the residual sums, as in AlphaFold; else they precede attention and transition.
        attention_dropout: rate after the attention's residual sum, in training only.
        transition_dropout: rate after the transition's.

    Raises:
        ValueError: a number of layers or a factor that is not a positive integer, or a rate outside [0, 1).
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
            _check_width(field, getattr(self, field))
        if not isinstance(self.post_norm, bool):
            raise ValueError(f"post_norm must be True or False; got {self.post_norm!r}")
        for field in ("attention_dropout", "transition_dropout"):
            _check_number(field, getattr(self, field))
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must be a rate in [0, 1); got {getattr(self, field)!r}")

    @property
    def frame_unit(self) -> float | None:
        """Å per unit of the frames that the caller passes, None for unknown: its attention's."""
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
    """Blocks with weights of their own, after each of which the frames move.

    Attributes:
        block: every layer's block.
        num_layer: how many there are.
        num_token: size of the vocabulary, where the input is integers to embed; None for a single representation.
        predict_points: also predict a point per residue, local to its last frame.
        detach_rotations: rotations pass no gradient into the attention and into the next translations.
        original_composition_order: rotate as the package `invariant-point-attention` does, which turns each update the
            wrong way round and applies it on the wrong side, so that what is predicted does not move with the input.
            For its trained weights only.

    Raises:
        ValueError: a number of layers or tokens that is not a positive integer.
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
        _check_width("num_layer", self.num_layer)
        if self.num_token is not None:
            _check_width("num_token", self.num_token, "; pass None for a single representation")
        for field in ("predict_points", "detach_rotations", "original_composition_order"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be True or False; got {getattr(self, field)!r}")

    @property
    def ipa(self) -> IPAConfig:
        """Every layer's attention."""
        return self.block.ipa

    @property
    def frame_unit(self) -> float | None:
        """Å per unit of the frames that the caller passes, None for unknown: its attention's."""
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

        It composes rotations so that it is not equivariant; its trained weights want original_composition_order=True.
        """
        return cls(
            block=IPABlockConfig.lucidrains(dim, **block),
            num_layer=depth,
            num_token=num_tokens,
            predict_points=predict_points,
            detach_rotations=detach_rotations,
            original_composition_order=original_composition_order,
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
        ValueError: a width that is not a positive integer.
    """

    num_channel: int = 384
    hidden_channel: int = 128
    num_bin: int = 50
    zero_init: bool = True

    def __post_init__(self) -> None:
        for field in ("num_channel", "hidden_channel", "num_bin"):
            _check_width(field, getattr(self, field))


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The numbers in the structure module's losses; the defaults are AlphaFold's.

    Lengths are in Å. The defaults of the losses' own arguments are read from here, as are all their other constants.

    Attributes:
        sidechain_weight: weight of the side chains' FAPE in the sum, and 1 minus it that of the backbone's.
        chi_weight: weight of the torsions' error.
        angle_norm_weight: weight of the lengths of their vectors.
        violation_weight: weight of structural violations, 0 in AlphaFold's initial training and 1 in fine-tuning.
        use_clamped_fape: weight of the backbone's clamped FAPE, and 1 minus it that of the unclamped one.
        clamp_distance: largest error that FAPE counts.
        length_scale: unit of FAPE.
        interface_clamp_distance: largest error that FAPE counts between chains.
        interface_length_scale: unit of FAPE between chains.
        fape_epsilon: added to FAPE's squared distances and to its number of pairs.
        angle_norm_epsilon: added to the squared lengths of the torsions' vectors.
        distance_epsilon: added to squared distances between atoms, and to squared differences of distances.
        mean_epsilon: added to the number of what a mask counts, under a mean over it.
        tolerance_factor: standard deviations from the literature's bonds and angles that are no violation.
        overlap_tolerance: overlap of van der Waals spheres that is no violation.
        ca_ca_tolerance: distance of neighbouring Cα beyond the literature's that is no violation.
        violation_epsilon: added to squared lengths and deviations of bonds, and to the numbers of bonds, pairs of atoms
            and atoms under the means of violations.
        lddt_cutoff: largest true distance of a pair that counts in lDDT.
        lddt_thresholds: errors below which a pair scores, each an equal part of 1.
        lddt_epsilon: added to the number of pairs and to their score.
        min_resolution: best resolution of structures on which pLDDT is trained.
        max_resolution: worst resolution of structures on which pLDDT is trained.
        plddt_epsilon: added to the number of residues.
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
"""What a set of weights may belong to."""


def attention_of(config: Config) -> IPAConfig:
    """Of what holds one, or the attention itself."""
    return cast(IPAConfig, config if isinstance(config, IPAConfig) else getattr(config, "ipa", None))


def replace_attention(config: Config, ipa: IPAConfig) -> Config:
    """The config with another attention."""
    if isinstance(config, IPATransformerConfig):
        return replace(config, block=replace(config.block, ipa=ipa))
    return replace(config, ipa=ipa) if isinstance(config, IPABlockConfig | StructureModuleConfig) else ipa


def _check_width(field: str, value: object, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field} must be a positive integer; got {value!r}{hint}")


def _check_number(field: str, value: object, hint: str = "") -> None:
    try:
        finite = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        finite = False
    if not finite:
        raise ValueError(f"{field} must be a finite number; got {value!r}{hint}")
