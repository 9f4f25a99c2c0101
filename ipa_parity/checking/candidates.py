"""Implementations to check, each behind one call: our case in, arrays under our names out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ipa_bridge.config import IPAConfig
from ipa_bridge.kinds import parameter_shapes
from ipa_bridge.weights import Weights, canonical_from_torch
from ipa_bridge.weights.assumptions import is_functional
from ipa_bridge.weights.dialects import find_dialect
from ipa_bridge.weights.paths import double_slash
from ipa_bridge.weights.tensors import torch_tensor
from ipa_bridge.weights.translation import in_dialect
from ipa_parity.attention.cases import Case
from ipa_parity.attention.stages import Arrays

Framework = Literal["numpy", "torch", "jax"]
Call = Callable[..., Any]
"""A call with parameters by their names, single, pair, rotation, translation and mask."""

INPUTS = ("single", "pair", "rotation", "translation")
"""Inputs with gradients."""

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "parameters": ("parameters", "params", "weights", "p", "state"),
    "single": (
        *("single", "s", "s_i", "inputs_1d", "x", "h", "node", "nodes", "act", "single_repr", "single_rep"),
        *("single_representation", "single_act", "node_embed", "node_repr", "node_feats", "node_features"),
    ),
    "pair": (
        *("pair", "z", "z_ij", "inputs_2d", "edge", "edges", "pairwise_repr", "pair_repr", "pair_rep"),
        *("pair_representation", "pair_act", "edge_embed", "edge_repr", "edge_feats", "edge_features"),
    ),
    "rotation": ("rotation", "rotations", "rot", "rots", "R", "r"),
    "translation": ("translation", "translations", "trans", "t"),
    "rigids": ("rigids", "rigid", "frames", "frame", "affine", "affines", "transform", "transforms", "T"),
    "mask": ("mask", "seq_mask", "residue_mask", "node_mask", "sequence_mask", "single_mask", "res_mask", "frame_mask"),
}
"""Names that an argument may have, by what it is."""

TRANSPOSED = ("lucidrains", "igfold", "bioemu")
"""Dialects whose modules take rotations that act on row vectors, as `rotations` or in their frames."""


class Names:
    """Names and layouts of a candidate's parameters: ours, unless a subclass says otherwise."""

    def theirs(self, weights: Weights) -> Arrays:
        """Our weights as the candidate's parameters."""
        return dict(weights.arrays)

    def ours(self, arrays: Arrays, config: IPAConfig) -> Arrays:
        """Gradients to the candidate's parameters by canonical name."""
        return arrays


@dataclass(frozen=True)
class DialectNames(Names):
    """Names of a published system."""

    dialect: str
    root: str = ""

    def theirs(self, weights: Weights) -> Arrays:
        """Our weights in the dialect's names and layout, below the root."""
        dialect = find_dialect(self.dialect)
        converted, _ = weights.converted(dialect)
        named = in_dialect(converted.arrays, converted.config, dialect, self.root)
        return named if dialect.separator == "." else {double_slash(name): x for name, x in named.items()}

    def ours(self, arrays: Arrays, config: IPAConfig) -> Arrays:
        """Gradients by canonical name."""
        if find_dialect(self.dialect).separator == "/":
            return {name.replace("//", "/").removeprefix(f"{self.root}/"): x for name, x in arrays.items()}
        prefix = f"{self.root}." if self.root else ""
        own = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
        return canonical_from_torch(own, config, self.dialect)


@dataclass(frozen=True)
class MappedNames(Names):
    """Names given by the user: each to one of ours, with ".T" behind it if the array is the transpose of ours."""

    table: Mapping[str, str]

    def theirs(self, weights: Weights) -> Arrays:
        """Our weights under the user's names.

        Raises:
            ValueError: the table names a parameter that this config does not have.
        """
        unknown = [name for name in self.table.values() if name.removesuffix(".T") not in weights.arrays]
        if unknown:
            raise ValueError(
                f"parameters= was expected to name {', '.join(weights.arrays)}, each with .T if yours is the "
                f"transpose; got {', '.join(unknown)}"
            )
        return {name: _maybe_transposed(weights.arrays[ours.removesuffix(".T")], ours) for name, ours in self.items()}

    def ours(self, arrays: Arrays, config: IPAConfig) -> Arrays:
        """Gradients by canonical name; parameters outside the table are left out."""
        shapes = parameter_shapes(config)
        named = {ours.removesuffix(".T"): _maybe_transposed(arrays[name], ours) for name, ours in self.items()}
        return {ours: x.reshape(shapes[ours]) for ours, x in named.items()}

    def items(self) -> list[tuple[str, str]]:
        """The user's names and ours."""
        return list(self.table.items())


def _maybe_transposed(x: np.ndarray, name: str) -> np.ndarray:
    """The array, or its transpose with flattened heads."""
    return x.reshape((x.shape[0], -1)).T if name.endswith(".T") else x


