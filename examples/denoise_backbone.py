"""Trains an IPA transformer to denoise protein backbones, in PyTorch; `denoise_backbone_jax.py` is its twin.

    python examples/denoise_backbone.py [--structures FOLDER] [--steps 300] [--out FOLDER]

Frames of idealised peptides, or of the PDB and mmCIF files in a folder, are moved at random, and the model is trained
with FAPE to move them back. It is scored on held-out chains, beside the same model trained with each residue alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import ipa_torch
from ipa_bridge import Weights

sys.path.insert(0, str(Path(__file__).resolve().parent))
from backbones import (
    LEARNING_RATE,
    Backbones,
    batches,
    folder_of_structures,
    folder_to_write,
    inputs,
    model_config,
    number_of_steps,
    report,
    training_and_held_out,
)


def predict(model: ipa_torch.IPATransformer, noised: Backbones, *, alone: bool = False) -> ipa_torch.Rigid:
    """The denoised frames that the model predicts; with `alone` each residue attends only to itself."""
    x = {name: torch.from_numpy(array) for name, array in inputs(noised, alone=alone).items()}
    rigids = model(x["single"], x["pair"], ipa_torch.Rigid(x["rotation"], x["translation"]), x["mask"]).rigids
    shape = noised.mask.shape
    return ipa_torch.Rigid(rigids.rotation.reshape(*shape, 3, 3), rigids.translation.reshape(*shape, 3))


def loss(model: ipa_torch.IPATransformer, noised: Backbones, clean: Backbones, *, alone: bool = False) -> torch.Tensor:
    """FAPE over frames and Cα atoms, Å / 10."""
    rigids, mask = predict(model, noised, alone=alone), torch.from_numpy(clean.mask)
    truth = ipa_torch.Rigid(torch.from_numpy(clean.rotation), torch.from_numpy(clean.translation))
    return ipa_torch.frame_aligned_point_error(
        rigids, truth, mask, rigids.translation, truth.translation, mask, clamp_distance=20.0
    ).mean()


def train(
    model: ipa_torch.IPATransformer,
    optimizer: torch.optim.Optimizer,
    clean: Backbones,
    steps: range,
    *,
    alone: bool = False,
    quiet: bool = False,
) -> list[float]:
    """Trains for these steps and returns their losses."""
    losses = []
    name = "each alone" if alone else "torch"
    for noised, chosen in tqdm(batches(clean, steps), total=len(steps), disable=quiet, desc=name, mininterval=1):
        value = loss(model, noised, chosen, alone=alone)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def adam(model: ipa_torch.IPATransformer) -> torch.optim.Optimizer:
    """A new Adam optimiser for the model."""
    return torch.optim.Adam(model.parameters(), LEARNING_RATE)


def new_model() -> ipa_torch.IPATransformer:
    """A model with seeded weights whose first updates are zero."""
    model = ipa_torch.IPATransformer(model_config())
    model.load_state_dict(initial_weights().to_torch())
    return model


def initial_weights() -> Weights:
    """Weights with AlphaFold's initial values; seeded."""
    torch.manual_seed(0)
    return Weights.from_torch(ipa_torch.IPATransformer(model_config()).state_dict(), config=model_config())


def denoise(model: ipa_torch.IPATransformer, noised: Backbones, *, alone: bool = False) -> Backbones:
    """The denoised frames as numpy arrays."""
    with torch.no_grad():
        rigids = predict(model, noised, alone=alone)
    return Backbones(rigids.rotation.numpy(), rigids.translation.numpy(), noised.mask)


def main() -> None:
    """Trains, scores and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--structures", type=folder_of_structures, help="folder of PDB and mmCIF files (default: idealised peptides)"
    )
    parser.add_argument("--steps", type=number_of_steps, default=300, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=folder_to_write,
        default="denoised_torch",
        help="folder to write to (default: %(default)s)",
    )
    args = parser.parse_args()
    try:
        training, truth = training_and_held_out(args.structures)
    except ValueError as error:  # a structure cannot be read
        parser.error(str(error))
    noised = truth.noised(np.random.default_rng(7)).astype(np.float32)
    losses, held_out = {}, {"noised": noised}
    for name, alone in (("each alone", True), ("denoised", False)):
        model = new_model()
        losses[name] = train(model, adam(model), training, range(args.steps), alone=alone)
        held_out[name] = denoise(model, noised, alone=alone)
    print(report(args.out, losses, held_out, truth))


if __name__ == "__main__":
    main()
