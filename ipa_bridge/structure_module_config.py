"""Configuration of a structure module: a frozen, typed dataclass with named presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from ipa_bridge.attention_config import SMALLEST_FLOAT32, IPAConfig, check_number, check_width

SidechainInput = Literal["summed", "concatenated"]

_WIDTHS = ("num_layer", "num_layer_in_transition", "transition_factor", "sidechain_channel", "num_residual_block")
_SWITCHES = (
    *("tied_layers", "input_norm", "distance_channel", "project_initial_act", "skip_connection"),
    "detach_rotations",
)


@dataclass(frozen=True, kw_only=True)
class StructureModuleConfig:
    """One structure module (Jumper et al. 2021, Suppl. Alg. 20).

    Attributes:
        ipa: config of the attention; its widths c_s and c_z, layout and zero_init apply to the whole module. Its
            frame_unit is replaced by position_scale, because the module divides by position_scale.
        num_layer: number of fold iterations.
        tied_layers: True if all layers share one set of weights, as in AlphaFold; False if each has its own.
        num_layer_in_transition: linear layers of the transition.
        transition_factor: width of the transition's hidden layers, in multiples of c_s.
        dropout: dropout rate, in training only.
        position_scale: Å per unit of the frames that the attention sees.
        sidechain_channel: width of the side chains' residual network.
        num_residual_block: number of residual blocks in that network.
        single_input_channel: width of the single representation that the caller passes; None if it is c_s.
        pair_input_channel: width of the pair representation that the caller passes, which is then projected; None if
            it is not projected.
        input_norm: the inputs go through layer norms first (lines 1–2).
        distance_channel: the last of the c_z channels is the distance between the residues' origins, in the unit of
            the attention's frames, computed anew in each layer; it is zero where the mask is.
        project_initial_act: the side chains read the single representation as it is after the initial projection;
            False if as it is before, as in AlphaFold.
        skip_connection: the initial activations are added after the transition of every layer but the last.
        detach_rotations: no gradient passes through rotations between layers (line 20).
        sidechain_input: the side chains' network starts with the "summed" projections of the current and the initial
            activations, or with both "concatenated".
        num_layer_in_residual_block: linear layers of a residual block, 2 or 3.
        smallest_angle_length: a predicted (sin, cos) shorter than this is divided by this instead of by its length.

    Raises:
        ValueError: the attention has no pair representation, or a position_scale other than 1; a number of layers or a
            width is not a positive integer; dropout is outside [0, 1); a length is not positive; or two fields
            contradict each other.
    """

    ipa: IPAConfig
    num_layer: int = 8
    tied_layers: bool = True
    num_layer_in_transition: int = 3
    transition_factor: int = 1
    dropout: float = 0.1
    position_scale: float = 10.0
    sidechain_channel: int = 128
    num_residual_block: int = 2
    single_input_channel: int | None = None
    pair_input_channel: int | None = None
    input_norm: bool = True
    distance_channel: bool = False
    project_initial_act: bool = False
    skip_connection: bool = False
    detach_rotations: bool = True
    sidechain_input: SidechainInput = "summed"
    num_layer_in_residual_block: int = 2
    smallest_angle_length: float = 1e-6

    def __post_init__(self) -> None:
        if not isinstance(self.ipa, IPAConfig):
            raise ValueError(f"ipa must be an IPAConfig; got {self.ipa!r}")
        if self.ipa.pair_channel is None:
            raise ValueError(
                "ipa.pair_channel must be a width, because a structure module reads a pair representation; got None"
            )
        if self.ipa.position_scale != 1:
            raise ValueError(
                f"ipa.position_scale must be 1 in a structure module, because the module's own position_scale sets the "
                f"unit; got {self.ipa.position_scale!r}"
            )
        for field in _WIDTHS:
            check_width(field, getattr(self, field))
        for field, default in (("single_input_channel", "c_s"), ("pair_input_channel", "no projection")):
            if getattr(self, field) is not None:
                check_width(field, getattr(self, field), f"; pass None for {default}")
        for field in _SWITCHES:
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be True or False; got {getattr(self, field)!r}")
        for field in ("dropout", "position_scale", "smallest_angle_length"):
            check_number(field, getattr(self, field))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a rate in [0, 1); got {self.dropout!r}")
        if not self.position_scale > 0:
            raise ValueError(f"position_scale must be positive, in Å; got {self.position_scale!r}")
        if self.smallest_angle_length < math.sqrt(SMALLEST_FLOAT32):
            raise ValueError(
                f"smallest_angle_length must be at least {math.sqrt(SMALLEST_FLOAT32):.2g}, for float32 to hold its "
                f"square; got {self.smallest_angle_length!r}"
            )
        self._check_forms()
        if self.ipa.frame_unit != self.position_scale:
            object.__setattr__(self, "ipa", replace(self.ipa, frame_unit=self.position_scale))
        if self.single_input_channel == self.num_channel:
            object.__setattr__(self, "single_input_channel", None)

    def _check_forms(self) -> None:
        """Checks that fields do not contradict each other."""
        if self.distance_channel and self.pair_channel == 1:
            raise ValueError("distance_channel needs an ipa.pair_channel of 2 or more: one is for the distance")
        if self.sidechain_input not in get_args(SidechainInput):
            names = ", ".join(get_args(SidechainInput))
            raise ValueError(f"sidechain_input must be one of {names}; got {self.sidechain_input!r}")
        width = self.num_channel + self.initial_act_channel
        if self.sidechain_input == "concatenated" and self.sidechain_channel != width:
            raise ValueError(
                f"sidechain_channel must be {width} if sidechain_input is 'concatenated': the widths of the current "
                f"and the initial activations; got {self.sidechain_channel}"
            )
        if self.num_layer_in_residual_block not in (2, 3):
            raise ValueError(f"num_layer_in_residual_block must be 2 or 3; got {self.num_layer_in_residual_block!r}")
        if self.skip_connection and self.tied_layers:
            raise ValueError("skip_connection needs tied_layers=False: the last layer has no such connection")
        if self.skip_connection and self.initial_act_channel != self.num_channel:
            raise ValueError(
                f"skip_connection adds the initial activations, whose width must be {self.num_channel}; it is "
                f"{self.initial_act_channel}: set project_initial_act=True"
            )

    @property
    def frame_unit(self) -> float:
        """Å per unit of the frames that the caller passes: always 1, since they are in Å."""
        return 1.0

    @property
    def num_channel(self) -> int:
        """c_s, width of the single representation that the attention reads."""
        return self.ipa.num_channel

    @property
    def pair_channel(self) -> int:
        """c_z, width of the pair representation that the attention reads."""
        return cast(int, self.ipa.pair_channel)

    @property
    def embedded_pair_channel(self) -> int:
        """c_z without the channel of distances, if there is one."""
        return self.pair_channel - self.distance_channel

    @property
    def input_channels(self) -> tuple[int, int]:
        """Widths of the single and the pair representation that the caller passes."""
        return (
            self.num_channel if self.single_input_channel is None else self.single_input_channel,
            self.embedded_pair_channel if self.pair_input_channel is None else self.pair_input_channel,
        )

    @property
    def initial_act_channel(self) -> int:
        """Width of the initial activations that the side chains read."""
        return self.num_channel if self.project_initial_act else self.input_channels[0]

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

    @classmethod
    def abodybuilder3(
        cls,
        *,
        c_s: int = 23,
        c_z: int = 132,
        embed_dim: int = 128,
        c_resnet: int = 256,
        use_original_sm: bool = True,
        rotation_propagation: bool = True,
    ) -> StructureModuleConfig:
        """ABodyBuilder3, with its constructor's own argument names and its published sizes as defaults.

        Every layer has its own weights. Frames are in Å.

        Args:
            c_s: width of the single representation: 23, or 1024 with the language model's embeddings.
            c_z: width of the pair representation.
            embed_dim: width that both are projected to.
            c_resnet: width of the side chains' network.
            use_original_sm: False for an attention without biases and another network of side chains, as in
                ABodyBuilder2; c_resnet must then be twice embed_dim.
            rotation_propagation: gradients pass through rotations between layers.
        """
        ipa = IPAConfig(
            num_channel=embed_dim,
            pair_channel=embed_dim,
            num_head=12,
            num_scalar_qk=16,
            num_scalar_v=16,
            num_point_qk=4,
            num_point_v=8,
            scalar_bias=use_original_sm,
            point_bias=use_original_sm,
            attention_2d_bias=use_original_sm,
            norm_epsilon=1e-7,
        )
        return cls(
            ipa=ipa,
            tied_layers=False,
            transition_factor=2,
            position_scale=1.0,
            sidechain_channel=c_resnet,
            single_input_channel=c_s,
            pair_input_channel=c_z,
            input_norm=False,
            distance_channel=True,
            project_initial_act=True,
            detach_rotations=not rotation_propagation,
            sidechain_input="summed" if use_original_sm else "concatenated",
            num_layer_in_residual_block=2 if use_original_sm else 3,
            smallest_angle_length=math.sqrt(1e-7),
        )

    @classmethod
    def ibex(
        cls,
        *,
        c_s: int = 25,
        c_z: int = 132,
        embed_dim: int = 128,
        c_resnet: int = 256,
        use_original_sm: bool = True,
        rotation_propagation: bool = True,
        use_skip_connection: bool = False,
    ) -> StructureModuleConfig:
        """Ibex, whose structure module is ABodyBuilder3's, with a skip connection if `use_skip_connection`.

        Args:
            c_s: width of the single representation: 25 with the conformation (bound or unbound), plus plm_input_dim
                where the caller appends the output of `plm_in`, which is no part of this module.
            c_z: as in `abodybuilder3`.
            embed_dim: as in `abodybuilder3`.
            c_resnet: as in `abodybuilder3`.
            use_original_sm: as in `abodybuilder3`.
            rotation_propagation: as in `abodybuilder3`.
            use_skip_connection: the embedded single representation is added after each layer but the last.
        """
        same = cls.abodybuilder3(
            c_s=c_s,
            c_z=c_z,
            embed_dim=embed_dim,
            c_resnet=c_resnet,
            use_original_sm=use_original_sm,
            rotation_propagation=rotation_propagation,
        )
        return replace(same, skip_connection=use_skip_connection)