class Run(NamedTuple):
    """Results of a candidate on one case."""

    arrays: Arrays
    """The output as `out`, and stages and gradients if there are any."""
    dtype: str
    """Dtype of the output, as it came."""
    changed: tuple[str, ...] = ()
    """Inputs that the candidate wrote into."""


class Candidate(NamedTuple):
    """An implementation to check."""

    name: str
    framework: Framework
    call: Call
    """Takes parameters by the candidate's names, then single, pair, rotation, translation and mask; returns the output,
    or a dictionary of stages with `out`, and of gradients if it computes them itself."""
    names: Names
    config: IPAConfig
    assumed: str = ""
    """Fields of the config that neither names nor shapes tell, in words; empty if there are none."""
    takes_mask: bool = True

    def run(self, case: Case, *, gradients: bool) -> Run:
        """Outputs, stages and gradients of a case under our names; numpy's functions have no gradients of their own."""
        run = {"numpy": _run_numpy, "torch": _run_torch, "jax": _run_jax}[self.framework]
        return run(self, case, gradients)


def say_assumed(config: IPAConfig, untold: Collection[str]) -> str:
    """Fields of a config that neither names nor shapes of parameters tell, in words; empty if there are none."""
    listed = ", ".join(f"{field}={getattr(config, field)!r}" for field in sorted(untold) if is_functional(field))
    if not listed:
        return ""
    return f"names and shapes do not tell these, so they are assumed: {listed}; pass config= if they are others"


def make_names(parameters: str | Mapping[str, str] | None) -> Names:
    """Names from what a user passes as `parameters`: a dialect, a table, or None for ours."""
    if parameters is None:
        return Names()
    return DialectNames(parameters) if isinstance(parameters, str) else MappedNames(parameters)


def function_candidate(
    function: Call, config: IPAConfig, names: Names, *, framework: Framework | None, name: str
) -> Candidate:
    """A candidate from a function of arrays.

    Its arguments are recognised by their names, as `ARGUMENTS` lists them; without such names it is called with
    parameters, single, pair, rotation, translation and mask, in this order. `framework` None tries numpy, PyTorch and
    JAX.

    Raises:
        ValueError: an argument without a default is none of those that an attention has.
    """
    taken = arguments_of(function)
    call = called_by_name(function, taken)
    seen = framework or framework_of(function)
    call = _with_either_mask(call) if seen == "torch" else call
    return Candidate(name, seen, call, names, config, takes_mask=taken is None or "mask" in taken)


def _with_either_mask(call: Call) -> Call:
    """A call in PyTorch, which may take a mask of numbers or of booleans; the one that does not raise is kept."""
    kept: list[bool] = []

    def run(parameters: Any, single: Any, *others: Any) -> Any:
        *inputs, mask = others
        problem: Exception | None = None
        for numbers in kept or (True, False):
            try:
                result = call(parameters, single, *inputs, mask.to(single.dtype) if numbers else mask)
            except Exception as error:
                problem = problem or error
                continue
            kept[:] = [numbers]
            return result
        raise problem or RuntimeError

    return run


def arguments_of(function: Callable) -> dict[str, str] | None:
    """Names of a function's arguments by what they are; None if the names tell nothing.

    Raises:
        ValueError: an argument without a default is none of those that an attention has.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    named = [x for x in parameters if x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)]
    taken: dict[str, str] = {}
    for kind, known in ARGUMENTS.items():
        found = next((x.name for name in known for x in named if x.name == name), None)
        if found is not None and found not in taken.values():
            taken[kind] = found
    if "single" not in taken:
        return None
    strange = [x.name for x in named if x.default is x.empty and x.name not in taken.values()]
    if strange:
        raise ValueError(
            f"arguments named {', '.join(ARGUMENTS)} were expected; {', '.join(strange)} is none of them: pass call=, "
            "a function of (candidate, single, pair, rotation, translation, mask)"
        )
    return taken


def called_by_name(function: Callable, taken: Mapping[str, str] | None) -> Call:
    """A function with its arguments in our order, from a function whose arguments are known by name."""
    if taken is None:
        return function

    def call(parameters: Any, single: Any, pair: Any, rotation: Any, translation: Any, mask: Any) -> Any:
        values = dict(
            parameters=parameters, single=single, pair=pair, rotation=rotation, translation=translation, mask=mask
        )
        if "rigids" in taken and "rotation" not in taken:
            values["rigids"] = rigids_of(single, rotation, translation)
        return function(**{name: values[kind] for kind, name in taken.items() if kind in values})

    return call


def rigids_of(like: Any, rotation: Any, translation: Any) -> Any:
    """Our rigids in the framework of an array, which unpack into rotations and translations."""
    if type(like).__module__.startswith("torch"):
        from ipa_torch import Rigid

        return Rigid(rotation, translation)
    if isinstance(like, np.ndarray):
        return rotation, translation
    from ipa_jax import Rigid as JaxRigid

    return JaxRigid(rotation, translation)


def framework_of(function: Callable) -> Framework:
    """The framework whose name the function's module uses: numpy if neither of the others."""
    function = inspect.unwrap(function)
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    space = getattr(function, "__globals__", {})
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    used = {getattr(space.get(name), "__name__", "").partition(".")[0] for name in names}
    everywhere = {getattr(x, "__name__", "").partition(".")[0] for x in space.values() if inspect.ismodule(x)}
    for modules in (used, everywhere):
        for framework in get_args(Framework)[1:]:
            if framework in modules:
                return framework
    return "numpy"


