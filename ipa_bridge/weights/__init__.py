"""One model's parameters as named numpy arrays, to and from a haiku tree, a torch state dict and files."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, cast

import numpy as np

from ipa_bridge.config import Config
from ipa_bridge.kinds import attention_of, kind_of, parameter_shapes
from ipa_bridge.parameters import Shapes
from ipa_bridge.weights.assumptions import constructor_code, fields, is_functional, part_of
from ipa_bridge.weights.checkpoints import read_checkpoint, unstored_fields, write_checkpoint
from ipa_bridge.weights.conversion import Conversion, convert
from ipa_bridge.weights.dialects import Dialect, default_dialect, find_dialect
from ipa_bridge.weights.files import open_arrays
from ipa_bridge.weights.finding import Found, find_module
from ipa_bridge.weights.paths import double_slash, join_path, split_path, without_duplicates
from ipa_bridge.weights.tensors import numpy_array, numpy_dtype, torch_tensor
from ipa_bridge.weights.translation import canonical_from_haiku, canonical_from_torch, from_dialect, in_dialect

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

__all__ = ["Weights", "canonical_from_haiku", "canonical_from_torch"]


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
            object.__setattr__(self, "root", kind_of(self.config).root)
        object.__setattr__(self, "assumed", frozenset(self.assumed))
        known = fields(self.config)
        if unknown := sorted(set(self.assumed) - set(known)):
            raise ValueError(
                f"assumed must name fields of the config, as {next(iter(known))}; got {', '.join(map(str, unknown))}"
            )
        _check_arrays(self.arrays, parameter_shapes(self.config))
        object.__setattr__(self, "arrays", {name: _frozen_copy(x) for name, x in self.arrays.items()})

    def __repr__(self) -> str:
        numbers = sum(x.size for x in self.arrays.values())
        dtypes = ", ".join(sorted({x.dtype.name for x in self.arrays.values()}))
        assumed = f", assumed={sorted(self.assumed)}" if self.assumed else ""
        return (
            f"Weights({len(self.arrays)} arrays of {numbers:,} numbers in {dtypes}, root={self.root!r}, "
            f"config={constructor_code(self.config)}{assumed})"
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
                flat += [(join_path(module, leaf), x) for leaf, x in leaves.items()]
            else:
                flat.append((module.replace("//", "/"), leaves))
        tree = without_duplicates(flat, "these parameters")
        shapes = {name: np.shape(x) for name, x in tree.items()}
        found, settled, assumed = find_module(shapes, root=root, config=config, haiku=True)
        arrays = from_dialect(found, settled, shapes, lambda key: np.asarray(tree[key]))
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
            dialect: whose names they are, one of `ipa_bridge.weights.dialects.DIALECTS`; None to recognise it.
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

        weights = Weights(from_dialect(found, settled, shapes, read), cast("Given", settled), assumed=assumed)
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
            dialect: whose names they are, one of `ipa_bridge.weights.dialects.DIALECTS`; None to recognise it.
            root: path of the module in the file, where there are several or another is meant.
            config: what the module is, whatever the file's metadata say; a module of its kind is looked for. Without
                it, what neither metadata nor anything else tells is `assumed`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged or pickled file, no such module, several and no root, names that two dialects read
                differently, or parameters that do not fit.
        """
        with open_arrays(path) as file:
            checkpoint = read_checkpoint(file, dialect=dialect, root=root, config=config)
        weights = Weights(checkpoint.arrays, cast("Given", checkpoint.config), assumed=checkpoint.assumed)
        checkpoint.parts.mention(stacklevel=3)
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
            dialect: write another system's names and layouts, one of `ipa_bridge.weights.dialects.DIALECTS`; what its
                modules and their callers must be told besides comes as a warning.
            root: path of the module in the file; None for where it came from in haiku's names, and none in torch's.
            allow_lossy: names of `ipa_bridge.weights.conversion.LOSSES` that may happen.

        Raises:
            ValueError: another suffix, something the dialect cannot say, or bfloat16 into .npz, which cannot hold it.
        """
        target = find_dialect(dialect or default_dialect(path))
        converted, conversion = self.converted(target, allow_lossy=allow_lossy)
        for note in conversion.notes:
            warnings.warn(f"{os.fspath(path)}, as {target.title}'s: {note}", stacklevel=2)
        for note in [] if target.forms else unstored_fields(path, converted.arrays, converted.config):
            warnings.warn(f"{os.fspath(path)} {note}", stacklevel=2)
        for note in self.unsure():
            warnings.warn(f"{os.fspath(path)}: {note}", stacklevel=2)
        converted.write(path, target, root=root)

    def write(
        self, path: str | os.PathLike[str], dialect: Dialect, *, root: str | None = None, replace: bool = True
    ) -> None:
        """Writes what a dialect can say as it is; see `save`, which first makes it so."""
        if root is None:
            root = self.root if dialect.separator == "/" else ""
        write_checkpoint(path, self.arrays, self.config, dialect, assumed=self.assumed, root=root, replace=replace)

    def converted(self, dialect: Dialect, *, allow_lossy: Collection[str] = ()) -> tuple[Weights, Conversion]:
        """The same function in a form that a dialect has names for, and what that loses; see `conversion.convert`."""
        conversion = convert(self.arrays, self.config, dialect, allow_lossy=allow_lossy)
        if conversion.arrays is self.arrays and conversion.config is self.config:
            return self, conversion
        config = cast("ConfigT", conversion.config)
        return dataclasses.replace(self, arrays=conversion.arrays, config=config), conversion

    def subtree(self, path: str) -> Weights:
        """One module out of a larger one, as "fold_iteration/invariant_point_attention" of a structure module.

        Raises:
            ValueError: no known module at that path.
        """
        return Weights.from_haiku({double_slash(name): x for name, x in self.arrays.items()}, root=path)._alone(self)

    def to_haiku(self, *, root: str | None = None) -> dict[str, dict[str, np.ndarray]]:
        """Haiku parameters, {module: {leaf: array}}, under `root` or where they came from."""
        tree: dict[str, dict[str, np.ndarray]] = {}
        for name, x in self.arrays.items():
            module, leaf = split_path(join_path(self.root if root is None else root, name))
            tree.setdefault(module, {})[leaf] = x
        return tree

    def to_torch(
        self, *, dialect: str | None = None, root: str = "", allow_lossy: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """The state dict of the torch module of that config, tensors with memory of their own.

        Args:
            dialect: that of another system's module, one of `ipa_bridge.weights.dialects.DIALECTS`, for its
                `load_state_dict(strict=True)`. Lucidrains' takes row-vector frames: pass `rotations` transposed.
            root: prefix of the names.
            allow_lossy: names of `ipa_bridge.weights.conversion.LOSSES` that may happen.

        Raises:
            ValueError: something the dialect cannot say.
        """
        target = find_dialect(dialect or "ipa_torch")
        if target.separator == "/":
            raise ValueError(f"{target.title}'s are haiku parameters: use to_haiku()")
        converted, _ = self.converted(target, allow_lossy=allow_lossy)
        named = in_dialect(converted.arrays, converted.config, target, root)
        return {name: torch_tensor(x) for name, x in named.items()}

    def astype(self, dtype: DTypeLike) -> Weights[ConfigT]:
        """The same parameters rounded to another dtype."""
        rounded = numpy_dtype(dtype)
        return dataclasses.replace(self, arrays={name: x.astype(rounded) for name, x in self.arrays.items()})

    def _alone(self, whole: Weights) -> Weights:
        """The same under its own name, with the whole's config and what of it is assumed."""
        config, assumed = part_of(whole.config, whole.assumed, type(self.config)) or (self.config, self.assumed)
        return Weights(self.arrays, config, assumed=assumed)

    def unsure(self) -> list[str]:
        """A sentence that tells which functional fields are only assumed; none where all are told."""
        if not self.assumed_function:
            return []
        listed = ", ".join(f"{path}={x!r}" for path, x in self.assumed_function.items())
        return [
            f"assumed, for neither names nor shapes tell: {listed}; where these weights are read, pass what holds, as "
            f"config={constructor_code(self.config, self.assumed_function)}"
        ]


def _config_of_module(model: Any, found: Found) -> Config | None:
    """The config that a module of ours carries."""
    try:
        config = getattr(model.get_submodule(found.root), "config", None)
    except AttributeError:  # its state dict has other names than its modules
        return None
    return config if isinstance(config, found.kind) else None  # type: ignore[return-value]


def _check_arrays(arrays: Mapping[str, np.ndarray], shapes: Shapes) -> None:
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
