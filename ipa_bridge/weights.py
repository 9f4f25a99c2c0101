"""One model's parameters as named numpy arrays, to and from a haiku tree, a torch state dict and files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ipa_bridge.config import IPAConfig
from ipa_bridge.files import open_arrays, write_arrays
from ipa_bridge.parameters import Shapes, ipa_parameters
from ipa_bridge.tensors import numpy_array, numpy_dtype, torch_tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike
    from torch import Tensor

IPA_ROOT = "invariant_point_attention"
"""The haiku module path of an attention on its own, as `ipa_jax.transform_ipa` makes it."""

_LANDMARK = "trainable_point_weights"
_METADATA_KEY = "ipa_config"


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters of one invariant point attention.

    Attributes:
        arrays: canonical name (AlphaFold's haiku name below the attention) to array in haiku's shape; read-only
            copies, which no later step of training and no later change of a file reaches.
        config: the config they fit.
        root: the haiku path of the attention, under which `to_haiku` and an .npz put them.

    Raises:
        ValueError: missing, extra, misshapen, non-float or non-finite parameters, each named.
    """

    arrays: Mapping[str, np.ndarray]
    config: IPAConfig
    root: str = IPA_ROOT

    def __post_init__(self) -> None:
        _check(self.arrays, ipa_parameters(self.config))
        object.__setattr__(self, "arrays", {name: _frozen_copy(x) for name, x in self.arrays.items()})

    @classmethod
    def random(cls, config: IPAConfig, *, seed: int = 0, dtype: DTypeLike = np.float32) -> Weights:
        """Seeded parameters of the size of trained ones, no array at its initial value.

        AlphaFold's own initialisation ends in zeros, on which every comparison succeeds.
        """
        rng = np.random.default_rng(seed)
        arrays = {}
        for name, shape in ipa_parameters(config).items():
            x = rng.standard_normal(shape)
            if name == _LANDMARK:
                x = config.point_weight_init + 0.3 * x
            else:
                x = x / math.sqrt(shape[0]) if name.endswith("/weights") else 0.1 * x
            arrays[name] = x.astype(dtype)
        return cls(arrays, config)

    @classmethod
    def from_haiku(
        cls, params: Mapping[str, Any], *, root: str | None = None, config: IPAConfig | None = None
    ) -> Weights:
        """Takes one attention out of haiku parameters, {module: {leaf: array}} or AlphaFold's {'module//leaf': array}.

        The attention is found by its own parameter, `trainable_point_weights`; all that lies outside its path
        belongs to other parts of the model. Its path is kept: `to_haiku()` gives back the same tree.

        Args:
            params: arrays of numpy or JAX.
            root: path of the attention, where there are several.
            config: overrides what the names and shapes say.

        Raises:
            ValueError: no attention, several and no root, or parameters that do not fit.
        """
        flat: dict[str, Any] = {}
        for module, leaves in params.items():
            if isinstance(leaves, Mapping):
                flat |= {_join(module, leaf): x for leaf, x in leaves.items()}
            else:
                flat[module.replace("//", "/")] = leaves
        root = _find_root(flat, "/", root)
        arrays = {name: np.asarray(flat[key]) for name, key in _below(flat, root, "/").items()}
        return cls(arrays, config or _config_of(arrays), root)

    @classmethod
    def from_torch(
        cls, state_dict: Mapping[str, Tensor], *, root: str | None = None, config: IPAConfig | None = None
    ) -> Weights:
        """Takes one attention out of a torch state dict with AlphaFold's names, alone or under a prefix.

        Args:
            state_dict: tensors or parameters on any device.
            root: prefix of the attention ("" for none), where there are several.
            config: overrides what the names and shapes say.

        Raises:
            ValueError: no attention, several and no root, entries that are no tensors, or parameters that do not fit.
        """
        root = _find_root(state_dict, ".", root)
        tensors = {name: state_dict[key] for name, key in _below(state_dict, root, ".").items()}
        other = [f"{name} ({type(x).__name__})" for name, x in tensors.items() if not hasattr(x, "detach")]
        if other:
            raise ValueError(f"tensors were expected, as module.state_dict() gives them; got {', '.join(other)}")
        return cls._from_torch_arrays({name: numpy_array(x) for name, x in tensors.items()}, config)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, root: str | None = None, config: IPAConfig | None = None) -> Weights:
        """Reads one attention from .npz, .safetensors or .pt, in AlphaFold's `module//leaf` names or torch's.

        Only its own arrays are read, be the file a whole AlphaFold's. Where it lay in the file is the file's affair:
        `to_haiku()` gives what `ipa_jax.transform_ipa(config).apply` takes.

        Args:
            path: the file.
            root: path of the attention in the file, where there are several.
            config: overrides what the file's metadata, or the names and shapes, say.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged or pickled file, no attention, several and no root, or parameters that do not fit.
        """
        with open_arrays(path) as file:
            haiku = any("//" in key for key in file.keys)
            keys = {key.replace("//", "/"): key for key in file.keys}
            separator = "/" if haiku else "."
            root = _find_root(keys, separator, root, source=os.fspath(path))
            arrays = {name: file[keys[key]] for name, key in _below(keys, root, separator).items()}
            config = config or _config_from_metadata(file.metadata, path)
        return cls(arrays, config or _config_of(arrays)) if haiku else cls._from_torch_arrays(arrays, config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes .npz in AlphaFold's form (`root/module//leaf`), or .safetensors or .pt in torch's names and layout.

        .safetensors also carries the config; the others warn where `load` would take another norm for this one's.
        The file is replaced in one step, or left as it was.

        Raises:
            ValueError: another suffix, or bfloat16 into .npz, which cannot hold it.
        """
        if not os.fspath(path).endswith(".safetensors"):
            self._warn_of_forgotten_norm(path)
        if os.fspath(path).endswith(".npz"):
            write_arrays(path, {_join(*_split(_join(self.root, name)), "//"): x for name, x in self.arrays.items()})
        else:
            metadata = {_METADATA_KEY: json.dumps(dataclasses.asdict(self.config))}
            write_arrays(path, self._in_torch_layout(), metadata)

    def to_haiku(self, *, root: str | None = None) -> dict[str, dict[str, np.ndarray]]:
        """Haiku parameters, {module: {leaf: array}}, under `root` or where they came from."""
        tree: dict[str, dict[str, np.ndarray]] = {}
        for name, x in self.arrays.items():
            module, leaf = _split(_join(self.root if root is None else root, name))
            tree.setdefault(module, {})[leaf] = x
        return tree

    def to_torch(self) -> dict[str, Tensor]:
        """The state dict of `ipa_torch.InvariantPointAttention(config)`, tensors with memory of their own."""
        return {name: torch_tensor(x) for name, x in self._in_torch_layout().items()}

    def astype(self, dtype: DTypeLike) -> Weights:
        """The same parameters rounded to another dtype."""
        rounded = numpy_dtype(dtype)
        return dataclasses.replace(self, arrays={name: x.astype(rounded) for name, x in self.arrays.items()})

    def _warn_of_forgotten_norm(self, path: str | os.PathLike[str]) -> None:
        inferred = _config_of(self.arrays)
        ours, theirs = ((c.norm_form, c.norm_epsilon) for c in (self.config, inferred))
        if ours != theirs:
            warnings.warn(
                f"{os.fspath(path)} cannot say that the norm is {ours[0]!r} with ε = {ours[1]:g}: Weights.load will "
                f"take it for {theirs[0]!r} with {theirs[1]:g}. Pass it config=, or save as .safetensors",
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
    def _from_torch_arrays(cls, arrays: Mapping[str, np.ndarray], config: IPAConfig | None) -> Weights:
        arrays = _from_torch_layout(arrays)
        config = config or _config_of(arrays)
        return cls(_unflatten_outputs(arrays, ipa_parameters(config)), config)


def torch_name(name: str) -> str:
    """The torch parameter of a canonical name: `/` → `.`, `weights` and `scale` → `weight`, `offset` → `bias`."""
    *modules, leaf = name.split("/")
    return ".".join([*modules, {"weights": "weight", "scale": "weight", "offset": "bias"}.get(leaf, leaf)])


def canonical_from_haiku(params: Mapping[str, Mapping[str, Any]], root: str) -> dict[str, Any]:
    """Leaves of a haiku tree under canonical names, those below the root."""
    flat = {_join(module, leaf): x for module, leaves in params.items() for leaf, x in leaves.items()}
    return {name: flat[key] for name, key in _below(flat, root, "/").items()}


def canonical_from_torch(arrays: Mapping[str, np.ndarray], config: IPAConfig) -> dict[str, np.ndarray]:
    """Arrays under torch names and in torch's layout, under canonical names and in haiku's."""
    return _unflatten_outputs(_from_torch_layout(arrays), ipa_parameters(config))


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> IPAConfig:
    """The config that canonical names and shapes tell, output axes flat or not.

    What they cannot tell is taken from the system that has such parameters: AlphaFold 2 for the monomer layout, for
    the multimer layout AlphaFold-Multimer where points have biases and `invariant-point-attention` where not.

    Raises:
        ValueError: parameters are missing or empty, or sizes do not divide by the number of heads.
    """
    multimer = any(name.startswith("q_scalar_projection/") for name in shapes)
    scalars = ("q_scalar_projection", "v_scalar_projection") if multimer else ("q_scalar", "kv_scalar")
    points = ("q_point_projection/point_projection", "v_point_projection/point_projection")
    points = points if multimer else ("q_point_local", "kv_point_local")
    needed = [_LANDMARK, *(f"{name}/weights" for name in (*scalars, *points, "output_projection"))]
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(f"no invariant point attention without {', '.join(missing)}; got {', '.join(sorted(shapes))}")
    sized = [name for name in (*needed, "attention_2d/weights") if name in shapes]
    formless = [name for name in sized if 0 in shapes[name] or len(shapes[name]) < 1 + name.endswith("/weights")]
    if formless:
        listed = ", ".join(f"{name} {shapes[name]}" for name in formless)
        raise ValueError(f"these parameters tell no sizes: they are empty, or have too few axes: {listed}")
    heads = math.prod(shapes[_LANDMARK])

    def per_head(module: str, per: int = 1) -> int:
        outputs = math.prod(shapes[f"{module}/weights"][1:])
        if outputs % (heads * per):
            raise ValueError(
                f"{module}/weights has {outputs} outputs, which {heads} heads"
                + (f" of {per} coordinates" if per > 1 else "")
                + f" do not divide: {_LANDMARK} or {module}/weights has a wrong shape"
            )
        return outputs // (heads * per)

    qk, v = (per_head(name) for name in scalars)
    p_qk, p_v = (per_head(name, 3) for name in points)
    point_bias = f"{points[0]}/bias" in shapes
    preset = IPAConfig.alphafold2()
    if multimer:
        preset = IPAConfig.alphafold_multimer() if point_bias else IPAConfig.lucidrains(1)
    return dataclasses.replace(
        preset,
        num_channel=shapes[f"{scalars[0]}/weights"][0],
        pair_channel=shapes["attention_2d/weights"][0] if "attention_2d/weights" in shapes else None,
        num_head=heads,
        num_scalar_qk=qk,
        num_scalar_v=v if multimer else v - qk,
        num_point_qk=p_qk,
        num_point_v=p_v if multimer else p_v - p_qk,
        scalar_bias=f"{scalars[0]}/bias" in shapes,
        point_bias=point_bias,
    )


def _config_of(arrays: Mapping[str, np.ndarray]) -> IPAConfig:
    return infer_config({name: x.shape for name, x in arrays.items()})


def _from_torch_layout(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Canonical names and inputs-first weights of arrays under torch names; output axes stay flat."""
    canonical = {}
    for name, x in arrays.items():
        *modules, leaf = name.split(".")
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


def _find_root(keys: Iterable[str], separator: str, root: str | None, source: str = "these parameters") -> str:
    """The path of the one attention among the keys, or the given one."""
    end = separator + _LANDMARK
    roots = [key.removesuffix(_LANDMARK).removesuffix(separator) for key in keys if (separator + key).endswith(end)]
    if root is not None:
        if root not in roots:
            raise ValueError(f"no attention at root={root!r} in {source}; there is {roots or 'none'}")
        return root
    if not roots:
        some = ", ".join(sorted(keys)[:5])
        raise ValueError(f"no invariant point attention in {source}: no name ends in {_LANDMARK}; names are {some}, …")
    if len(roots) > 1:
        raise ValueError(
            f"{len(roots)} attentions in {source}: choose with root=, one of {', '.join(map(repr, roots))}"
        )
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


def _config_from_metadata(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> IPAConfig | None:
    if _METADATA_KEY not in metadata:
        return None
    try:
        return IPAConfig(**json.loads(metadata[_METADATA_KEY]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its {_METADATA_KEY} metadata is no IPAConfig ({error}): pass config=") from error
