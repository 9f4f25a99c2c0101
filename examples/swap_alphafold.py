"""Makes AlphaFold (DeepMind's or ColabFold's) use our attention, in one line: same outputs, less time and memory.

    python examples/swap_alphafold.py [--residues 256 512 1024] [--backward]

The model here is AlphaFold-Multimer with random weights, one Evoformer block and no templates. The same line works with
a published model, before it is run or between two runs:

    name = "model_1_multimer_v3"
    params = data.get_model_haiku_params(name, data_dir)  # the folder with params/params_model_1_multimer_v3.npz
    model_runner = model.RunModel(config.model_config(name), params)
    with ipa_jax.replace_alphafold_ipa():
        result = model_runner.predict(features, random_seed=0)

The measurement compares the monomer's structure module, eight layers, before and after.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from alphafold.model import folding, modules_multimer
from alphafold.model.config import model_config

import ipa_jax
from ipa_bridge import StructureModuleConfig, Weights
from ipa_bridge.proteins.residues import ATOM14_MASK, ATOM37_MASK, ATOM37_TO_ATOM14

sys.path.insert(0, str(Path(__file__).resolve().parent))
from before_and_after import arguments, same, table


def small_alphafold() -> hk.Transformed:
    """AlphaFold-Multimer with one block of each stack; call it as `apply(params, key, batch)`, like its `RunModel`."""
    config = model_config("model_1_multimer_v3").model
    with config.unlocked():
        embeddings = config.embeddings_and_evoformer
        embeddings.evoformer_num_block = embeddings.extra_msa_stack_num_block = 1
        embeddings.num_msa = embeddings.num_extra_msa = 4
        embeddings.template.enabled = False
        config.global_config.bfloat16 = False
        config.global_config.deterministic = True
        config.calc_extended_ptm = config.use_probs_extended = False
    return hk.transform(lambda batch: modules_multimer.AlphaFold(config)(dict(batch), is_training=False))


def random_batch(number: int) -> dict[str, Any]:
    """Features of two chains with a random alignment of eight sequences."""
    rng = np.random.default_rng(0)
    first = np.arange(number) < number // 2
    ones = np.ones((8, number), np.float32)
    return {
        "aatype": rng.integers(0, 20, number),
        "residue_index": np.where(first, np.arange(number), np.arange(number) - number // 2),
        "seq_mask": ones[0],
        "msa": rng.integers(0, 20, (8, number)),
        "msa_mask": ones,
        "bert_mask": ones,
        "deletion_matrix": np.zeros_like(ones),
        "cluster_bias_mask": np.eye(1, 8, dtype=np.float32)[0],
        "asym_id": np.where(first, 1, 2),
        "entity_id": np.ones(number, int),
        "sym_id": np.where(first, 1, 2),
        "all_atom_positions": np.zeros((number, 37, 3), np.float32),
        "prev": {
            "prev_msa_first_row": np.zeros((number, 256), np.float32),
            "prev_pair": np.zeros((number, number, 128), np.float32),
            "prev_pos": np.zeros((number, 37, 3), np.float32),
        },
    }


def random_params(alphafold: hk.Transformed, batch: Mapping[str, Any]) -> Any:
    """AlphaFold's initial parameters; those that would be all zero are random."""
    params = jax.jit(alphafold.init)(jax.random.PRNGKey(0), batch)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    drawn = [x if np.asarray(x).any() else jnp.asarray(0.05 * rng.standard_normal(x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(tree, drawn)


def prepare(number: int, gradients: bool, swapped: bool) -> Callable[[], object]:
    """Prepares a call of AlphaFold's compiled structure module on random representations."""
    rng = np.random.default_rng(1)
    aatype = rng.integers(0, 20, number)
    batch = {
        "aatype": jnp.asarray(aatype),
        "seq_mask": jnp.ones(number),
        "atom14_atom_exists": jnp.asarray(ATOM14_MASK[aatype], jnp.float32),
        "atom37_atom_exists": jnp.asarray(ATOM37_MASK[aatype], jnp.float32),
        "residx_atom37_to_atom14": jnp.asarray(ATOM37_TO_ATOM14[aatype]),
    }
    config = model_config("model_1").model
    with config.unlocked():
        config.global_config.deterministic = True

    def forward(representations: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> jax.Array:
        head = folding.StructureModule(config.heads.structure_module, config.global_config)
        return head(representations, batch, is_training=False)["final_atom_positions"]

    apply = hk.transform(forward).apply
    key = jax.random.PRNGKey(0)
    params = jax.tree.map(jnp.asarray, Weights.random(StructureModuleConfig.alphafold2()).to_haiku())
    representations = {
        "single": jnp.asarray(rng.standard_normal((number, 384), np.float32)),
        "pair": jnp.asarray(rng.standard_normal((number, number, 128), np.float32)),
    }

    def loss(params: Any, representations: Any) -> jax.Array:
        return (apply(params, key, representations, batch) ** 2).sum()

    function = jax.grad(loss, (0, 1)) if gradients else (lambda p, x: apply(p, key, x, batch))
    with ipa_jax.replace_alphafold_ipa(verify=False) if swapped else nullcontext():
        compiled = jax.jit(function).lower(params, representations).compile()
    return lambda: jax.block_until_ready(compiled(params, representations))


def main() -> None:
    """Swaps the attention, compares and measures."""
    args = arguments(__doc__)
    alphafold, batch = small_alphafold(), random_batch(64)
    params, key = random_params(alphafold, batch), jax.random.PRNGKey(1)
    predict = jax.jit(alphafold.apply)
    before = predict(params, key, batch)["structure_module"]["final_atom_positions"]
    with ipa_jax.replace_alphafold_ipa() as report:
        print(report)
        after = predict(params, key, batch)["structure_module"]["final_atom_positions"]
    print(same(np.asarray(before), np.asarray(after), "atom14", "atoms of 64 residues"))
    print(table(prepare, args.residues, args.repeats, backward=args.backward))


if __name__ == "__main__":
    main()
