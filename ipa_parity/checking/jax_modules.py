"""Candidates from modules in JAX: transformed Haiku functions, Flax in both APIs, and Equinox."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from ipa_bridge.config import IPAConfig
from ipa_bridge.kinds import attention_of
from ipa_parity.checking.calling import CannotCall, Ways
from ipa_parity.checking.candidates import (
    ARGUMENTS,
    TRANSPOSED,
    Candidate,
    DialectNames,
    MappedNames,
    Names,
    arguments_of,
    rigids_of,
    say_assumed,
)
from ipa_parity.checking.leaves import Leaf, Leaves

SMALL = 5
"""Residues of the input on which parameters are initialised."""

USUAL_WIDTHS = 384, 128
"""Channels of the single and pair representations on which they are initialised if the config is unknown."""

EPSILONS = ("norm_epsilon", "epsilon", "eps", "norm_eps", "_eps")
"""Attributes in which a module may hold the ε of lengths."""

ALPHAFOLDS = (
    ("alphafold.model.quat_affine", "QuatAffine"),
    ("alphafold.model.geometry", "Rigid3Array"),
)
"""AlphaFold's classes of rigids, which are tried where a program has imported them."""


class Built(NamedTuple):
    """A module whose parameters can be exchanged."""

    leaves: Leaves
    build: Callable[[list[Any]], Callable]
    """Takes the leaves' arrays and returns the module's call."""
    own: Any
    """The object or function itself."""
    takes: Callable
    """The function whose arguments tell how to call it."""
    single_only: bool = False
    """True for a module that by its framework's habit takes no batch."""


def haiku_candidate(transformed: Any, config: IPAConfig | None, **options: Any) -> Candidate:
    """A candidate from a function that `hk.transform` transformed, with or without an rng in its apply.

    Raises:
        ValueError: it has state, it cannot be initialised, or its parameters are of no dialect.
    """
    import haiku
    import jax

    if isinstance(transformed, haiku.TransformedWithState):
        raise ValueError(
            "a function from hk.transform was expected; got one with state: pass hk.without_state(…) of it"
        )
    takes = getattr(transformed.init, "_original_fn", transformed.apply)
    with_rng = list(inspect.signature(transformed.apply).parameters)[1:2] == ["rng"]

    def build(tree: Any) -> Callable:
        return partial(transformed.apply, tree, jax.random.key(0)) if with_rng else partial(transformed.apply, tree)

    return _initialised(transformed, transformed.init, build, takes, config, **options)


def flax_candidate(module: Any, config: IPAConfig | None, **options: Any) -> Candidate:
    """A candidate from a Flax module: an NNX module with its parameters, or a Linen module, which is initialised.

    Raises:
        ValueError: its parameters are of no dialect, or the config does not fit them.
    """
    from flax import linen, nnx

    if isinstance(module, linen.Module):
        return _initialised(
            module,
            lambda *given, **named: module.init(*given, **named)["params"],
            lambda tree: partial(module.apply, {"params": tree}),
            module.__call__,
            config,
            **options,
        )
    split: Any = nnx.split
    definition, parameters, others = split(module, nnx.Param, ...)
    flat = nnx.to_flat_state(parameters)
    leaves = Leaves([Leaf(tuple(map(str, path)), variable[...], False) for path, variable in flat])

    def build(values: list[Any]) -> Callable:
        variables = [variable.replace(x) for (_, variable), x in zip(flat, values, strict=True)]
        state = nnx.from_flat_state(list(zip([path for path, _ in flat], variables, strict=True)))
        merged = nnx.merge(definition, state, _as_dtype_of(others, values))
        merged.eval()
        return merged

    return _candidate(Built(leaves, build, module, module.__call__), config, **options)


def equinox_candidate(module: Any, config: IPAConfig | None, **options: Any) -> Candidate:
    """A candidate from an Equinox module. A batch is mapped over with `jax.vmap`, as is usual there.

    Raises:
        ValueError: its parameters are of no dialect, or the config does not fit them.
    """
    import equinox
    import jax

    arrays, static = equinox.partition(equinox.nn.inference_mode(module), equinox.is_inexact_array)
    paths, structure = jax.tree_util.tree_flatten_with_path(arrays)
    leaves = Leaves([Leaf(tuple(map(_key, path)), x, True) for path, x in paths])

    def build(values: list[Any]) -> Callable:
        return equinox.combine(jax.tree_util.tree_unflatten(structure, values), static)

    return _candidate(Built(leaves, build, module, module.__call__, single_only=True), config, **options)


def _key(key: Any) -> str:
    """The name of an attribute, an index or a key in a path of JAX's trees."""
    return str(next(getattr(key, x) for x in ("name", "key", "idx") if hasattr(key, x)))


