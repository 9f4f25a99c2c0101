"""AlphaFold's own parameters in both layouts, and ours in haiku and torch, which have the same names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from ipa_bridge.config import Config, IPAConfig, PredictedLDDTConfig, StructureModuleConfig
from ipa_bridge.kinds import KINDS, infer_config, parameter_shapes
from ipa_bridge.parameters import Shapes, canonical_leaf, torch_name
from ipa_bridge.weights.dialects.spec import Dialect, Form, Transform


class HaikuDialect(Dialect):
    """A dialect with canonical names and shapes."""

    separator: ClassVar[str] = "/"

    def names(self, config: Config) -> dict[str, tuple[str, Transform]]:
        """Maps every canonical name to itself."""
        return {name: (name, Transform(shape, flat=False)) for name, shape in parameter_shapes(config).items()}

    def canonical_names(self, keys: Iterable[str], kind: type) -> dict[str, str]:
        """Maps every name to itself."""
        return {key: key for key in keys}

    def infer(self, shapes: Shapes, kind: type) -> Config:
        """Infers the config from names and shapes."""
        return infer_config(shapes)


class TorchDialect(Dialect):
    """A dialect with canonical names in torch's form: `/` → `.`; weights are transposed and their heads flattened."""

    def names(self, config: Config) -> dict[str, tuple[str, Transform]]:
        """Maps every canonical name to its torch name."""
        return {
            name: (
                torch_name(name),
                Transform(shape, turned=name.endswith("/weights"), flat=not name.endswith("/embeddings")),
            )
            for name, shape in parameter_shapes(config).items()
        }

    def canonical_names(self, keys: Iterable[str], kind: type) -> dict[str, str]:
        """Maps every torch name to its canonical name."""
        canonical = {}
        for key in keys:
            *modules, leaf = key.split(".")
            canonical[key] = "/".join([*modules, canonical_leaf(modules[-1] if modules else "", leaf)])
        return canonical


_FOLD_ITERATIONS_OWN = "rigid_sidechain/unnormalized_angles/weights"
"""A parameter that a structure module's layer has and an IPA block does not."""

_OMEGAFOLDS = "bias_2d.weight"
"""A parameter of OmegaFold's attention, whose point weights have AlphaFold's name."""

_ALPHAFOLDS = (StructureModuleConfig, IPAConfig, PredictedLDDTConfig)


def _lies_in_alphafold(root: str) -> bool:
    """Returns True for a path that only AlphaFold's own parameters have; their names below the path are also ours."""
    return "alphafold_iteration" in root.split("/")


ALPHAFOLD = HaikuDialect(
    name="alphafold",
    title="AlphaFold",
    rows={kind: {} for kind in _ALPHAFOLDS},
    forms={
        "monomer": Form(scalar_bias=True, point_bias=True, norm_form="add", norm_epsilon=1e-8, epsilon_is_fixed=True),
        "multimer": Form(
            scalar_bias=False, point_bias=True, norm_form="clamp", norm_epsilon=1e-8, epsilon_is_fixed=True
        ),
    },
    landmarks={kind: KINDS[kind].landmarks for kind in _ALPHAFOLDS},
    absent=(_OMEGAFOLDS,),
)

IPA_JAX = HaikuDialect(
    name="ipa_jax",
    title="IPA Twins in Haiku",
    rows={kind: {} for kind in KINDS},
    forms={},
    landmarks={kind: row.landmarks for kind, row in KINDS.items()},
    absent=(_FOLD_ITERATIONS_OWN, _OMEGAFOLDS),
    at=lambda root, kind: kind not in _ALPHAFOLDS or not _lies_in_alphafold(root),
)

IPA_TORCH = TorchDialect(
    name="ipa_torch",
    title="IPA Twins in PyTorch",
    rows={kind: {} for kind in KINDS},
    forms={},
    landmarks={kind: tuple(map(torch_name, row.landmarks)) for kind, row in KINDS.items()},
    absent=(torch_name(_FOLD_ITERATIONS_OWN), _OMEGAFOLDS),
)