def _stages(result: Any, numpy: Callable[[Any], np.ndarray]) -> Arrays:
    """Stages of what a call returned."""
    if not isinstance(result, Mapping):
        result = {"out": result[0] if isinstance(result, tuple | list) else result}
    return {name: numpy(x) for name, x in result.items() if x is not None}


def _out(result: Any) -> Any:
    if isinstance(result, Mapping):
        return result["out"]
    return result[0] if isinstance(result, tuple | list) else result


def _arrays(case: Case) -> Arrays:
    return {name: x for name in INPUTS if (x := getattr(case, name)) is not None}


def _run_numpy(candidate: Candidate, case: Case, gradients: bool) -> Run:
    inputs = {name: np.array(x) for name, x in _arrays(case).items()}
    parameters = {name: np.array(x) for name, x in candidate.names.theirs(case.weights).items()}
    result = candidate.call(parameters, *(inputs.get(name) for name in INPUTS), np.array(case.mask))
    changed = tuple(name for name, x in _arrays(case).items() if not np.array_equal(x, inputs[name]))
    return Run(_stages(result, np.asarray), str(_out(result).dtype), changed)


def _run_torch(candidate: Candidate, case: Case, gradients: bool) -> Run:
    import torch

    leaves = {name: torch_tensor(x).requires_grad_(gradients) for name, x in _arrays(case).items()}
    named = candidate.names.theirs(case.weights)
    parameters = {name: torch_tensor(x).requires_grad_(gradients) for name, x in named.items()}
    given = {name: x.clone() for name, x in leaves.items()}  # candidates may write into them
    with torch.set_grad_enabled(gradients):
        result = candidate.call(parameters, *(given.get(name) for name in INPUTS), torch_tensor(case.mask))
    arrays = _stages(result, lambda x: x.detach().to(torch.float64).numpy())
    changed = tuple(name for name, x in leaves.items() if not torch.equal(x, given[name]))
    if gradients:
        every = [*leaves.values(), *parameters.values()]
        loss = (_out(result) * torch_tensor(case.cotangent)).sum()
        found = torch.autograd.grad(loss, every, allow_unused=True, materialize_grads=True)
        arrays |= _gradients(candidate, case, leaves, parameters, [x.to(torch.float64).numpy() for x in found])
    return Run(arrays, str(_out(result).dtype).removeprefix("torch."), changed)


def _run_jax(candidate: Candidate, case: Case, gradients: bool) -> Run:
    import jax

    wide = case.single.dtype == np.float64
    with jax.enable_x64(wide), jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        leaves = {name: jax.numpy.asarray(x) for name, x in _arrays(case).items()}
        parameters = {name: jax.numpy.asarray(x) for name, x in candidate.names.theirs(case.weights).items()}
        mask, cotangent = jax.numpy.asarray(case.mask), jax.numpy.asarray(case.cotangent)
        forward, backward = _in_jax(candidate.call)
        result = _compiled_or_not(forward, parameters, leaves, mask)
        arrays = _stages(result, lambda x: np.asarray(x, np.float64))
        if gradients:
            by_name, by_input = _compiled_or_not(backward, parameters, leaves, mask, cotangent)
            found = [np.asarray(x, np.float64) for x in (*by_input.values(), *by_name.values())]
            arrays |= _gradients(candidate, case, by_input, by_name, found)
    return Run(arrays, str(_out(result).dtype))


@lru_cache(maxsize=1)  # so that inputs of the same shapes compile once
def _in_jax(call: Call) -> tuple[Any, Any]:
    """A candidate's call, and its gradients to parameters and inputs, compiled by `jax.jit`."""
    import jax

    def forward(parameters: Any, leaves: Any, mask: Any) -> Any:
        return call(parameters, *(leaves.get(name) for name in INPUTS), mask)

    def loss(parameters: Any, leaves: Any, mask: Any, cotangent: Any) -> Any:
        return (_out(forward(parameters, leaves, mask)) * cotangent).sum()

    return jax.jit(forward), jax.jit(jax.grad(loss, (0, 1)))


def _compiled_or_not(function: Any, *given: Any) -> Any:
    """A compiled function's result, or the original one's, if it cannot be traced."""
    try:
        return function(*given)
    except Exception:
        return function.__wrapped__(*given)


def _gradients(
    candidate: Candidate, case: Case, leaves: Mapping, parameters: Mapping, arrays: list[np.ndarray]
) -> Arrays:
    by_input = dict(zip(leaves, arrays[: len(leaves)], strict=True))
    theirs = dict(zip(parameters, arrays[len(leaves) :], strict=True))
    named = by_input | candidate.names.ours(theirs, case.config)
    return {f"gradient/{name}": x for name, x in named.items()}
