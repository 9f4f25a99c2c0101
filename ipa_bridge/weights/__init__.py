"""A module's parameters as named numpy arrays, converted to and from haiku trees, torch state dicts and files."""

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
    from typing_extensions import TypeVar  # typing.TypeVar accepts a default from Python 3.13 on

    ConfigT = TypeVar("ConfigT", bound=Config, default=Any)
    Given = TypeVar("Given", bound=Config, default=Any)
else:
    from typing import TypeVar

    ConfigT = TypeVar("ConfigT")

__all__ = ["Weights", "canonical_from_haiku", "canonical_from_torch"]


@dataclass(frozen=True, eq=False)
class Weights(Generic[ConfigT]):
    """The parameters of one attention, IPA block or transformer, structure module or confidence head.

    The type parameter is the config's type: `Weights[IPAConfig]`, or plain `Weights` if only a file determines it.

    Attributes:
        arrays: canonical name (AlphaFold's haiku name below the module) to array in haiku's shape. The arrays are
            read-only copies: later training steps or changes of the file do not alter them.
        config: the config that the arrays fit.
        root: haiku path of the module, which `to_haiku` and .npz files put before the names; None for the default of
            the module's kind, such as "structure_module".
        assumed: paths of the config's fields that nothing determines, such as "ipa.norm_epsilon". A field is
            determined by `config=`, a file's metadata, a module of this project, names and shapes, or by the system
            that the weights come from if all its published models have the same value.

    Raises:
        ValueError: parameters are missing, extra, misshapen, non-float or non-finite (each is named), or `assumed`
            names a field that the config does not have.
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
                f"assumed must name fields of the config, such as {next(iter(known))}; got "
                f"{', '.join(map(str, unknown))}"
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
        """Makes copies and unpickled objects with the constructor, so that their arrays are read-only too."""
        return type(self), (dict(self.arrays), self.config, self.root, self.assumed)

    @property
    def assumed_function(self) -> dict[str, Any]:
        """Values, by path, of the assumed fields that affect what a trained module computes."""
        return {path: x for path, x in fields(self.config).items() if path in self.assumed and is_functional(path)}

    @classmethod
    def random(cls, config: Given, *, seed: int = 0, dtype: DTypeLike = np.float32) -> Weights[Given]:
        """Draws seeded parameters of the magnitude of trained ones; no array has its initial value.

        AlphaFold's own initialisation sets output layers to zero, and any two implementations agree on zeros.
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
                x = 0.2 * x  # so that each layer moves a residue by a few Å and turns it by tens of degrees
            arrays[name] = x.astype(dtype)
        return Weights(arrays, config)

    @classmethod
    def from_haiku(
        cls, params: Mapping[str, Any], *, root: str | None = None, config: Given | None = None
    ) -> Weights[Given]:
        """Extracts one module from haiku parameters, {module: {leaf: array}} or AlphaFold's {'module//leaf': array}.

        The module is recognised by its parameter names. The first kind found is taken: structure module, transformer,
        block, attention, confidence head. Parameters outside its path belong to other parts of the model. The path is
        kept, so that `to_haiku()` returns the module at the same place.

        Args:
            params: arrays of numpy or JAX.
            root: path of the module; needed if there are several, or to choose another one.
            config: the module's config; only modules of its kind are considered. Without it, fields that names and
                shapes do not determine are `assumed`, except at AlphaFold's own path.

        Raises:
            ValueError: there is no such module, there are several and `root` is None, or the parameters do not fit.
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
        """Extracts one module from a torch state dict, with our names or another system's, alone or under a prefix.

        Args:
            state_dict: tensors or parameters on any device, or a module, whose state dict is used. The config of an
                `ipa_torch` module, alone or within another, is taken from the module.
            dialect: the system whose names these are, one of `ipa_bridge.weights.dialects.DIALECTS`; None to
                recognise it.
            root: prefix of the module ("" for none); needed if there are several, or to choose another one.
            config: the module's config; only modules of its kind are considered. Without it, fields that nothing else
                determines are `assumed`.

        Raises:
            ValueError: there is no such module, there are several and `root` is None, two dialects read the names
                differently, entries are not tensors, or the parameters do not fit.
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
                raise ValueError(
                    f"{key} is not a plain tensor ({error}): make it dense, on a device with data"
                ) from error

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

        The module is found as in `from_haiku`; .pth, .ckpt and .bin are read as .pt. Only the module's own arrays are
        read, even from the file of a whole model. Its path in the file is not kept: `to_haiku()` returns what the
        `apply` of `ipa_jax.transform_structure_module(config)`, `transform_ipa(config)` and the like take.

        Args:
            path: the file.
            dialect: the system whose names the file has, one of `ipa_bridge.weights.dialects.DIALECTS`; None to
                recognise it.
            root: path of the module in the file; needed if there are several, or to choose another one.
            config: the module's config, which overrides the file's metadata; only modules of its kind are considered.
                Without it, fields that neither the metadata nor anything else determines are `assumed`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged or pickled, there is no such module, there are several and `root` is None,
                two dialects read the names differently, or the parameters do not fit.
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

        .safetensors also stores the config and which of its fields are assumed. The other formats cannot; a warning
        lists the fields for which `load` would assume another value. Another warning lists assumed fields that affect
        what the module computes, with the `config=` to pass. An existing file is replaced in one step, or left as it
        was if anything fails.

        Args:
            path: destination.
            dialect: the system whose names and layout to write, one of `ipa_bridge.weights.dialects.DIALECTS`; None
                for ours. A warning lists what its modules and callers need but the file cannot store.
            root: path of the module in the file; None for `self.root` in haiku's names and for no prefix in torch's.
            allow_lossy: losses to allow, by their names in `ipa_bridge.weights.conversion.LOSSES`.

        Raises:
            ValueError: the suffix is unknown, the dialect cannot represent the weights, or the weights are bfloat16
                and the file is .npz, which cannot hold it.
        """
        target = find_dialect(dialect or default_dialect(path))
        converted, conversion = self.converted(target, allow_lossy=allow_lossy)
        for note in conversion.notes:
            warnings.warn(f"{os.fspath(path)} for {target.title}: {note}", stacklevel=2)
        for note in [] if target.forms else unstored_fields(path, converted.arrays, converted.config):
            warnings.warn(f"{os.fspath(path)} {note}", stacklevel=2)
        for note in self.unsure():
            warnings.warn(f"{os.fspath(path)}: {note}", stacklevel=2)
        converted.write(path, target, root=root)

    def write(
        self, path: str | os.PathLike[str], dialect: Dialect, *, root: str | None = None, replace: bool = True
    ) -> None:
        """Writes weights that a dialect can represent as they are; `save` converts them first."""
        if root is None:
            root = self.root if dialect.separator == "/" else ""
        write_checkpoint(path, self.arrays, self.config, dialect, assumed=self.assumed, root=root, replace=replace)

    def converted(self, dialect: Dialect, *, allow_lossy: Collection[str] = ()) -> tuple[Weights, Conversion]:
        """Converts the weights to a form that a dialect can represent; see `conversion.convert`."""
        conversion = convert(self.arrays, self.config, dialect, allow_lossy=allow_lossy)
        if conversion.arrays is self.arrays and conversion.config is self.config:
            return self, conversion
        config = cast("ConfigT", conversion.config)
        return dataclasses.replace(self, arrays=conversion.arrays, config=config), conversion

    def subtree(self, path: str) -> Weights:
        """Extracts a module from a larger one, such as a structure module's "fold_iteration/invariant_point_attention".

        Raises:
            ValueError: there is no known module at that path.
        """
        return Weights.from_haiku({double_slash(name): x for name, x in self.arrays.items()}, root=path)._alone(self)

    def to_haiku(self, *, root: str | None = None) -> dict[str, dict[str, np.ndarray]]:
        """Returns haiku parameters, {module: {leaf: array}}, below `root`; None for `self.root`."""
        tree: dict[str, dict[str, np.ndarray]] = {}
        for name, x in self.arrays.items():
            module, leaf = split_path(join_path(self.root if root is None else root, name))
            tree.setdefault(module, {})[leaf] = x
        return tree

    def to_torch(
        self, *, dialect: str | None = None, root: str = "", allow_lossy: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Returns the state dict of the torch module with this config; the tensors have their own memory.

        Args:
            dialect: the system whose module will load it with `load_state_dict(strict=True)`, one of
                `ipa_bridge.weights.dialects.DIALECTS`; None for `ipa_torch`. Lucidrains' modules take row-vector
                frames: transpose `rotations` for them.
            root: prefix of the names.
            allow_lossy: losses to allow, by their names in `ipa_bridge.weights.conversion.LOSSES`.

        Raises:
            ValueError: the dialect cannot represent the weights, or it has haiku names.
        """
        target = find_dialect(dialect or "ipa_torch")
        if target.separator == "/":
            raise ValueError(f"{target.title} has haiku parameters: use to_haiku()")
        converted, _ = self.converted(target, allow_lossy=allow_lossy)
        named = in_dialect(converted.arrays, converted.config, target, root)
        return {name: torch_tensor(x) for name, x in named.items()}

    def astype(self, dtype: DTypeLike) -> Weights[ConfigT]:
        """The same parameters rounded to another dtype."""
        rounded = numpy_dtype(dtype)
        return dataclasses.replace(self, arrays={name: x.astype(rounded) for name, x in self.arrays.items()})

    def _alone(self, whole: Weights) -> Weights:
        """These weights at their kind's default root, with the config and assumed fields of the whole they are from."""
        config, assumed = part_of(whole.config, whole.assumed, type(self.config)) or (self.config, self.assumed)
        return Weights(self.arrays, config, assumed=assumed)

    def unsure(self) -> list[str]:
        """Returns one sentence that lists the assumed functional fields, or an empty list if there are none."""
        if not self.assumed_function:
            return []
        listed = ", ".join(f"{path}={x!r}" for path, x in self.assumed_function.items())
        return [
            f"assumed, because neither names nor shapes determine them: {listed}; when you load these weights, pass "
            f"the true values, as in config={constructor_code(self.config, self.assumed_function)}"
        ]


def _config_of_module(model: Any, found: Found) -> Config | None:
    """The config of the `ipa_torch` module that was found within a model; None if it is another system's."""
    try:
        config = getattr(model.get_submodule(found.root), "config", None)
    except AttributeError:  # names in the state dict differ from those of the modules
        return None
    return config if isinstance(config, found.kind) else None  # type: ignore[return-value]


def _check_arrays(arrays: Mapping[str, np.ndarray], shapes: Shapes) -> None:
    """Raises one error that lists everything wrong with the arrays."""
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
