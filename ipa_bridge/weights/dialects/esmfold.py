"""ESMFold, as in Hugging Face's transformers: OpenFold 1's names and function under `trunk.structure_module.`.

Its ε is 1e-8, from the structure module's config; the 1e-12 that is also in the config is for layer norms.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from ipa_bridge.config import Config, IPAConfig, StructureModuleConfig
from ipa_bridge.weights.dialects.openfold import OPENFOLD_V1
from ipa_bridge.weights.dialects.spec import Dialect, Form


def _finish(config: Config) -> Config:
    if isinstance(config, StructureModuleConfig):
        return replace(config, ipa=cast(IPAConfig, _finish(config.ipa)))
    if isinstance(config, IPAConfig):
        return replace(config, point_weight_init=0.0)
    return config


ESMFOLD = Dialect(
    name="esmfold",
    title="ESMFold",
    rows={kind: OPENFOLD_V1.rows[kind] for kind in (StructureModuleConfig, IPAConfig)},
    forms={"monomer": Form(scalar_bias=True, point_bias=True, norm_form="add", norm_epsilon=1e-8, one_width=True)},
    landmarks={kind: OPENFOLD_V1.landmarks[kind] for kind in (StructureModuleConfig, IPAConfig)},
    absent=OPENFOLD_V1.absent,
    finish=_finish,
    epsilon_argument="epsilon",
    transitions=3,
)