def _as_dtype_of(tree: Any, values: list[Any]) -> Any:
    """A tree whose floats have the dtype of the given arrays."""
    import jax
    import jax.numpy as jnp

    dtype = values[0].dtype if values else jnp.float32

    def cast(x: Any) -> Any:
        return x.astype(dtype) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def _initialised(
    own: Any,
    init: Callable,
    apply: Callable[[Any], Callable],
    takes: Callable,
    config: IPAConfig | None,
    **options: Any,
) -> Candidate:
    """A candidate from a pair of functions: its parameters are those that init makes for a small input."""
    import jax

    config = config or _enclosed_config(takes)
    single, pair = USUAL_WIDTHS if config is None else (config.num_channel, config.pair_channel)
    calls = list(calls_of(takes, options["call"]))
    tree, width = _make_parameters(init, apply, calls, single, pair, known=config is not None)
    if width not in (None, single) and config is None:  # the output's width is fixed
        tree, _ = _make_parameters(init, apply, calls, width, pair, known=False)
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = Leaves([Leaf(tuple("/".join(map(_key, path)).split("/")), x, False) for path, x in paths])

    def build(values: list[Any]) -> Callable:
        return apply(jax.tree_util.tree_unflatten(structure, values))

    return _candidate(Built(leaves, build, own, takes), config, **options)


def _enclosed_config(function: Callable) -> IPAConfig | None:
    """The config that a function of ours has enclosed."""
    try:
        enclosed = inspect.getclosurevars(function).nonlocals.values()
    except (TypeError, ValueError):
        return None
    return next((x for x in enclosed if isinstance(x, IPAConfig)), None)


def _make_parameters(
    init: Callable, apply: Callable[[Any], Callable], calls: list[Any], single: int, pair: int | None, *, known: bool
) -> tuple[Any, int | None]:
    """Parameters for a small input, and the width of the output.

    Raises:
        ValueError: init or apply raises.
    """
    import jax
    import jax.numpy as jnp

    made: list[tuple[Any, Any]] = []

    def module(*given: Any, **named: Any) -> Any:
        tree = init(jax.random.key(0), *given, **named)
        made.append((tree, apply(tree)(*given, **named)))
        return made[-1][1]

    try:
        with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
            frames = jnp.broadcast_to(jnp.eye(3), (SMALL, 3, 3)), jnp.zeros((SMALL, 3))
            representations = jnp.ones((SMALL, single)), None if pair is None else jnp.ones((SMALL, SMALL, pair))
            inputs = (*representations, *frames, jnp.ones(SMALL, bool))
            Ways(calls).first(lambda call, given: call(module, *given), inputs)
    except Exception as error:
        message = str(error).strip().splitlines()
        raise ValueError(
            f"parameters were expected from its init, on {SMALL} residues with {single} channels and pairs with "
            f"{pair or 'none'}" + ("" if known else " (pass config= if it has other widths)") + "; it raises "
            f"{type(error).__name__}: {message[0] if message else ''}"
        ) from error
    if not made:
        raise ValueError("call= was expected to call the function that it gets; it did not")
    tree, result = made[-1]
    return tree, next((x.shape[-1] for x in jax.tree.leaves(result)), None)


def _candidate(
    built: Built,
    config: IPAConfig | None,
    *,
    parameters: str | Mapping[str, str] | None,
    call: Callable | None,
    name: str,
) -> Candidate:
    """A candidate from a module whose parameters can be exchanged."""
    assumed, dialect = "", ""
    if isinstance(parameters, Mapping):
        if config is None:
            raise ValueError("config= was expected beside a table of parameters; got None")
        built.leaves.check_table(parameters)
        names: Names = MappedNames(parameters)
    else:
        found, settled, untold = built.leaves.find(parameters, config)
        dialect, names = found.dialect.name, DialectNames(found.dialect.name, found.root)
        if config is None:
            config, untold = _with_its_epsilon(built.own, attention_of(settled), untold)
            assumed = say_assumed(config, untold)
    calls = list(calls_of(built.takes, call, transposed=dialect in TRANSPOSED))
    run = _Module(built, calls).run
    return Candidate(name, "jax", run, names, config, assumed, takes_mask=any(x.takes_mask for x in calls))


def _with_its_epsilon(own: Any, config: IPAConfig, untold: frozenset[str]) -> tuple[IPAConfig, frozenset[str]]:
    """The config with the module's own ε, and the fields that are still assumed."""
    held = [x for x in (getattr(own, name, None) for name in EPSILONS) if isinstance(x, float)]
    if "norm_epsilon" in untold and held:
        return replace(config, norm_epsilon=held[0]), untold - {"norm_epsilon"}
    return config, untold


class _Module:
    """A module called with parameters by name, on inputs with or without a batch axis, whichever it takes."""

    def __init__(self, built: Built, calls: list[Any]) -> None:
        self.built, self.ways = built, Ways(calls)

    def run(self, parameters: Mapping[str, Any], *inputs: Any) -> Any:
        """The first way that works; a module that takes no batch is mapped over it."""
        import jax

        dtype, mapped = inputs[0].dtype, inputs[0].ndim == 3
        module = self.built.build(self.built.leaves.values(parameters, lambda x: x.astype(dtype)))

        def over_batch() -> Any:
            axes = tuple(None if x is None else 0 for x in inputs)
            return jax.vmap(lambda *given: self.ways.first(attempt, given), axes)(*inputs)

        def attempt(call: Any, given: tuple[Any, ...]) -> Any:
            return call(module, *given)

        if mapped and self.built.single_only:
            return over_batch()
        try:
            return self.ways.first(attempt, inputs)
        except Exception as error:
            if not mapped:
                raise
            try:
                return over_batch()
            except Exception:
                raise error from None


