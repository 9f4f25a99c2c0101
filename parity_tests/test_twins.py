"""ipa_jax and ipa_torch have the same files, names in the same order and signatures, except those listed here."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ipa_bridge

ROOT = Path(ipa_bridge.__file__).resolve().parent.parent
PACKAGES = ("ipa_bridge", "ipa_jax", "ipa_torch", "ipa_parity")

ONLY_IN_ONE = {
    "invariant_point_attention.transform_ipa": "a torch module is called as it is",
    "structure_module.transform_structure_module": "a torch module is called as it is",
    "confidence.transform_predicted_lddt": "a torch module is called as it is",
    "transformer.transform_ipa_transformer": "a torch module is called as it is",
    "layers.dropout": "torch has its own",
    **dict.fromkeys(("layers.with_rng", "layers.without_rng"), "torch draws numbers from a state of its own"),
    "layers.Linear.parameters": "torch modules hold their parameters as attributes",
    **dict.fromkeys(
        (
            *("layers.Module", "layers.Module.reset_parameters"),
            *("layers.Linear.reset_parameters", "layers.LayerNorm.reset_parameters"),
            "invariant_point_attention.InvariantPointAttention.reset_parameters",
        ),
        "haiku draws parameters in init",
    ),
    **dict.fromkeys(("layers.Linear.extra_repr", "layers.LayerNorm.extra_repr"), "a torch module prints itself"),
    "layers.weight_initializer": "haiku takes an initialiser to get_parameter …",
    "layers.initialize_weight": "… torch fills a parameter in place",
    "rigid.Rigid.to": "JAX has device_put for any tree",
    "dtypes.without_autocast": "JAX has no autocast",
    "dtypes.MISCOMPILING_JAXLIB": "torch's are not known to return wrong gradients",
    "dtypes.refuse_miscompiling_jaxlib": "torch's are not known to return wrong gradients",
    "dtypes.Tree": "the type of a tree of arrays",
    "dtypes.varying_alike": "the types of torch's tensors know no axes of devices",
    "layers.take": "JAX has take_along_axis",
    "attention.fused.OLDEST_TRITON": "JAX brings its own",
    "replace.__init__.replace_ipa": "a torch model is an object whose layers can be swapped …",
    "replace.__init__.restore_ipa": "… and given back",
    **dict.fromkeys(
        ("replace.__init__.register_adapter", "replace.__init__.unregister_adapter"),
        "in JAX, AlphaFold is the only system whose modules can be replaced",
    ),
    "replace.__init__.replace_alphafold_ipa": "AlphaFold builds its modules anew in each trace",
    **{
        f"replace.__init__.AlphaFoldReplacement{name}": "what undoes it: no object holds AlphaFold's modules"
        for name in ("", ".__init__", ".restore")
    },
    **{
        f"replace.adapters.{name}": "torch layers of several systems keep their own calls, parameters and hooks"
        for name in (
            *("Argument", "Settings", "Adapter", "is_as_replaced", "empty_layer", "is_neutral", "alteration"),
            *("bind_arguments", "check_untouched", "project_points", "attribute_at", "place_points"),
            *("attend", "Argument.is_needed"),
        )
    },
    **{
        f"replace.recognise.{name}": "in JAX there is AlphaFold alone, known by its class"
        for name in (
            *("Recognised.original", "Recognised.replacement", "Recognised.dtype", "Recognised.where"),
            *("EPSILONS", "USUAL_EPSILONS", "DROPOUTS"),
        )
    },
    "replace.recognise.SYSTEMS": "torch has a package of systems",
    "replace.adapters.arguments_of": "torch has replace.arguments",
    "attention.rows.LANES": "XLA's products on CPU need padded heads",
    "attention.rows.SMALLEST_WEIGHT": "subnormal numbers slow torch's products on CPU",
    "attention.rows.Blocks.scratch": "XLA finds memory itself",
    "attention.operands.Operands.example": "torch takes one example after the other, …",
    **dict.fromkeys(("attention.operands.number_of_examples", "attention.operands.over_batch"), "… JAX maps over them"),
    **{
        f"attention.rows.{name}": "JAX scans over rows, of which a torch slice tells all"
        for name in ("Rows", "Rows.read", "Rows.write", "Rows.fresh", "RowGradients", "gradients_by_rows")
    },
    **dict.fromkeys(
        ("attention.streamed.Options", "attention.fused.Options"),
        "torch takes numbers where JAX takes one static value",
    ),
    "attention.rows.einsum": "torch multiplies in full precision by default",
    **{
        f"attention.derivatives.{name}": "how a framework is told what derivatives there are"
        for name in (
            *("in_reverse_mode_only", "instantiate"),
            *("wants_gradients", "without_derivative", "one_by_one"),
        )
    },
    **{
        f"attention.kernels.{name}": "XLA does what does not touch the pair"
        for name in ("logits", "attend", "query_gradients", "key_gradients")
    },
    **{
        f"attention.kernels.{name}": "Pallas launches its kernels itself"
        for name in ("KERNELS", "compiler_options", "constants", "run")
    },
    "invariant_point_attention.weight_without_bias": "a torch optimiser expects a gradient of every parameter",
}
"""Names that only one framework needs, each with the reason."""

OTHER_SIGNATURES = {
    "replace.adapters.replaced_class": "a torch layer keeps its numbers, a haiku module is built from a config",
    "replace.recognise.find_attentions": "a torch model is searched, AlphaFold's modules are imported",
    "replace.verify.compare_with_original": "a torch layer has its config and its parameters with it",
    "rigid.Rigid.identity": "torch places tensors on a device",
    "rigid.Rigid.random": "JAX takes a key, torch a generator and a device",
    "layers.Linear.__init__": "torch needs the input width, haiku takes a name",
    "layers.LayerNorm.__init__": "torch needs the input width, haiku takes a name",
    "invariant_point_attention.InvariantPointAttention.__init__": "haiku takes a name",
    "invariant_point_attention.InvariantPointAttention.logit_weights": "haiku creates parameters where it uses them",
    "side_chains.MultiRigidSidechain.__init__": "haiku takes a name",
    "structure_module.FoldIteration.__init__": "haiku takes a name",
    "structure_module.FoldIteration.__call__": "JAX takes a key for dropout",
    "structure_module.QuatRigid.__init__": "torch needs the input width, haiku takes a name",
    "structure_module.StructureModule.__init__": "haiku takes a name",
    "structure_module.StructureModule.__call__": "a torch module knows whether it is training",
    "transformer.IPABlock.__init__": "haiku takes a name",
    "transformer.IPABlock.__call__": "a torch module knows whether it is training",
    "transformer.IPATransformer.__init__": "haiku takes a name",
    "transformer.IPATransformer.__call__": "a torch module knows whether it is training",
    "confidence.PredictedLDDT.__init__": "haiku takes a name",
    **dict.fromkeys(
        ("attention.kernels.attend_to_pair", "attention.kernels.pair_gradients"),
        "a kernel in Triton takes pointers, one in Pallas is called with arrays",
    ),
    "invariant_point_attention.PointProjection.__init__": "torch needs the input width, haiku takes a name",
}
"""Callables of both packages whose arguments differ, each with the reason."""


ONLY_IN_TORCH = (*("replace.systems", "replace.arguments", "replace.copies", "replace.pair_masks", "replace.rigids"),)
"""Modules of which JAX has no twins: there, AlphaFold is the only system whose modules can be replaced."""


def modules(package: str) -> dict[str, ast.Module]:
    folder = ROOT / package
    names = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in sorted(folder.rglob("*.py"))}
    return {name: ast.parse(path.read_text()) for name, path in names.items() if not name.startswith(ONLY_IN_TORCH)}


def signature(function: ast.FunctionDef) -> str:
    """Names, order, kinds and defaults of the arguments, without annotations."""
    arguments = ast.parse(ast.unparse(function.args).join(("def f(", "): ..."))).body[0].args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    dtype = {"jnp.float32": "float32", "torch.float32": "float32"}
    text = ast.unparse(arguments)
    for ours, common in dtype.items():
        text = text.replace(ours, common)
    return text


def public_names(tree: ast.Module, prefix: str) -> dict[str, str | None]:
    """Public classes, functions, methods and constants in order; with signatures where they have one."""
    found: dict[str, str | None] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found[f"{prefix}.{node.name}"] = None
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    name = "__call__" if method.name == "forward" else method.name
                    if name in ("__init__", "__call__") or not name.startswith("_"):
                        found[f"{prefix}.{node.name}.{name}"] = signature(method)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[f"{prefix}.{node.name}"] = signature(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {f"{prefix}.{t.id}": None for t in targets if isinstance(t, ast.Name) and not t.id.startswith("_")}
    return found


@pytest.fixture(scope="module")
def twins():
    jax, torch = (
        {name: x for module, tree in modules(package).items() for name, x in public_names(tree, module).items()}
        for package in ("ipa_jax", "ipa_torch")
    )
    return jax, torch


def test_same_files():
    assert list(modules("ipa_jax")) == list(modules("ipa_torch"))


def test_same_public_names_in_the_same_order(twins):
    jax, torch = twins
    assert set(jax) ^ set(torch) == set(ONLY_IN_ONE), "an unlisted difference, or a listed one that no longer exists"
    assert [name for name in jax if name in torch] == [name for name in torch if name in jax]


def test_same_signatures(twins):
    jax, torch = twins
    different = {name for name in set(jax) & set(torch) if jax[name] != torch[name]}
    assert different == set(OTHER_SIGNATURES), "an unlisted difference, or a listed one that no longer exists"


def test_same_exports():
    jax, torch = (
        next(
            ast.literal_eval(node.value)
            for node in modules(package)["__init__"].body
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        )
        for package in ("ipa_jax", "ipa_torch")
    )
    own = {name.rpartition(".")[2] for name in ONLY_IN_ONE}
    assert [name for name in jax if name not in own] == [name for name in torch if name not in own]


USER = """
import jax
import torch
import ipa_jax
import ipa_torch
from ipa_bridge import IPAConfig, StructureModuleConfig, Weights

