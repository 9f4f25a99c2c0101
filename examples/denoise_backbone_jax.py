"""Trains an IPA transformer to denoise protein backbones, in Haiku; `denoise_backbone.py` is its twin.

    python examples/denoise_backbone_jax.py [--structures FOLDER] [--steps 300] [--out FOLDER]

Frames of idealised peptides, or of the PDB and mmCIF files in a folder, are moved at random, and the model is trained
with FAPE to move them back. It is scored on held-out chains, beside the same model trained with each residue alone.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import ipa_jax

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

MODEL = ipa_jax.transform_ipa_transformer(model_config())
ADAM = optax.adam(LEARNING_RATE)


def predict(params: Any, noised: Backbones, *, alone: bool = False) -> ipa_jax.Rigid:
    """The denoised frames that the model predicts; with `alone` each residue attends only to itself."""
    return _predict(params, inputs(noised, alone=alone), noised.mask.shape)


@partial(jax.jit, static_argnums=2)
def _predict(params: Any, x: dict[str, jax.Array], shape: tuple[int, int]) -> ipa_jax.Rigid:
    rigids = MODEL.apply(
        params, None, x["single"], x["pair"], ipa_jax.Rigid(x["rotation"], x["translation"]), x["mask"]
    ).rigids
    return ipa_jax.Rigid(rigids.rotation.reshape(*shape, 3, 3), rigids.translation.reshape(*shape, 3))


def loss(params: Any, x: dict[str, jax.Array], truth: ipa_jax.Rigid, mask: jax.Array) -> jax.Array:
    """FAPE over frames and Cα atoms, Å / 10."""
    rigids = _predict(params, x, mask.shape)
    return ipa_jax.frame_aligned_point_error(
        rigids, truth, mask, rigids.translation, truth.translation, mask, clamp_distance=20.0
    ).mean()


@jax.jit
def _step(params: Any, state: Any, x: dict[str, jax.Array], truth: ipa_jax.Rigid, mask: jax.Array) -> tuple:
    value, gradients = jax.value_and_grad(loss)(params, x, truth, mask)
    updates, state = ADAM.update(gradients, state)
    return optax.apply_updates(params, updates), state, value


def train(
    params: Any, state: Any, clean: Backbones, steps: range, *, alone: bool = False, quiet: bool = False
) -> tuple[Any, Any, list[float]]:
    """Trains for these steps; returns parameters, the optimiser's state and the losses."""
    losses = []
    name = "each alone" if alone else "jax"
    for noised, chosen in tqdm(batches(clean, steps), total=len(steps), disable=quiet, desc=name, mininterval=1):
        truth = ipa_jax.Rigid(jnp.asarray(chosen.rotation), jnp.asarray(chosen.translation))
        params, state, value = _step(params, state, inputs(noised, alone=alone), truth, chosen.mask)
        losses.append(float(value))
    return params, state, losses


def initial_params() -> Any:
    """Parameters with AlphaFold's initial values; seeded."""
    x = inputs(Backbones(np.zeros((1, 2, 3, 3), np.float32), np.zeros((1, 2, 3), np.float32), np.ones((1, 2), bool)))
    rigids = ipa_jax.Rigid(x["rotation"], x["translation"])
    return MODEL.init(jax.random.key(0), x["single"], x["pair"], rigids, x["mask"])


def denoise(params: Any, noised: Backbones, *, alone: bool = False) -> Backbones:
    """The denoised frames as numpy arrays."""
    rigids = predict(params, noised, alone=alone)
    return Backbones(np.asarray(rigids.rotation), np.asarray(rigids.translation), noised.mask)


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
        default="denoised_jax",
        help="folder to write to (default: %(default)s)",
    )
    args = parser.parse_args()
    try:
        training, truth = training_and_held_out(args.structures)
    except ValueError as error:  # of a structure that cannot be read
        parser.error(str(error))
    noised = truth.noised(np.random.default_rng(7)).astype(np.float32)
    losses, held_out = {}, {"noised": noised}
    for name, alone in (("each alone", True), ("denoised", False)):
        params = initial_params()
        params, _, losses[name] = train(params, ADAM.init(params), training, range(args.steps), alone=alone)
        held_out[name] = denoise(params, noised, alone=alone)
    print(report(args.out, losses, held_out, truth))


if __name__ == "__main__":
    main()
