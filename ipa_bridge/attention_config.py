"""Configuration of an invariant point attention: a frozen, typed dataclass with named presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

Layout = Literal["monomer", "multimer"]
NormForm = Literal["add", "clamp"]
DistanceForm = Literal["squared", "unsquared"]
PointWeightForm = Literal["softplus", "identity"]
Implementation = Literal["reference", "streamed", "fused"]
"""Names of the attention's implementations; see `point_attention`."""

UNIT_SOFTPLUS = math.log(math.e - 1.0)
"""The γ at which softplus(γ) = 1, AlphaFold's initial point weight."""

SMALLEST_FLOAT32 = 2.0**-126
"""Smallest normal float32 number; hardware may treat smaller ones as zero."""


_CHOICES = {
    "layout": get_args(Layout),
    "norm_form": get_args(NormForm),
    "distance_form": get_args(DistanceForm),
    "point_weight_form": get_args(PointWeightForm),
}
_SWITCHES = (
    "scalar_bias",
    "point_bias",
    "zero_init",
    "rotary_embedding",
    "pair_bias",
    "attention_2d_bias",
    "pair_value_per_head",
)


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
        norm_epsilon: the ε in `norm_form`. With "add" it may be 0; the gradient of a zero-length point is then zero.
        distance_form: query and key points enter the logits with their "squared" distance |q − k|², or with their
            "unsquared" distance √(|q − k|² + distance_epsilon).
        distance_epsilon: the ε of unsquared distances; 0 for squared ones. If it is 0, the gradient is zero where two
            points coincide.
        point_weight_form: a head's point weight is the "softplus" of its γ, or γ itself ("identity").
        logit_terms: T in the scale √(1/T) of the logits; None for 3 with a pair representation and 2 without.
        rotary_embedding: scalar queries and keys are rotated by the residue's index, two channels at a time (Su et
            al. 2021). The frequencies are parameters.
        pair_bias: the pair representation adds a bias to the logits (line 4); if False, it is only averaged (line 8).
        attention_2d_bias: the projection to that bias has a bias of its own, which cancels in the softmax.
        pair_value_channel: width to which the attended pair representation is projected (`down_z` in FrameDiff and its
            family; the bias still reads the full pair); None for no projection.
        pair_value_per_head: each head has its own projection to pair_value_channel, without a bias (`pair_value` in
            BioEmu); if False, all heads share one.
        position_scale: divisor of the frames' translations, applied before anything reads them: 10 for frames in Å and
            weights trained on nm; 1 if the caller scales, as the structure module does.
        frame_unit: Å per unit of the translations that the caller passes: 10 if frames in Å must be divided by 10
            first, 1 if they are passed in Å; None if unknown. It changes no output. `Structure.rigids` divides by it,
            and a module with a frame_unit of 10 or more warns if it is called with frames in Å.
        point_weight_init: γ before training.
        zero_init: the output projection starts at zero, so that a residual branch starts as the identity.

    Raises:
        ValueError: a width is not a positive integer, a name is not one of those listed, an ε is one that float32
            cannot hold, position_scale or frame_unit is not positive, or two fields contradict each other.
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
    distance_form: DistanceForm = "squared"
    distance_epsilon: float = 0.0
    point_weight_form: PointWeightForm = "softplus"
    logit_terms: int | None = None
    rotary_embedding: bool = False
    pair_bias: bool = True
    attention_2d_bias: bool = True
    pair_value_channel: int | None = None
    pair_value_per_head: bool = False
    position_scale: float = 1.0
    frame_unit: float | None = None
    point_weight_init: float = UNIT_SOFTPLUS
    zero_init: bool = True

    def __post_init__(self) -> None:
        for field in ("num_channel", "num_head", "num_scalar_qk", "num_scalar_v", "num_point_qk", "num_point_v"):
            check_width(field, getattr(self, field))
        if self.pair_channel is not None:
            check_width("pair_channel", self.pair_channel, "; pass None for no pair representation")
        if self.pair_value_channel is not None:
            check_width("pair_value_channel", self.pair_value_channel, "; pass None for no projection")
            if self.pair_channel is None:
                raise ValueError("pair_value_channel must be None if pair_channel is None: there is no pair to project")
        elif self.pair_value_per_head:
            raise ValueError("pair_value_per_head needs a pair_value_channel: the width that each head projects to")
        for field, names in _CHOICES.items():
            if getattr(self, field) not in names:
                raise ValueError(f"{field} must be one of {', '.join(names)}; got {getattr(self, field)!r}")
        for field in _SWITCHES:
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be True or False; got {getattr(self, field)!r}")
        if self.rotary_embedding and self.num_scalar_qk % 2:
            raise ValueError(f"num_scalar_qk must be even if rotary_embedding is True; got {self.num_scalar_qk}")
        if self.logit_terms is not None:
            check_width("logit_terms", self.logit_terms, "; pass None to count them")
        self._check_epsilons()
        check_number("point_weight_init", self.point_weight_init)
        check_number("position_scale", self.position_scale)
        if not self.position_scale > 0:
            raise ValueError(f"position_scale must be positive; got {self.position_scale!r}")
        if self.frame_unit is not None:
            check_number("frame_unit", self.frame_unit, "; pass None for unknown")
            if not self.frame_unit > 0:
                raise ValueError(f"frame_unit must be positive, in Å; got {self.frame_unit!r}; pass None for unknown")

    def _check_epsilons(self) -> None:
        """float32 holds each ε, or it is zero where that has a meaning."""
        for field in ("norm_epsilon", "distance_epsilon"):
            check_number(field, getattr(self, field))
        clamps = self.norm_form == "clamp"
        least = math.sqrt(SMALLEST_FLOAT32) if clamps else SMALLEST_FLOAT32
        if self.norm_epsilon < least and (clamps or self.norm_epsilon != 0):
            raise ValueError(
                f"norm_epsilon must be {'' if clamps else '0 or '}at least {least:.2g}, for float32 to hold what is "
                f"under the root; got {self.norm_epsilon!r}"
            )
        if self.distance_form == "squared" and self.distance_epsilon != 0:
            raise ValueError(f"distance_epsilon must be 0 if distance_form is 'squared'; got {self.distance_epsilon!r}")
        if self.distance_epsilon < SMALLEST_FLOAT32 and self.distance_epsilon != 0:
            raise ValueError(
                f"distance_epsilon must be 0 or at least {SMALLEST_FLOAT32:.2g}, for float32 to hold it; got "
                f"{self.distance_epsilon!r}"
            )

    @property
    def num_logit_terms(self) -> int:
        """T in the scale √(1/T) of the logits: logit_terms or, by default, 3 with a pair and 2 without."""
        return self.logit_terms or (2 if self.pair_channel is None else 3)

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
        """AlphaFold-Multimer: separate projections for q, k and v, scalars without bias, clamped norms, unit 20 Å."""
        return replace(cls.alphafold2(), layout="multimer", scalar_bias=False, norm_form="clamp", frame_unit=20.0)

    @classmethod
    def esmfold(cls) -> IPAConfig:
        """ESMFold's structure module: AlphaFold 2's attention, with γ starting at 0."""
        return replace(cls.alphafold2(), point_weight_init=0.0)

    @classmethod
    def framediff(cls) -> IPAConfig:
        """The attention of FrameDiff, FrameFlow and FoldFlow, with `down_z`; it takes frames in Å and reads them in nm.

        Each block (`trunk.ipa_0` …) has its own weights.
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
    def abodybuilder2(cls, embed_dim: int = 128) -> IPAConfig:
        """The attention of ABodyBuilder2, NanoBodyBuilder2 and TCRBuilder2, which takes frames in Å.

        Args:
            embed_dim: c_s and c_z. Of each system's four models, some have 128 and some 256.
        """
        return cls(
            num_channel=embed_dim,
            pair_channel=embed_dim,
            num_head=12,
            num_scalar_qk=16,
            num_scalar_v=16,
            num_point_qk=4,
            num_point_v=8,
            layout="multimer",
            scalar_bias=False,
            point_bias=False,
            distance_form="unsquared",
            distance_epsilon=1e-8,
            point_weight_form="identity",
            attention_2d_bias=False,
            frame_unit=1.0,
        )

    @classmethod
    def flashabb(cls) -> IPAConfig:
        """FlashABB's attention, which takes frames in Å.

        Its pair representation is the one-hot (index of j − index of i) mod 128 of residues i and j.
        """
        return cls(
            num_channel=128,
            pair_channel=128,
            num_head=12,
            num_scalar_qk=16,
            num_scalar_v=16,
            num_point_qk=4,
            num_point_v=8,
            norm_epsilon=1e-7,
            logit_terms=3,
            rotary_embedding=True,
            pair_bias=False,
            frame_unit=1.0,
        )

    @classmethod
    def mdgen(cls) -> IPAConfig:
        """MDGen's attention, which reads no pair but scales its logits as with one; it takes frames in Å.

        Each layer (`ipa_layers.0.ipa` …) has its own weights.
        """
        return cls(
            num_channel=384,
            pair_channel=None,
            num_head=4,
            num_scalar_qk=32,
            num_scalar_v=32,
            num_point_qk=8,
            num_point_v=8,
            logit_terms=3,
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

        In the package, a masked residue attends to all keys uniformly; here it attends by its logits, as in
        AlphaFold. Rows of valid residues are the same.
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

    @classmethod
    def bioemu(cls, d_model: int = 512, *, d_pair: int = 256, n_head: int = 32) -> IPAConfig:
        """The attention of BioEmu, with its constructor's own argument names; for DiG, d_model is 768.

        BioEmu's frames are in nm, and DiG's in Å: there, replace frame_unit by 1.

        Raises:
            ValueError: d_model is not a multiple of n_head.
        """
        if d_model % n_head:
            raise ValueError(f"d_model must be a multiple of n_head, {n_head}; got {d_model}")
        width = d_model // n_head
        return cls(
            num_channel=d_model,
            pair_channel=d_pair,
            num_head=n_head,
            num_scalar_qk=width,
            num_scalar_v=width,
            num_point_qk=4,
            num_point_v=8,
            layout="multimer",
            scalar_bias=False,
            point_bias=False,
            norm_epsilon=0.0,
            distance_form="unsquared",
            attention_2d_bias=False,
            pair_value_channel=width,
            pair_value_per_head=True,
            frame_unit=10.0,
            zero_init=False,
        )

    @classmethod
    def omegafold(cls) -> IPAConfig:
        """OmegaFold: AlphaFold 2's attention with separate projections for q, k and v, and lengths without an ε."""
        return replace(cls.alphafold2(), layout="multimer", norm_epsilon=0.0, zero_init=False)


def check_width(field: str, value: object, hint: str = "") -> None:
    """Checks that a field's value is a positive integer.

    Raises:
        ValueError: the value is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field} must be a positive integer; got {value!r}{hint}")


def check_number(field: str, value: object, hint: str = "") -> None:
    """Checks that a field's value is a number that is neither infinite nor NaN.

    Raises:
        ValueError: the value is anything else.
    """
    try:
        finite = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        finite = False
    if not finite:
        raise ValueError(f"{field} must be a finite number; got {value!r}{hint}")
