"""One model's parameters as named numpy arrays, to and from a haiku tree, a torch state dict and files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, cast

import numpy as np

from ipa_bridge.config import (
    Config,
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
    attention_of,
)
from ipa_bridge.conversion import express
from ipa_bridge.dialects import DIALECTS, Dialect, Found, Parts, Transform, find_module, named
from ipa_bridge.files import ArrayFile, open_arrays, write_arrays
from ipa_bridge.parameters import Shapes, infer_config, parameter_shapes, torch_name
from ipa_bridge.tensors import numpy_array, numpy_dtype, torch_tensor
from ipa_bridge.told import expression, fields, frame_units, functional, is_functional, path_within

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike
    from torch import Tensor
    from torch.nn import Module
    from typing_extensions import TypeVar  # Python's own takes a default from 3.13

    ConfigT = TypeVar("ConfigT", bound=Config, default=Any)
    Given = TypeVar("Given", bound=Config, default=Any)
else:
    from typing import TypeVar

    ConfigT = TypeVar("ConfigT")

ROOTS: dict[type, str] = {
    IPAConfig: "invariant_point_attention",
    IPABlockConfig: "ipa_block",
    IPATransformerConfig: "ipa_transformer",
    StructureModuleConfig: "structure_module",
    PredictedLDDTConfig: "predicted_lddt_head",
}
"""The haiku module path of each on its own, as `ipa_jax.transform_ipa` and its like make it."""

MOST_NUMBERS = 1 << 26
"""Of one module in a file smaller than that, thirty times AlphaFold's."""

MOST_PROBLEMS = 40
"""Named in one error."""

MOST_LAYERS = 1024
"""That metadata may tell of."""

_CONFIG_KEY, _ASSUMED_KEY, _DIALECT_KEY = "ipa_config", "ipa_assumed", "ipa_dialect"