config = IPAConfig.alphafold2()
module = ipa_torch.InvariantPointAttention(config, implementation="streamed")
weights = Weights.random(config)
module.load_state_dict(weights.to_torch())
ipa_torch.InvariantPointAttention(weights.config)
ipa_jax.transform_ipa(Weights.load("ipa.safetensors").config)
ipa_torch.StructureModule(weights.config)  # type: ignore[arg-type]
single, pair, rigids = torch.randn(9, 384), torch.randn(9, 9, 128), ipa_torch.Rigid.random((9,))
reveal_type(module(single, pair, rigids))
reveal_type(module(single, pair, rigids, return_attention=True))
reveal_type(ipa_torch.StructureModule(StructureModuleConfig.alphafold2())(single, pair, torch.arange(9)).atom14)
def in_haiku(single: jax.Array, pair: jax.Array, rigids: ipa_jax.Rigid) -> None:
    ipa = ipa_jax.InvariantPointAttention(config)
    reveal_type(ipa(single, pair, rigids))
    reveal_type(ipa(single, pair, rigids, return_attention=True))
ipa_torch.InvariantPointAttention(config, implementation="fastest")  # type: ignore[arg-type]
"""


@pytest.mark.exhaustive  # `make lint` checks the packages' own types
def test_types_reach_users(tmp_path):
    """Under mypy's strictest rules."""
    (tmp_path / "user.py").write_text(USER)
    options = ["--strict", "--follow-imports", "silent", "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "mypy", *options, "user.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    revealed = re.findall(r'user.py:\d+: note: Revealed type is "(.*)"', run.stdout)
    tensor, array = "torch._tensor.Tensor", "jax._src.basearray.Array"
    assert revealed == [tensor, f"tuple[{tensor}, {tensor}]", tensor, array, f"tuple[{array}, {array}]"], run.stdout
    assert run.returncode == 0, run.stdout
