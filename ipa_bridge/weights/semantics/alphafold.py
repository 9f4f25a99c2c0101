"""AlphaFold's computation, which is also that of our Haiku and torch modules."""

from __future__ import annotations

from numpy import ndarray

from ipa_bridge import oracle
from ipa_bridge.config import IPAConfig
from ipa_bridge.weights.semantics.system import Parameters, System


def attention(p: Parameters, c: IPAConfig, *inputs: ndarray) -> ndarray:
    """Suppl. Alg. 22, by the oracle."""
    return oracle.invariant_point_attention(p, c, *inputs).out


def torch_attention(p: Parameters, c: IPAConfig, *inputs: ndarray) -> ndarray:
    """Suppl. Alg. 22 with our torch parameters."""
    return attention(_of_torch(p, c), c, *inputs)


def _of_torch(p: Parameters, config: IPAConfig) -> dict[str, ndarray]:
    """Our torch parameters in the form that the oracle takes."""
    canonical = {}
    for name, x in p.items():
        module, _, leaf = name.replace(".", "/").rpartition("/")
        multimer = config.layout == "multimer" and module.endswith(("_scalar_projection", "point_projection"))
        x = x.T if leaf == "weight" else x
        canonical[f"{module}/{leaf}s" if leaf == "weight" else f"{module}/{leaf}" if module else leaf] = (
            x.reshape(*x.shape[:-1], config.num_head, -1) if multimer else x
        )
    return canonical


IPA_JAX = System(attention, haiku=True)
IPA_TORCH = System(torch_attention, {"token_embedding/embeddings": "token_embedding.weight"})
