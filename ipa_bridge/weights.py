"""One model's parameters as named numpy arrays, to and from a haiku tree, a torch state dict and files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ipa_bridge.config import Config, IPAConfig, PredictedLDDTConfig, StructureModuleConfig
from ipa_bridge.files import open_arrays, write_arrays
from ipa_bridge.parameters import LANDMARKS, Shapes, infer_config, parameter_shapes
from ipa_bridge.tensors import numpy_array, numpy_dtype, torch_tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike
    from torch import Tensor

ROOTS: dict[type, str] = {
    IPAConfig: "invariant_point_attention",
    StructureModuleConfig: "structure_module",
    PredictedLDDTConfig: "predicted_lddt_head",
}
"""The haiku module path of each on its own, as `ipa_jax.transform_ipa` and its like make it."""

_KINDS = {
    IPAConfig: "invariant point attentions",
    StructureModuleConfig: "structure modules",
    PredictedLDDTConfig: "confidence heads",
}
_METADATA_KEY = "ipa_config"


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters of one invariant point attention, structure module or confidence head.

    Attributes:
        arrays: canonical name (AlphaFold's haiku name below the module) to array in haiku's shape; read-only
            copies, which no later step of training and no later change of a file reaches.
        config: the config they fit.
        root: the haiku path of the module, under which `to_haiku` and an .npz put them; None for its own name.

    Raises:
        ValueError: missing, extra, misshapen, non-float or non-finite parameters, each named.
    """

    arrays: Mapping[str, np.ndarray]
    config: Config
    root: str = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.root is None:
            object.__setattr__(self, "root", ROOTS[type(self.config)])
        _check(self.arrays, parameter_shapes(self.config))
        object.__setattr__(self, "arrays", {name: _frozen_copy(x) for name, x in self.arrays.items()})

    @classmethod
    def random(cls, config: Config, *, seed: int = 0, dtype: DTypeLike = np.float32) -> Weights:
        """Seeded parameters of the size of trained ones, no array at its initial value.

        AlphaFold's own initialisation ends in zeros, on which every comparison succeeds.
        """
        rng = np.random.default_rng(seed)
        arrays = {}
        for name, shape in parameter_shapes(config).items():
            x = rng.standard_normal(shape)
            if name.endswith("trainable_point_weights"):
                ipa = config.ipa if isinstance(config, StructureModuleConfig) else config
                x = cast(IPAConfig, ipa).point_weight_init + 0.3 * x
            elif name.endswith("/weights"):
                x = x / math.sqrt(shape[0])
            else:
                x = name.endswith("/scale") + 0.1 * x
            if "/affine_update/" in name or "/quat_rigid/" in name:
                x = 0.2 * x  # a residue goes a few Å and turns by tens of degrees in a layer
            arrays[name] = x.astype(dtype)
        return cls(arrays, config)

    @classmethod
    def from_haiku(cls, params: Mapping[str, Any], *, root: str | None = None, config: Config | None = None) -> Weights:
        """Takes one module out of haiku parameters, {module: {leaf: array}} or AlphaFold's {'module//leaf': array}.

        The structure module, or where there is none the attention, or else the confidence head, is found by a parameter
        of its own; all that lies outside its path belongs to other parts of the model. Its path is kept: `to_haiku()`
        gives back the same tree.

        Args:
            params: arrays of numpy or JAX.
            root: path of the module, where there are several or another is meant.
            config: overrides what the names and shapes say; a module of its kind is looked for.

        Raises:
            ValueError: no such module, several and no root, or parameters that do not fit.
        """
        flat: dict[str, Any] = {}
        for module, leaves in params.items():
            if isinstance(leaves, Mapping):
                flat |= {_join(module, leaf): x for leaf, x in leaves.items()}
            else:
                flat[module.replace("//", "/")] = leaves
        root = _find_root(flat, "/", root, config)
        arrays = {name: np.asarray(flat[key]) for name, key in _below(flat, root, "/").items()}
        return cls(arrays, config or _config_of(arrays), root)

    @classmethod
    def from_torch(
        cls, state_dict: Mapping[str, Tensor], *, root: str | None = None, config: Config | None = None
    ) -> Weights:
        """Takes one module out of a torch state dict with AlphaFold's names, alone or under a prefix.

        Args:
            state_dict: tensors or parameters on any device.
            root: prefix of the module ("" for none), where there are several or another is meant.
            config: overrides what the names and shapes say; a module of its kind is looked for.

        Raises:
            ValueError: no such module, several and no root, entries that are no tensors, or parameters that do not fit.
        """
        root = _find_root(state_dict, ".", root, config)
        tensors = {name: state_dict[key] for name, key in _below(state_dict, root, ".").items()}
        other = [f"{name} ({type(x).__name__})" for name, x in tensors.items() if not hasattr(x, "detach")]
        if other:
            raise ValueError(f"tensors were expected, as module.state_dict() gives them; got {', '.join(other)}")
        return cls._from_torch_arrays({name: numpy_array(x) for name, x in tensors.items()}, config)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, root: str | None = None, config: Config | None = None) -> Weights:
        """Reads one module from .npz, .safetensors or .pt, in AlphaFold's `module//leaf` names or torch's.

        That is the structure module, or where there is none the attention, or else the confidence head. Only its own
        arrays are read, be the file a whole AlphaFold's. Where it lay in the file is the file's affair: `to_haiku()`
        gives what `ipa_jax.transform_structure_module(config).apply`, `transform_ipa`'s or `transform_predicted_lddt`'s
        takes.

        Args:
            path: the file.
            root: path of the module in the file, where there are several or another is meant.
            config: overrides what the file's metadata, or names and shapes, say; a module of its kind is looked for.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged or pickled file, no such module, several and no root, or parameters that do not fit.
        """
        with open_arrays(path) as file:
            haiku = any("//" in key for key in file.keys)
            keys = {key.replace("//", "/"): key for key in file.keys}
            separator = "/" if haiku else "."
            root = _find_root(keys, separator, root, config, source=os.fspath(path))
            arrays = {name: file[keys[key]] for name, key in _below(keys, root, separator).items()}
            config = config or _config_from_metadata(file.metadata, path)
        return cls(arrays, config or _config_of(arrays)) if haiku else cls._from_torch_arrays(arrays, config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes .npz in AlphaFold's form (`root/module//leaf`), or .safetensors or .pt in torch's names and layout.

        .safetensors also carries the config; the others warn where `load` would take something else for granted.
        The file is replaced in one step, or left as it was.

        Raises:
            ValueError: another suffix, or bfloat16 into .npz, which cannot hold it.
        """
        if not os.fspath(path).endswith(".safetensors"):
            self._warn_of_what_is_forgotten(path)
        if os.fspath(path).endswith(".npz"):
            write_arrays(path, {_join(*_split(_join(self.root, name)), "//"): x for name, x in self.arrays.items()})
        else:
            metadata = {_METADATA_KEY: json.dumps(dataclasses.asdict(self.config))}
            write_arrays(path, self._in_torch_layout(), metadata)

    def subtree(self, path: str) -> Weights:
        """One module out of a larger one, as "fold_iteration/invariant_point_attention" of a structure module.

        Raises:
            ValueError: no known module at that path.
        """
        return Weights.from_haiku({_join(*_split(name), "//"): x for name, x in self.arrays.items()}, root=path)._alone(
            self.config
        )

    def to_haiku(self, *, root: str | None = None) -> dict[str, dict[str, np.ndarray]]:
        """Haiku parameters, {module: {leaf: array}}, under `root` or where they came from."""
        tree: dict[str, dict[str, np.ndarray]] = {}
        for name, x in self.arrays.items():
            module, leaf = _split(_join(self.root if root is None else root, name))
            tree.setdefault(module, {})[leaf] = x
        return tree

    def to_torch(self) -> dict[str, Tensor]:
        """The state dict of the torch module of that config, tensors with memory of their own."""
        return {name: torch_tensor(x) for name, x in self._in_torch_layout().items()}

    def astype(self, dtype: DTypeLike) -> Weights:
        """The same parameters rounded to another dtype."""
        rounded = numpy_dtype(dtype)
        return dataclasses.replace(self, arrays={name: x.astype(rounded) for name, x in self.arrays.items()})

    def _alone(self, whole: Config) -> Weights:
        """The same under its own name, with what its names and shapes do not tell from the config of the whole."""
        config = whole.ipa if isinstance(whole, StructureModuleConfig) else whole
        return Weights(self.arrays, config)

    def _warn_of_what_is_forgotten(self, path: str | os.PathLike[str]) -> None:
        inferred, told = (_functional(config) for config in (_config_of(self.arrays), self.config))
        forgotten = [f"{name} is {x!r}, not {inferred[name]!r}" for name, x in told.items() if x != inferred[name]]
        if forgotten:
            warnings.warn(
                f"{os.fspath(path)} cannot say that {'; that '.join(forgotten)}, as Weights.load will believe: pass it "
                f"config=, or save as .safetensors",
                stacklevel=3,
            )

    def _in_torch_layout(self) -> dict[str, np.ndarray]:
        return {
            torch_name(name): np.ascontiguousarray(x.reshape(len(x), -1).T if x.ndim > 1 else x)
            if name.endswith("/weights")
            else x.reshape(-1)
            for name, x in self.arrays.items()
        }

    @classmethod
    def _from_torch_arrays(cls, arrays: Mapping[str, np.ndarray], config: Config | None) -> Weights:
        arrays = _from_torch_layout(arrays)
        config = config or _config_of(arrays)
        return cls(_unflatten_outputs(arrays, parameter_shapes(config)), config)


def torch_name(name: str) -> str:
    """The torch parameter of a canonical name: `/` → `.`, `weights` and `scale` → `weight`, `offset` → `bias`."""
    *modules, leaf = name.split("/")
    return ".".join([*modules, {"weights": "weight", "scale": "weight", "offset": "bias"}.get(leaf, leaf)])


def canonical_from_haiku(params: Mapping[str, Mapping[str, Any]], root: str) -> dict[str, Any]:
    """Leaves of a haiku tree under canonical names, those below the root."""
    flat = {_join(module, leaf): x for module, leaves in params.items() for leaf, x in leaves.items()}
    return {name: flat[key] for name, key in _below(flat, root, "/").items()}


def canonical_from_torch(arrays: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Arrays under torch names and in torch's layout, under canonical names and in haiku's."""
    return _unflatten_outputs(_from_torch_layout(arrays), parameter_shapes(config))


def _config_of(arrays: Mapping[str, np.ndarray]) -> Config:
    return infer_config({name: x.shape for name, x in arrays.items()})


def _functional(config: Config) -> dict[str, Any]:
    """The fields that say what a trained module computes: all but how it begins and is trained."""
    fields = dataclasses.asdict(config)
    fields |= fields.pop("ipa", {})
    return {name: x for name, x in fields.items() if name not in ("point_weight_init", "zero_init", "dropout")}


def _from_torch_layout(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Canonical names and inputs-first weights of arrays under torch names; output axes stay flat."""
    canonical = {}
    for name, x in arrays.items():
        *modules, leaf = name.split(".")
        if modules and modules[-1].endswith("layer_norm"):
            leaf = {"weight": "scale", "bias": "offset"}.get(leaf, leaf)
        leaf = "weights" if leaf == "weight" else leaf
        canonical["/".join([*modules, leaf])] = x.T if leaf == "weights" and x.ndim == 2 else x
    return canonical


def _unflatten_outputs(arrays: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, np.ndarray]:
    """Arrays with their output axes as the manifest has them, where the sizes allow it; others as they are."""

    def unflatten(name: str, x: np.ndarray) -> np.ndarray:
        shape = shapes[name]
        inputs = 1 if name.endswith("/weights") else 0
        flat = (*shape[:inputs], math.prod(shape[inputs:]))
        return x.reshape(shape) if x.shape == flat else x

    return {name: unflatten(name, x) if name in shapes else x for name, x in arrays.items()}


def _find_root(
    keys: Iterable[str], separator: str, root: str | None, config: Config | None, source: str = "these parameters"
) -> str:
    """The path of the one module among the keys that is meant, or the given one."""
    found: dict[type, list[str]] = {}
    for kind, landmark in LANDMARKS.items():
        name = landmark if separator == "/" else torch_name(landmark)
        ends = (key for key in keys if (separator + key).endswith(separator + name))
        found[kind] = [key.removesuffix(name).removesuffix(separator) for key in ends]
    kinds = [kind for kind in found if config is None or isinstance(config, kind)]
    if root is not None:
        roots = [path for kind in kinds for path in found[kind]]
        if root not in roots:
            raise ValueError(f"no module at root={root!r} in {source}; there is {roots or 'none'}")
        return root
    present = next((kind for kind in kinds if found[kind]), None)
    if present is None:
        some, ends_in = ", ".join(sorted(keys)[:5]), " or ".join(LANDMARKS[kind] for kind in kinds)
        known = " or ".join(_KINDS[kind] for kind in kinds)
        raise ValueError(f"no {known} in {source}: no name ends in {ends_in}; names are {some}, …")
    roots = found[present]
    if len(roots) > 1:
        listed = ", ".join(map(repr, roots))
        raise ValueError(f"{len(roots)} {_KINDS[present]} in {source}: choose with root=, one of {listed}")
    return roots[0]


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
    return x.dtype.kind == "f" or x.dtype.name == "bfloat16"


def _frozen_copy(x: ArrayLike) -> np.ndarray:
    copy = np.array(x, order="C")
    copy.flags.writeable = False
    return copy


def _config_from_metadata(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> Config | None:
    if _METADATA_KEY not in metadata:
        return None
    try:
        fields = json.loads(metadata[_METADATA_KEY])
        if "ipa" in fields:
            return StructureModuleConfig(**{**fields, "ipa": IPAConfig(**fields["ipa"])})
        return PredictedLDDTConfig(**fields) if "num_bin" in fields else IPAConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its {_METADATA_KEY} metadata is no config ({error}): pass config=") from error
