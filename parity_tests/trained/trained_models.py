"""Trained models of open licences: how each is loaded, run as a whole, and how its attention is called."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from trained_layers import Call

HEAVY = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRY"
    "ADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
)
LIGHT = "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK"
"""Trastuzumab's variable domains, chains B and A of PDB 1N8Z."""

RNA = "GGCGAUUAGCUCAGUUGGGAGAGCGCCAGA"


@dataclass(frozen=True)
class Trained:
    """A trained model: one file of weights of a published package."""

    package: str
    file: str
    """Path of the weights in the package's folder."""
    dialect: str
    layers: int
    load: Callable[[], nn.Module]
    """The whole model in float32, in evaluation, with the file's weights."""
    predict: Callable[[nn.Module], torch.Tensor]
    """The whole model's prediction, in its dtype."""
    read: Callable[[tuple, dict], Call]
    """A call of the attention in our conventions."""
    run: Callable[[nn.Module, dict[str, torch.Tensor], dict[str, Any]], torch.Tensor]
    """The attention, on leaves in our conventions."""
    noisy: tuple[str, ...]
    """Modules whose outputs are the embedded inputs of the model."""
    root: str = ""
    """Prefix of the attentions' paths in the file."""
    within: str = ""
    """Prefix of their paths in the loaded model, which the file lacks."""
    widened: tuple[tuple[str, str, Callable[[Any], Any]], ...] = ()
    """Module, name in it and what replaces its value while the model runs in float64, where it rounds to float32."""
    comparable: Callable[[Call], bool] = lambda call: True
    """False for a call with masked residues, if the class computes other things for these than our modules do."""
    unit: str = "Å"
    structure: bool = True
    """True if predictions are coordinates, compared after superposition."""

    @property
    def path(self) -> Path:
        """The file of weights."""
        folder = Path(import_module(self.package.replace("-", "_")).__file__).parent
        return folder / self.file