@dataclass(frozen=True, eq=False)
class Weights(Generic[ConfigT]):
    """The parameters of one attention, IPA block or transformer, structure module or confidence head.

    To a type checker they are of their config's type: `Weights[IPAConfig]`, or `Weights` where a file tells.

    Attributes:
        arrays: canonical name (AlphaFold's haiku name below the module) to array in haiku's shape; read-only
            copies, which no later step of training and no later change of a file reaches.
        config: the config they fit.
        root: the haiku path of the module, under which `to_haiku` and an .npz put them; None for its own name.
        assumed: paths of the config's fields that nothing told, as "ipa.norm_epsilon". A field is told by `config=`,
            by a file's metadata, by a module of ours, by names and shapes, or by the system that the weights are of,
            if all its published models have the same value.

    Raises:
        ValueError: missing, extra, misshapen, non-float or non-finite parameters, each named; or an assumed field that
            the config does not have.
    """

    arrays: Mapping[str, np.ndarray]
    config: ConfigT
    root: str = None  # type: ignore[assignment]
    assumed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.root is None:
            object.__setattr__(self, "root", ROOTS[type(self.config)])
        object.__setattr__(self, "assumed", frozenset(self.assumed))
        known = fields(self.config)
        if unknown := sorted(set(self.assumed) - set(known)):
            raise ValueError(
                f"assumed must name fields of the config, as {next(iter(known))}; got {', '.join(map(str, unknown))}"
            )
        _check(self.arrays, parameter_shapes(self.config))
        object.__setattr__(self, "arrays", {name: _frozen_copy(x) for name, x in self.arrays.items()})

    def __repr__(self) -> str:
        numbers = sum(x.size for x in self.arrays.values())
        dtypes = ", ".join(sorted({x.dtype.name for x in self.arrays.values()}))
        assumed = f", assumed={sorted(self.assumed)}" if self.assumed else ""
        return (
            f"Weights({len(self.arrays)} arrays of {numbers:,} numbers in {dtypes}, root={self.root!r}, "
            f"config={expression(self.config)}{assumed})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made as the original was, so that their arrays are read-only too."""
        return type(self), (dict(self.arrays), self.config, self.root, self.assumed)

    @property
    def assumed_function(self) -> dict[str, Any]:
        """The assumed fields by path, with their values, that say what a trained module computes."""
        return {path: x for path, x in fields(self.config).items() if path in self.assumed and is_functional(path)}

    @classmethod
    def random(cls, config: Given, *, seed: int = 0, dtype: DTypeLike = np.float32) -> Weights[Given]:
        """Seeded parameters of the size of trained ones, no array at its initial value.

        AlphaFold's own initialisation ends in zeros, on which every comparison succeeds.
        """
        rng = np.random.default_rng(seed)
        arrays = {}
        for name, shape in parameter_shapes(config).items():
            x = rng.standard_normal(shape)
            if name.endswith("trainable_point_weights"):
                x = attention_of(config).point_weight_init + 0.3 * x
            elif name.endswith("/weights"):
                x = x / math.sqrt(shape[0])
            else:
                x = name.endswith("/scale") + 0.1 * x
            if "affine_update" in name or "/quat_rigid/" in name:
                x = 0.2 * x  # a residue goes a few Å and turns by tens of degrees in a layer
            arrays[name] = x.astype(dtype)
        return Weights(arrays, config)

    @classmethod
    def from_haiku(
        cls, params: Mapping[str, Any], *, root: str | None = None, config: Given | None = None
    ) -> Weights[Given]:
        """Takes one module out of haiku parameters, {module: {leaf: array}} or AlphaFold's {'module//leaf': array}.

        The largest module that we know (a structure module, a transformer, a block, an attention, a confidence head, in
        this order) is found by parameters of its own; all that lies outside its path belongs to other parts of the
        model. Its path is kept: `to_haiku()` gives back the same tree.

        Args:
            params: arrays of numpy or JAX.
            root: path of the module, where there are several or another is meant.
            config: what the module is; a module of its kind is looked for. Without it, what names and shapes do not
                tell is `assumed`, but for parameters at AlphaFold's own path.

        Raises:
            ValueError: no such module, several and no root, or parameters that do not fit.
        """
        flat: list[tuple[str, Any]] = []
        for module, leaves in params.items():
            if isinstance(leaves, Mapping):
                flat += [(_join(module, leaf), x) for leaf, x in leaves.items()]
            else:
                flat.append((module.replace("//", "/"), leaves))
        tree = _without_duplicates(flat, "these parameters")
        shapes = {name: np.shape(x) for name, x in tree.items()}
        found, settled, assumed = find_module(shapes, root=root, config=config, haiku=True)
        arrays = _read(found, settled, shapes, lambda key: np.asarray(tree[key]))
        return Weights(arrays, cast("Given", settled), found.root, assumed)

    @classmethod
    def from_torch(
        cls,
        state_dict: Mapping[str, Tensor] | Module,
        *,
        dialect: str | None = None,
        root: str | None = None,
        config: Given | None = None,
    ) -> Weights[Given]:
        """Takes one module out of a torch state dict, with our names or another system's, alone or under a prefix.

        Args:
            state_dict: tensors or parameters on any device; or a module, whose state dict it is. A module of
                `ipa_torch`, alone or within another, tells its config.
            dialect: whose names they are, one of `ipa_bridge.dialects.DIALECTS`; None to recognise it.
            root: prefix of the module ("" for none), where there are several or another is meant.
            config: what the module is; a module of its kind is looked for. Without it, what nothing else tells is
                `assumed`.

        Raises:
            ValueError: no such module, several and no root, names that two dialects read differently, entries that are
                no tensors, or parameters that do not fit.
        """
        model = None if isinstance(state_dict, Mapping) else state_dict
        if model is not None:
            if not hasattr(model, "state_dict"):
                raise ValueError(f"a state dict or a module was expected; got a {type(model).__name__}")
            state_dict = model.state_dict()
        state_dict = cast("Mapping[str, Tensor]", state_dict)
        strange = [repr(name) for name in state_dict if not isinstance(name, str)]
        if strange:
            raise ValueError(f"names were expected, as module.state_dict() has them; got {', '.join(strange[:5])}")
        shapes = {name: tuple(getattr(x, "shape", ())) for name, x in state_dict.items()}
        found, settled, assumed = find_module(shapes, dialect=dialect, root=root, config=config, haiku=False)
        if config is None and model is not None and (told := _config_of_module(model, found)) is not None:
            settled, assumed = told, frozenset()
        parts = found.parts(shapes, settled)
        tensors = {key: state_dict[key] for key in parts.read}
        other = [f"{name} ({type(x).__name__})" for name, x in tensors.items() if not hasattr(x, "detach")]
        if other:
            raise ValueError(f"tensors were expected, as module.state_dict() gives them; got {', '.join(other)}")

        def read(key: str) -> np.ndarray:
            try:
                return numpy_array(tensors[key])
            except (TypeError, RuntimeError, NotImplementedError) as error:
                raise ValueError(f"{key} is no plain tensor ({error}): make it dense, on a device with data") from error

        weights = Weights(_read(found, settled, shapes, read), cast("Given", settled), assumed=assumed)
        parts.mention(stacklevel=3)
        return weights

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        dialect: str | None = None,
        root: str | None = None,
        config: Given | None = None,
    ) -> Weights[Given]:
        """Reads one module from .npz, .safetensors or .pt, in AlphaFold's `module//leaf` names or any torch dialect's.

        It is found as `from_haiku` finds it; .pth, .ckpt and .bin are read as .pt. Only its own arrays are read, be the
        file a whole model's. Where it lay in the file is the file's affair: `to_haiku()` gives what
        `ipa_jax.transform_structure_module(config).apply`, `transform_ipa`'s and their like take.

        Args:
            path: the file.
            dialect: whose names they are, one of `ipa_bridge.dialects.DIALECTS`; None to recognise it.
            root: path of the module in the file, where there are several or another is meant.
            config: what the module is, whatever the file's metadata say; a module of its kind is looked for. Without
                it, what neither metadata nor anything else tells is `assumed`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged or pickled file, no such module, several and no root, names that two dialects read
                differently, or parameters that do not fit.
        """
        with open_arrays(path) as file:
            weights, _, parts = read_module(file, dialect=dialect, root=root, config=config)
        parts.mention(stacklevel=3)
        return weights

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dialect: str | None = None,
        root: str | None = None,
        allow_lossy: Collection[str] = (),
    ) -> None:
        """Writes .npz in AlphaFold's form (`root/module//leaf`), or .safetensors or .pt in torch's names and layout.

        .safetensors also carries the config, and which fields of it are assumed; the others warn where `load` would
        take something else for granted. Assumed fields that say what the module computes are warned of, with the
        `config=` to pass. The file is replaced in one step, or left as it was.

        Args:
            path: destination.
            dialect: write another system's names and layouts, one of `ipa_bridge.dialects.DIALECTS`; what its modules
                and their callers must be told besides comes as a warning.
            root: path of the module in the file; None for where it came from in haiku's names, and none in torch's.
            allow_lossy: names of `ipa_bridge.conversion.LOSSES` that may happen.

        Raises:
            ValueError: another suffix, something the dialect cannot say, or bfloat16 into .npz, which cannot hold it.
        """
        if dialect is None:
            dialect = "ipa_jax" if os.fspath(path).endswith(".npz") else "ipa_torch"
        target = named(dialect)
        expressed = express(self, target, allow_lossy=allow_lossy)
        for note in expressed.notes:
            warnings.warn(f"{os.fspath(path)}, as {target.title}'s: {note}", stacklevel=2)
        for note in [] if target.forms else expressed.weights.forgotten(path):
            warnings.warn(f"{os.fspath(path)} {note}", stacklevel=2)
        for note in self.unsure():
            warnings.warn(f"{os.fspath(path)}: {note}", stacklevel=2)
        expressed.weights.write(path, target, root=root)

    def write(
        self, path: str | os.PathLike[str], dialect: Dialect, *, root: str | None = None, replace: bool = True
    ) -> None:
        """Writes what a dialect can say as it is; see `save`, which first makes it so."""
        arrays = in_dialect(self, dialect, root)
        if dialect.separator == "/":
            arrays = {_join(*_split(name), "//"): x for name, x in arrays.items()}
        write_arrays(path, arrays, _metadata(self, dialect), replace=replace)

    def subtree(self, path: str) -> Weights:
        """One module out of a larger one, as "fold_iteration/invariant_point_attention" of a structure module.

        Raises:
            ValueError: no known module at that path.
        """
        return Weights.from_haiku({_join(*_split(name), "//"): x for name, x in self.arrays.items()}, root=path)._alone(
            self
        )

    def to_haiku(self, *, root: str | None = None) -> dict[str, dict[str, np.ndarray]]:
        """Haiku parameters, {module: {leaf: array}}, under `root` or where they came from."""
        tree: dict[str, dict[str, np.ndarray]] = {}
        for name, x in self.arrays.items():
            module, leaf = _split(_join(self.root if root is None else root, name))
            tree.setdefault(module, {})[leaf] = x
        return tree

    def to_torch(
        self, *, dialect: str | None = None, root: str = "", allow_lossy: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """The state dict of the torch module of that config, tensors with memory of their own.

        Args:
            dialect: that of another system's module, one of `ipa_bridge.dialects.DIALECTS`, for its
                `load_state_dict(strict=True)`. Lucidrains' takes row-vector frames: pass `rotations` transposed.
            root: prefix of the names.
            allow_lossy: names of `ipa_bridge.conversion.LOSSES` that may happen.

        Raises:
            ValueError: something the dialect cannot say.
        """
        target = named(dialect or "ipa_torch")
        if target.separator == "/":
            raise ValueError(f"{target.title}'s are haiku parameters: use to_haiku()")
        expressed = express(self, target, allow_lossy=allow_lossy).weights
        return {name: torch_tensor(x) for name, x in in_dialect(expressed, target, root).items()}

    def astype(self, dtype: DTypeLike) -> Weights[ConfigT]:
        """The same parameters rounded to another dtype."""
        rounded = numpy_dtype(dtype)
        return dataclasses.replace(self, arrays={name: x.astype(rounded) for name, x in self.arrays.items()})

    def _alone(self, whole: Weights) -> Weights:
        """The same under its own name, with the whole's config and what of it is assumed."""
        config, assumed = _part(whole.config, whole.assumed, type(self.config)) or (self.config, self.assumed)
        return Weights(self.arrays, config, assumed=assumed)

    def unsure(self) -> list[str]:
        """A sentence that tells which functional fields are only assumed; none where all are told."""
        if not self.assumed_function:
            return []
        listed = ", ".join(f"{path}={x!r}" for path, x in self.assumed_function.items())
        return [
            f"assumed, for neither names nor shapes tell: {listed}; where these weights are read, pass what holds, as "
            f"config={expression(self.config, self.assumed_function)}"
        ]

    def forgotten(self, path: str | os.PathLike[str]) -> list[str]:
        """What a file of that name cannot say, and `load` would take for granted, each as the end of a sentence.

        .safetensors carries the config; the others only names and shapes.
        """
        if os.fspath(path).endswith(".safetensors"):
            return []
        inferred, told = (
            {**functional(config), **frame_units(config)} for config in (_config_of(self.arrays), self.config)
        )
        untold = [f"{name} is {x!r}, not {inferred[name]!r}" for name, x in told.items() if x != inferred[name]]
        if not untold:
            return []
        return [
            f"cannot say that {'; that '.join(untold)}, as Weights.load will believe: pass it config=, or save as "
            f".safetensors"
        ]


def read_module(
    file: ArrayFile,
    *,
    dialect: str | None = None,
    root: str | None = None,
    config: Config | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Weights, Found, Parts]:
    """One module out of an open file, whose it was, and what lay at its path; see `Weights.load`.

    Args:
        file: the file.
        dialect: see there.
        root: see there.
        config: see there.
        progress: told how many parameters of how many are read.
    """
    keys = slashed(file.keys, str(file.path))
    haiku = any("//" in key for key in file.keys)
    shapes, unreadable = _shapes(file, keys)
    whose = file.metadata.get(_DIALECT_KEY)
    if dialect is None and whose in DIALECTS and (named(whose).separator == "/") == haiku:
        dialect = whose
    told = _told_by_metadata(file.metadata, file.path) if config is None else None
    if root is None:
        config = config or (told and told[0])
    try:
        found, settled, assumed = find_module(
            shapes, dialect=dialect, root=root, config=config, haiku=haiku, source=os.fspath(file.path)
        )
    except ValueError as error:
        if not unreadable:
            raise
        others = "\n  ".join(map(str, unreadable.values()))
        raise ValueError(f"{error}\nwhat could not be read:\n  {others}") from error
    settled, assumed = (told and _part(*told, found.kind)) or (settled, assumed)
    _check_size(settled, file)
    for name in found.parts(dict.fromkeys(unreadable, ()), settled).read:
        raise unreadable[name]
    parts = found.parts(shapes, settled)
    number, done = len(parts.read), 0

    def read(name: str) -> np.ndarray:
        nonlocal done
        done += 1
        progress(done, number)
        return file[keys[name]]

    return Weights(_read(found, settled, shapes, read), settled, assumed=assumed), found, parts


def _part(whole: Config, assumed: Collection[str], kind: type) -> tuple[Config, frozenset[str]] | None:
    """The config of a module of that kind within a whole's, and its assumed fields; None where there is none."""
    prefix = path_within(whole, kind)
    if prefix is None:
        return None
    part = whole
    for name in prefix.split(".")[:-1]:
        part = getattr(part, name)
    return part, frozenset(path.removeprefix(prefix) for path in assumed if path.startswith(prefix))


def _config_of_module(model: Any, found: Found) -> Config | None:
    """The config that a module of ours carries."""
    try:
        config = getattr(model.get_submodule(found.root), "config", None)
    except AttributeError:  # its state dict has other names than its modules
        return None
    return config if isinstance(config, found.kind) else None  # type: ignore[return-value]


def _check_size(config: Config, file: ArrayFile) -> None:
    """A small file may claim to hold any number: trained ones hardly compress, so a large module is in a large file."""
    number = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    if number > max(MOST_NUMBERS, file.path.stat().st_size):
        raise ValueError(
            f"{file.path}: {number} numbers are more than the {MOST_NUMBERS} that a file of its size is believed to "
            f"hold"
        )


def _shapes(file: ArrayFile, keys: Mapping[str, str]) -> tuple[Shapes, dict[str, ValueError]]:
    """Shapes by name; and what is wrong with those that cannot be read, which may be no business of ours."""
    shapes: Shapes = {}
    unreadable: dict[str, ValueError] = {}
    for name, key in keys.items():
        try:
            shapes[name] = file.shape(key)
        except ValueError as error:
            unreadable[name] = error
    return shapes, unreadable


def _read(found: Found, config: Config, shapes: Shapes, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """A module's arrays in our form, once all their names and shapes are right."""
    names, below = found.dialect.names(config), found.parts(shapes, config).below
    wanted, ours = parameter_shapes(config), found.dialect.canonical_names(below, found.kind)
    problems = [f"missing {name} {shape}" for name, shape in wanted.items() if names[name][0] not in below]
    known = {theirs for theirs, _ in names.values()}
    problems += [
        f"unexpected {ours.get(theirs, theirs)} {shapes[key]}" for theirs, key in below.items() if theirs not in known
    ]
    arrays = {}
    for name, (theirs, transform) in names.items():
        if theirs not in below:
            continue
        shape = shapes[below[theirs]]
        if shape == transform.their_shape:
            continue
        shown = shape[::-1] if transform.turned else shape
        problems.append(f"{name} must be {transform.shape}, got {shown}" + _here(name, theirs, transform, shape))
    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
    if problems:
        raise ValueError("these parameters do not fit the config:\n  " + "\n  ".join(problems))
    for name, (theirs, transform) in names.items():
        arrays[name] = transform.invert(read(below[theirs]))
    return arrays


def _here(name: str, theirs: str, transform: Transform, shape: tuple[int, ...]) -> str:
    """How a foreign file sees it."""
    return "" if theirs in (name, torch_name(name)) else f" ({theirs}: {transform.their_shape}, got {shape})"


def in_dialect(weights: Weights, dialect: Dialect, root: str | None) -> dict[str, np.ndarray]:
    """Arrays under another system's names, below a root; zeros for those that its modules own and never read."""
    if root is None:
        root = weights.root if dialect.separator == "/" else ""
    names = dialect.names(weights.config)
    arrays = {theirs: transform.apply(weights.arrays[name]) for name, (theirs, transform) in names.items()}
    dtype = next(iter(arrays.values())).dtype
    unused = dialect.unused.get(type(weights.config), {})
    arrays |= {theirs: np.zeros(shape, dtype) for theirs, shape in unused.items()}
    return {_join(root, theirs, dialect.separator): x for theirs, x in arrays.items()}


def _metadata(weights: Weights, dialect: Dialect) -> dict[str, str]:
    """What .safetensors carries beside the arrays; "format" is what transformers asks for."""
    metadata = {_CONFIG_KEY: json.dumps(dataclasses.asdict(weights.config))}
    if weights.assumed:
        metadata[_ASSUMED_KEY] = json.dumps(sorted(weights.assumed))
    return {"format": "pt", _DIALECT_KEY: dialect.name, **metadata} if dialect.forms else metadata


def slashed(keys: Iterable[str], source: str = "this file") -> dict[str, str]:
    """A file's keys by their names with one `/` before the leaf, as haiku's paths have it.

    Raises:
        ValueError: two keys are the same name.
    """
    return _without_duplicates([(key.replace("//", "/"), key) for key in keys], source)


def _without_duplicates(pairs: Iterable[tuple[str, Any]], source: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, x in pairs:
        if name in found:
            raise ValueError(f"{source}: {name!r} is there twice; which of the two is meant cannot be told")
        found[name] = x
    return found


def canonical_from_haiku(params: Mapping[str, Mapping[str, Any]], root: str) -> dict[str, Any]:
    """Leaves of a haiku tree under canonical names, those below the root."""
    flat = {_join(module, leaf): x for module, leaves in params.items() for leaf, x in leaves.items()}
    return {name: flat[key] for name, key in _below(flat, root, "/").items()}


def canonical_from_torch(
    arrays: Mapping[str, np.ndarray], config: Config, dialect: str = "ipa_torch"
) -> dict[str, np.ndarray]:
    """Arrays under a torch dialect's names and in its layout, such as gradients, under canonical names and in ours."""
    return {
        ours: transform.invert(arrays[theirs]) for ours, (theirs, transform) in named(dialect).names(config).items()
    }


def _config_of(arrays: Mapping[str, np.ndarray]) -> Config:
    return infer_config({name: x.shape for name, x in arrays.items()})


def _below(keys: Iterable[str], root: str, separator: str) -> dict[str, str]:
    """Name below the root to key, for the keys there."""
    prefix = root + separator if root else ""
    return {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}


def _join(module: str, leaf: str, separator: str = "/") -> str:
    return module + separator + leaf if module else leaf


def _split(path: str) -> tuple[str, str]:
    module, _, leaf = path.rpartition("/")
    return module, leaf


def _check(arrays: Mapping[str, np.ndarray], shapes: Shapes) -> None:
    """Everything wrong with the arrays in one error."""
    problems = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in arrays]
    problems += [f"unexpected {name} {np.shape(x)}" for name, x in arrays.items() if name not in shapes]
    checks: tuple[tuple[Callable[[str, np.ndarray], bool], Callable[[str, np.ndarray], str]], ...] = (
        (lambda name, x: x.shape == shapes[name], lambda name, x: f"{name} must be {shapes[name]}, got {x.shape}"),
        (lambda name, x: _is_float(x), lambda name, x: f"{name} must be floating-point, got {x.dtype}"),
        (lambda name, x: bool(np.isfinite(x).all()), lambda name, x: f"{name} holds NaN or infinity"),
    )
    for name, x in arrays.items():
        if name in shapes:
            problems += next(([message(name, x)] for passes, message in checks if not passes(name, x)), [])
    if problems:
        raise ValueError("these parameters do not fit the config:\n  " + "\n  ".join(problems))


def _is_float(x: np.ndarray) -> bool:
    return x.dtype.name in ("float16", "bfloat16", "float32", "float64")


def _frozen_copy(x: ArrayLike) -> np.ndarray:
    copy = np.array(x, order="C")
    copy = copy.astype(copy.dtype.newbyteorder("="), copy=False)
    copy.flags.writeable = False
    return copy


def _told_by_metadata(
    metadata: Mapping[str, str], path: str | os.PathLike[str]
) -> tuple[Config, frozenset[str]] | None:
    """The config that a file carries, and which fields of it are assumed: those marked so, and those it leaves out."""
    if _CONFIG_KEY not in metadata:
        return None
    try:
        values = json.loads(metadata[_CONFIG_KEY])
        config = _config_from(values)
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: its {_CONFIG_KEY} metadata is no config ({error}): pass config=") from error
    known = fields(config)
    try:
        marked = json.loads(metadata.get(_ASSUMED_KEY, "[]"))
        if not isinstance(marked, list) or not all(isinstance(x, str) and x in known for x in marked):
            raise ValueError("a list of fields of the config was expected")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its {_ASSUMED_KEY} metadata cannot be read ({error}): pass config=") from error
    return config, frozenset({*marked, *(x for x in known if not _has(values, x))})


def _has(values: Any, path: str) -> bool:
    """A field of that path is among a config's values."""
    for name in path.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def _config_from(values: Any) -> Config:
    """The config of those values, of whatever kind."""
    for name in ("num_layer", "num_layer_in_transition", "num_residual_block"):
        for level in (values, values.get("block", {})):
            if isinstance(level.get(name), int) and level[name] > MOST_LAYERS:
                raise ValueError(f"{name} is {level[name]}, and {MOST_LAYERS} is the most that is believed")
    if "block" in values:
        block = {**values["block"], "ipa": IPAConfig(**values["block"]["ipa"])}
        return IPATransformerConfig(**{**values, "block": IPABlockConfig(**block)})
    if "post_norm" in values:
        return IPABlockConfig(**{**values, "ipa": IPAConfig(**values["ipa"])})
    if "ipa" in values:
        return StructureModuleConfig(**{**values, "ipa": IPAConfig(**values["ipa"])})
    return PredictedLDDTConfig(**values) if "num_bin" in values else IPAConfig(**values)
