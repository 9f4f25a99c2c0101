"""Switches framework midway through training: parameters and Adam's moments move from Haiku to PyTorch.

    python examples/handoff.py [--steps 120] [--at 60] [--out FOLDER]

Three runs start from the same weights and see the same batches: one in Haiku, one in PyTorch, and one handed over
midway. Their losses agree to rounding, which training amplifies with time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

import ipa_torch
from ipa_bridge import Weights

sys.path.insert(0, str(Path(__file__).resolve().parent))
import denoise_backbone as in_torch
import denoise_backbone_jax as in_jax
from backbones import Backbones, folder_to_write, model_config, number_of_steps, peptides, plot_losses


def to_torch(params: Any, state: Any) -> tuple[ipa_torch.IPATransformer, torch.optim.Optimizer]:
    """A PyTorch module and Adam that continue a Haiku run; moments have the names and shapes of their parameters."""
    config = model_config()
    model = ipa_torch.IPATransformer(config)
    model.load_state_dict(Weights.from_haiku(params, config=config).to_torch())
    optimizer = in_torch.adam(model)
    adam = state[0]
    moments = [Weights.from_haiku(jax.tree.map(np.asarray, x), config=config).to_torch() for x in (adam.mu, adam.nu)]
    for name, parameter in model.named_parameters():
        first, second = (moment[name] for moment in moments)
        step = torch.tensor(float(adam.count))
        optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    return model, optimizer


def curves(clean: Backbones, steps: int, at: int, *, quiet: bool = False) -> dict[str, list[float]]:
    """Losses of three runs: all in Haiku, all in PyTorch, and handed over at step `at`."""
    initial = in_jax.initial_params()
    params, state, before = in_jax.train(initial, in_jax.ADAM.init(initial), clean, range(at), quiet=quiet)
    model, optimizer = to_torch(params, state)
    after = in_torch.train(model, optimizer, clean, range(at, steps), quiet=quiet)
    _, _, rest = in_jax.train(params, state, clean, range(at, steps), quiet=quiet)
    whole, fresh = to_torch(initial, in_jax.ADAM.init(initial))
    stayed = in_torch.train(whole, fresh, clean, range(steps), quiet=quiet)
    return {"Haiku": before + rest, "PyTorch": stayed, f"Haiku, from step {at} PyTorch": before + after}


def main() -> None:
    """Trains three times, compares and plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=number_of_steps, default=120, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--at", type=number_of_steps, default=60, help="step at which to hand over (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=folder_to_write, default="handoff", help="folder to write to (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.at >= args.steps:
        parser.error(f"--at must be less than --steps; got {args.at} of {args.steps}")
    args.out.mkdir(parents=True, exist_ok=True)
    found = curves(peptides(128, seed=1), args.steps, args.at)
    plot_losses(args.out / "handoff.png", found, f"handed over at step {args.at}")
    haiku, _, handed = (np.array(x) for x in found.values())
    apart = np.abs(handed - haiku) / haiku
    print(
        f"relative difference of the losses: {apart[args.at]:.1e} at step {args.at}, {apart[-1]:.1e} at the last step"
    )
    print(f"curves are in {args.out}")


if __name__ == "__main__":
    main()
