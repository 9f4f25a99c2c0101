"""The residues of a protein: atoms, backbone frames, sequence and mask, whatever file they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipa_bridge.config import IPABlockConfig, IPAConfig, IPATransformerConfig, StructureModuleConfig
from ipa_bridge.proteins.residues import RESTYPES

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64, Shaped
    from numpy import ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """The residues of a protein, chains one after the other as in the file.

    Attributes:
        name: name of its source, such as the file.
        rotation: rotations of the backbone frames, for column vectors: x_global = rotation · x_local + translation.
        translation: origins of the backbone frames, the Cα positions, in Å.
        mask: True where N, Cα and C define a frame; elsewhere rotation is the identity and translation zero.
        atom37: heavy atoms in Å, in the order of `residues.ATOM_TYPES`; missing atoms are zero.
        atom37_mask: True where the atom is present.
        aatype: index into `residues.RESTYPES`, or `UNKNOWN_AATYPE`.
        chain_id: the author's chain names.
        residue_number: the author's numbering.
        insertion_code: "" for none.
    """

    name: str
    rotation: Float64[ndarray, "N 3 3"]
    translation: Float64[ndarray, "N 3"]
    mask: Bool[ndarray, " N"]
    atom37: Float64[ndarray, "N 37 3"]
    atom37_mask: Bool[ndarray, "N 37"]
    aatype: Int64[ndarray, " N"]
    chain_id: Shaped[ndarray, " N"]
    residue_number: Int64[ndarray, " N"]
    insertion_code: Shaped[ndarray, " N"]

    def __len__(self) -> int:
        return len(self.mask)

    def __repr__(self) -> str:
        chains = len(set(self.chain_id.tolist()))
        resolved = int(self.mask.sum())
        return (
            f"Structure({self.name!r}: {len(self)} residues in {chains} chain{'s' * (chains != 1)}, {resolved} with a "
            "backbone frame)"
        )

    @property
    def sequence(self) -> str:
        """One letter per residue, X where the residue is none of the 20."""
        return "".join((RESTYPES + "X")[aatype] for aatype in self.aatype)

    def rigids(
        self, config: IPAConfig | IPABlockConfig | IPATransformerConfig | StructureModuleConfig
    ) -> tuple[Float64[ndarray, "N 3 3"], Float64[ndarray, "N 3"]]:
        """Rotations and translations in the config's frame_unit, the unit in which its module takes frames.

        Pass them to `ipa_jax.Rigid(*…)` or `ipa_torch.Rigid(*map(torch.as_tensor, …))`, and `mask` to the module.

        Raises:
            ValueError: the unit is unknown, or the config's module takes no frames.
        """
        if not hasattr(config, "frame_unit"):
            raise ValueError(f"the config of a module which takes frames was expected; got {type(config).__name__}")
        if config.frame_unit is None:
            raise ValueError(
                "config.frame_unit is None: the unit of this model's frames is unknown. Set it to 10.0 for units of "
                f"10 Å, or 1.0 for Å: config = {_with_unit(config)}"
            )
        return self.rotation, self.translation / config.frame_unit


def _with_unit(config: IPAConfig | IPABlockConfig | IPATransformerConfig | StructureModuleConfig) -> str:
    """Python code that sets the config's frame_unit."""
    path = {IPABlockConfig: ("ipa",), IPATransformerConfig: ("block", "ipa")}.get(type(config), ())
    value = "frame_unit=10.0"
    for depth in reversed(range(len(path) + 1)):
        inner = ".".join(("config", *path[:depth]))
        value = f"dataclasses.replace({inner}, {value})"
        value = f"{path[depth - 1]}={value}" if depth else value
    return value


def import_gemmi(verb: str) -> Any:
    """Imports gemmi, the optional package that reads and writes structures."""
    try:
        import gemmi
    except ImportError as error:
        raise ImportError(f"{verb} structures needs gemmi: pip install 'ipa-twins[structures]'") from error
    return gemmi