class Wide:
    """The module torch, but with float64 for float32."""

    float32 = torch.float64

    def __init__(self, _: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_float64(model: Trained) -> Iterator[None]:
    """Lets frames keep their dtype, and makes float64 the default, so that a whole model can run in float64."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, widen in model.widened:
            place = import_module(module)
            patch.setattr(place, name, widen(getattr(place, name)))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


# --- FlashABB

FLASHABB_FRAMES = "flash_abb.model.openfold.utils.rigid_utils"


def _flashabb(name: str) -> nn.Module:
    from flash_abb import pretrained

    return pretrained(name, device="cpu").flabb.model


@cache
def antibody() -> dict[str, torch.Tensor]:
    """FlashABB's features of the antibody."""
    from flash_abb.model.flash_abb import featurize

    return featurize([f"{HEAVY}|{LIGHT}"], "cpu")


def _fold(model: nn.Module) -> torch.Tensor:
    """Coordinates of N, Cα, C and Cβ (or O), in Å."""
    given, dtype = antibody(), next(model.parameters()).dtype
    with torch.no_grad():
        out = model({"single": given["single"].to(dtype)}, given["aatype"].clone(), given["res_idx"], given["mask"])
    return out["positions"][-1][0, :, :4].flatten(0, 1)


def _read_flashabb(arguments: tuple, named: dict) -> Call:
    s, indices, rigids, mask = arguments
    indices = torch.arange(s.shape[1])[None] if indices is None else indices
    leaves = {"single": s, "rotation": rigids.get_rots().get_rot_mats(), "translation": rigids.get_trans()}
    return Call(arrays(leaves), {"key_mask": mask.numpy()}, {"res_idx": indices.numpy(), "mask": mask})


def _run_flashabb(layer: nn.Module, leaves: dict[str, torch.Tensor], extra: dict[str, Any]) -> torch.Tensor:
    indices = torch.from_numpy(extra["res_idx"])
    out = layer(leaves["single"], indices, frames(FLASHABB_FRAMES, leaves), extra["mask"])
    return out[0] if isinstance(out, tuple) else out


def _encoder() -> nn.Module:
    """FlashABB-SSS, on coordinates that FlashABB folded in float32."""
    from flash_abb.load_model import fetch_sss

    return _with_fixed_coordinates(fetch_sss().eval())


def _with_fixed_coordinates(model: nn.Module) -> nn.Module:
    coordinates = _backbone()
    model.folder = lambda _: SimpleNamespace(bb_coords=coordinates)
    return model


@cache
def _backbone() -> torch.Tensor:
    return _fold(_flashabb("flash-abb")).unflatten(0, (-1, 4))[None]


def _embed(model: nn.Module) -> torch.Tensor:
    """Embeddings of the residues."""
    sequence = f"{HEAVY}|{LIGHT}"
    tokens = model.alphabet([sequence], pad=True, w_extra_tkns=False)
    with torch.no_grad():
        return model([sequence], tokens, tokens.eq(model.alphabet.pad_token), return_emb=True)[0]


def _developability() -> nn.Module:
    """FlashTAP: the same encoder, with its own weights and a head."""
    from flash_abb.load_model import fetch_tap

    encoder, head = fetch_tap()
    return nn.ModuleDict({"model": _with_fixed_coordinates(encoder), "head": head}).eval()


def _score_antibody(model: nn.Module) -> torch.Tensor:
    """The four scores PSH, PPC, PNC and SFvCSP."""
    embedded = _embed(model["model"])[None]
    with torch.no_grad():
        return model["head"](embedded, torch.ones(embedded.shape[:2], dtype=torch.bool))[0]


# --- lociPARSE


def _lociparse() -> nn.Module:
    from lociPARSE import lociparse

    return lociparse().model


@cache
def helix() -> list[torch.Tensor]:
    """Features that lociPARSE's own code makes of a helix with A-form's rise and twist."""
    from lociPARSE.feature_generation import genFeat

    atoms = {"P": (8.71, 70.5, -3.75), "C4'": (9.68, 46.9, -3.10), "N": (7.0, 22.0, -0.6)}
    lines = []
    for i, base in enumerate(RNA):
        for name, (radius, angle, height) in atoms.items():
            name = name if name != "N" else "N9" if base in "AG" else "N1"
            turned = math.radians(angle + 32.7 * i)
            x, y, z = radius * math.cos(turned), radius * math.sin(turned), height + 2.81 * i
            head = f"ATOM  {len(lines) + 1:5d}  {name:<4s}  {base} A{i + 1:4d}    "
            lines.append(f"{head}{x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           {name[0]}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "helix.pdb"
        path.write_text("\n".join([*lines, "TER", ""]))
        return [x[None] for x in genFeat(str(path))]


def _score_rna(model: nn.Module) -> torch.Tensor:
    """The score of each nucleotide, pNuL."""
    nodes, edges, neighbours, coordinates = helix()
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        out = model(*(x.float().to(dtype) for x in (nodes, edges)), neighbours, coordinates.float().to(dtype))
    return out[0, :, 0].sigmoid()


def _read_lociparse(arguments: tuple, named: dict) -> Call:
    nodes, edges, neighbours, rigids = arguments
    number = nodes.shape[1]
    places = neighbours[..., None].expand(edges.shape)
    pair = edges.new_zeros(1, number, number, edges.shape[-1]).scatter(2, places, edges)
    read = torch.zeros(1, number, number, dtype=torch.bool).scatter(2, neighbours, True)
    leaves = {"single": nodes, "rotation": rigids.get_rots().get_rot_mats(), "translation": rigids.get_trans()}
    return Call(arrays({**leaves, "pair": pair}), {"pair_mask": read.numpy()}, {"neighbours": neighbours})


def _run_lociparse(layer: Any, leaves: dict[str, torch.Tensor], extra: dict[str, Any]) -> torch.Tensor:
    neighbours, pair = extra["neighbours"], leaves["pair"]
    edges = pair.gather(2, neighbours[..., None].expand(*neighbours.shape, pair.shape[-1]))
    return layer._get_node_update(leaves["single"], edges, neighbours, frames("lociPARSE.utils", leaves))


def frames(module: str, leaves: dict[str, torch.Tensor]) -> Any:
    """Frames of a package's own class."""
    package: Any = import_module(module)
    return package.Rigid(package.Rotation(rot_mats=leaves["rotation"]), leaves["translation"])


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy().astype(np.float32) for name, x in tensors.items()}


FLASHABB: dict[str, Any] = {
    "package": "flash-abb",
    "dialect": "flashabb",
    "read": _read_flashabb,
    "run": _run_flashabb,
    "widened": ((FLASHABB_FRAMES, "torch", Wide),),
}

MODELS = {
    "FlashABB": Trained(
        file="weights/flabb_weights.pt",
        layers=8,
        load=lambda: _flashabb("flash-abb"),
        predict=_fold,
        noisy=("linear_in_node",),
        root="model.",
        **FLASHABB,
    ),
    "FlashABB masked": Trained(
        file="weights/flabb_masked_weights.pt",
        layers=8,
        load=lambda: _flashabb("flash-abb_masked"),
        predict=_fold,
        noisy=("linear_in_node",),
        root="model.",
        **FLASHABB,
    ),
    "FlashABB-SSS": Trained(
        file="weights/sss_weights.pt",
        layers=6,
        load=_encoder,
        predict=_embed,
        noisy=("encoder.embed_tokens",),
        unit="of the embedding",
        structure=False,
        **FLASHABB,
    ),
    "FlashTAP": Trained(
        file="weights/tap_weights.pt",
        layers=6,
        load=_developability,
        predict=_score_antibody,
        noisy=("model.encoder.embed_tokens",),
        root="encoder_state.model.",
        within="model.",
        unit="of the scores",
        structure=False,
        **FLASHABB,
    ),
    "lociPARSE": Trained(
        package="lociPARSE",
        file="QAmodel_lociPARSE.pt",
        dialect="lociparse",
        layers=4,
        load=_lociparse,
        predict=_score_rna,
        read=_read_lociparse,
        run=_run_lociparse,
        noisy=("node_embedding", "edge_embedding"),
        widened=(("lociPARSE.utils", "torch", Wide),),
        unit="of pNuL",
        structure=False,
    ),
}
"""Trained models by name. Lengths are in Å; other predictions have no unit."""