@dataclass(frozen=True)
class _Given:
    """A call that the user gave, with one form of the mask."""

    call: Callable
    mask_of: Callable[[Any, Any], Any]
    takes_mask: bool = True

    def __call__(self, module: Callable, single: Any, *others: Any) -> Any:
        *inputs, mask = others
        return self.call(module, single, *inputs, self.mask_of(mask, single.dtype))


@dataclass(frozen=True)
class _ByName:
    """A call by the names of the arguments, with one kind of rigids and one form of the mask."""

    arguments: Mapping[str, str]
    make: Callable[[Any, Any], Any]
    mask_of: Callable[[Any, Any], Any]
    transposed: bool = False

    @property
    def takes_mask(self) -> bool:
        """True if the mask is one of the arguments."""
        return "mask" in self.arguments

    def __call__(self, module: Callable, *inputs: Any) -> Any:
        single, pair, rotation, translation, mask = inputs
        rotation = rotation.swapaxes(-1, -2) if self.transposed else rotation
        values = {"single": single, "pair": pair, "rotation": rotation, "translation": translation}
        values["mask"] = self.mask_of(mask, single.dtype)
        if "rigids" in self.arguments:
            try:
                values["rigids"] = self.make(rotation, translation)
            except Exception as error:
                raise CannotCall(f"rigids cannot be made of rotations and translations: {error}") from error
        return module(**{name: values[kind] for kind, name in self.arguments.items()})


MASKS: tuple[Callable[[Any, Any], Any], ...] = (
    lambda mask, dtype: mask.astype(dtype),
    lambda mask, dtype: mask,
    lambda mask, dtype: mask.astype(dtype)[..., None],  # AlphaFold's
)
"""Forms in which modules take a residue mask."""


def calls_of(function: Callable, call: Callable | None, *, transposed: bool = False) -> Iterator[Any]:
    """Calls that a module may take, the likeliest first.

    Args:
        function: function whose arguments tell what it takes.
        call: the user's own call; None if there is none.
        transposed: True if its rotations act on row vectors.

    Raises:
        ValueError: the arguments' names do not tell what they are.
    """
    if call is not None:
        yield from (_Given(call, form) for form in MASKS[:2])
        return
    taken = dict(arguments_of(function) or {})
    if "rigids" not in taken and len(taken.keys() & {"rotation", "translation"}) == 1:
        taken["rigids"] = taken.pop("rotation", "") or taken.pop("translation")  # "r" and "t" may be rigids
    kinds = {"single", "rigids"} if "rigids" in taken else {"single", "rotation", "translation"}
    if not kinds <= taken.keys() or "parameters" in taken:
        listed = ", ".join(inspect.signature(function).parameters)
        raise ValueError(
            f"arguments with the usual names were expected, for {', '.join([*ARGUMENTS][1:])}; it takes {listed}: "
            "pass call=, a function of (module, single, pair, rotation, translation, mask)"
        )
    makers = [*_makers(function, taken["rigids"])] if "rigids" in taken else [_pair_of]
    for make in makers:
        for form in MASKS if "mask" in taken else MASKS[:1]:
            yield _ByName(taken, make, form, transposed)


def _makers(function: Callable, argument: str) -> Iterator[Callable[[Any, Any], Any]]:
    """Functions that make rigids from rotations and translations, the likeliest first."""
    try:
        kind: Any = typing.get_type_hints(function).get(argument)
    except Exception:  # hints of types that are not there
        kind = None
    if isinstance(kind, type) and kind.__module__.partition(".")[0] not in ("builtins", "jax", "numpy", "jaxtyping"):
        yield kind
    for module, name in ALPHAFOLDS:
        if module in sys.modules:
            yield partial(_of_alphafold, getattr(sys.modules[module], name))
    yield lambda rotation, translation: rigids_of(rotation, rotation, translation)
    yield _pair_of
    yield _homogeneous


def _of_alphafold(kind: Any, rotation: Any, translation: Any) -> Any:
    """Rigids of one of AlphaFold's classes."""
    if kind.__name__ == "QuatAffine":
        return kind(None, translation, rotation=rotation, unstack_inputs=True)
    geometry = sys.modules[kind.__module__.rpartition(".")[0]]
    vector, matrix = geometry.Vec3Array, geometry.Rot3Array
    return kind(matrix.from_array(rotation), vector.from_array(translation))


def _pair_of(rotation: Any, translation: Any) -> Any:
    return rotation, translation


def _homogeneous(rotation: Any, translation: Any) -> Any:
    """4×4 matrices."""
    import jax.numpy as jnp

    upper = jnp.concatenate([rotation, translation[..., None]], -1)
    last = jnp.broadcast_to(jnp.asarray([0, 0, 0, 1], upper.dtype), (*upper.shape[:-2], 1, 4))
    return jnp.concatenate([upper, last], -2)
