"""Reading and writing flat {name: array} files: .npz, .safetensors and .pt, lazily read and never unpickled."""

from __future__ import annotations

import io
import math
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ipa_bridge.destinations import check_destination, replacing
from ipa_bridge.weights.tensors import import_torch, numpy_array, torch_tensor

SUFFIXES = (".npz", ".safetensors", ".pt", ".pth", ".ckpt", ".bin")


@dataclass(frozen=True)
class ArrayFile:
    """An open file: names and metadata are read at once, each array only when it is accessed."""

    path: Path
    keys: tuple[str, ...]
    metadata: Mapping[str, str]
    _read: Callable[[str], np.ndarray]
    _shape: Callable[[str], tuple[int, ...]]
    ignored: tuple[str, ...] = ()
    """Names of entries that are not arrays."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns the shape of one array without reading the array.

        Raises:
            ValueError: the entry is not an array of numbers, or the file is damaged.
        """
        with _plain_errors(self.path, f"array {key!r}"):
            return self._shape(key)

    def __getitem__(self, key: str) -> np.ndarray:
        """Reads one array.

        Raises:
            ValueError: the array cannot be read without unpickling, or the file is damaged.
        """
        with _plain_errors(self.path, f"array {key!r}"):
            return self._read(key)


@contextmanager
def open_arrays(path: str | os.PathLike[str]) -> Iterator[ArrayFile]:
    """Opens a file of arrays for reading; its suffix sets the format.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the suffix is unknown, or the file is damaged or can only be read by unpickling.
    """
    path = Path(path)
    opener = {".npz": _open_npz, ".safetensors": _open_safetensors}
    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    opened = opener.get(suffix, _open_torch)(path)
    with _plain_errors(path, "file"):
        file = opened.__enter__()
    try:
        yield file
    finally:
        opened.__exit__(None, None, None)


def write_arrays(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    replace: bool = True,
) -> None:
    """Writes a file of arrays; its suffix sets the format.

    The arrays go to a temporary file first, which then replaces the destination in one step.

    Args:
        path: destination; an existing file is left as it was if anything fails.
        replace: False to refuse an existing file, even one that appears while the arrays are written.
        arrays: arrays by name.
        metadata: short texts to store with the arrays; only .safetensors can store them.

    Raises:
        ValueError: the suffix is unknown, the format cannot hold an array without pickling, the destination exists and
            `replace` is False, or the destination is a link, a directory or a device.
    """
    path = Path(path)
    suffix = _suffix(path)
    check_destination(path, replace=replace)
    if suffix == ".npz" and any(x.dtype.name == "bfloat16" for x in arrays.values()):
        raise ValueError(f"{path}: .npz cannot hold bfloat16; cast to float32, or write .safetensors or .pt")
    with replacing(path, replace) as handle:
        if suffix == ".npz":
            with zipfile.ZipFile(handle, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name, x in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.asarray(x), allow_pickle=False)
        elif suffix == ".safetensors":
            from safetensors.numpy import save

            contiguous = {name: np.asarray(x, order="C") for name, x in arrays.items()}
            handle.write(save(contiguous, metadata=None if metadata is None else dict(metadata)))
        else:
            torch = import_torch()

            whole = io.BytesIO()  # torch.save into the file itself raises an obscure error on a full disk
            torch.save({name: torch_tensor(x) for name, x in arrays.items()}, whole)
            handle.write(whole.getbuffer())


@contextmanager
def _open_npz(path: Path) -> Iterator[ArrayFile]:
    with open(path, "rb") as handle:
        archive = np.load(handle, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds one bare array and no names: save it with numpy.savez")
        with archive:
            archive_zip = cast(zipfile.ZipFile, archive.zip)
            members = archive_zip.namelist()
            twice = [name for name, number in Counter(members).items() if number > 1]
            if twice:
                raise ValueError(f"{twice[0]!r} occurs twice")

            def shape(name: str) -> tuple[int, ...]:
                if f"{name}.npy" not in members:
                    raise ValueError("it is not an .npy array")
                return _npy_shape(archive_zip, f"{name}.npy")

            def read(name: str) -> np.ndarray:
                shape(name)  # raises if the header claims more bytes than there are
                return archive[name]

            yield ArrayFile(path, tuple(archive.files), {}, read, shape)


def _npy_shape(archive: zipfile.ZipFile, member: str) -> tuple[int, ...]:
    """The shape in a member's header; raises if the member has another number of bytes than the header implies."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version 1.0 or 2.0 of the .npy format was expected; got {version}")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        start = file.tell()
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    if dtype.kind not in "fiub":
        raise ValueError(f"an array of real numbers was expected; got {dtype}")
    size, there = math.prod(shape) * dtype.itemsize, archive.getinfo(member).file_size - start
    if size != there:
        raise ValueError(f"its header implies {size} bytes, but it has {there}: it is damaged")
    return shape


@contextmanager
def _open_safetensors(path: Path) -> Iterator[ArrayFile]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        yield ArrayFile(
            path,
            tuple(file.keys()),
            file.metadata() or {},
            file.get_tensor,
            lambda name: tuple(file.get_slice(name).get_shape()),
        )


@contextmanager
def _open_torch(path: Path) -> Iterator[ArrayFile]:
    torch = import_torch()
    with warnings.catch_warnings():  # about pickles and sparse tensors, which raise below
        warnings.simplefilter("ignore", UserWarning)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    if not isinstance(loaded, Mapping):
        raise ValueError(
            f"it holds a {type(loaded).__name__}: save a state dict, torch.save(module.state_dict(), path)"
        )
    tensors: dict[str, Any] = {}
    ignored: list[str] = []
    _flatten(loaded, "", tensors, ignored, set())

    def shape(name: str) -> tuple[int, ...]:
        x = tensors[name]
        if x.layout != torch.strided or x.is_quantized or x.device.type != "cpu":
            raise ValueError(f"a dense tensor was expected; got {x.layout} on {x.device.type}: save it dense")
        if x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError("its shape is larger than its storage: save it contiguous")
        return tuple(x.shape)

    if not tensors:
        raise ValueError(
            f"it holds no tensors, but {', '.join(ignored[:5]) or 'nothing'}: save a state dict, "
            f"torch.save(module.state_dict(), path)"
        )
    yield ArrayFile(
        path,
        tuple(tensors),
        {},
        lambda name: numpy_array(tensors[name]),
        shape,
        tuple(ignored),
    )


def _flatten(loaded: Mapping, prefix: str, tensors: dict[str, Any], ignored: list[str], seen: set[int]) -> None:
    """Collects the tensors of a checkpoint; the dictionaries that hold them (state_dict, ema, …) prefix their names.

    Entries in lists or under numbers, such as an optimiser's state, are ignored. A dictionary that occurs under several
    names is read under the first.
    """
    torch = import_torch()
    seen.add(id(loaded))
    for key, x in loaded.items():
        name = f"{prefix}{key}"
        if isinstance(x, torch.Tensor) and isinstance(key, str):
            if name in tensors:
                raise ValueError(f"{name!r} occurs twice")
            tensors[name] = x
        elif isinstance(x, Mapping) and isinstance(key, str) and id(x) not in seen:
            _flatten(x, f"{name}.", tensors, ignored, seen)
        else:
            ignored.append(name)


@contextmanager
def _plain_errors(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a reader raises on a damaged or pickled file into a ValueError that names the file."""
    try:
        yield
    except (FileNotFoundError, PermissionError, ImportError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        if "pickle" in str(error).lower() or "weights_only" in str(error).lower():
            # numpy and torch mistake any unknown bytes for a pickle.
            reason = (
                "it may be damaged, or it holds pickled objects, which are never loaded here: save plain arrays with "
                "numpy.savez, safetensors, or torch.save(module.state_dict(), path); from a checkpoint with other "
                'entries, use torch.save(checkpoint["state_dict"], path)'
            )
        elif not isinstance(error, ValueError):
            reason = f"it may be damaged ({type(error).__name__}: {reason})"
        raise ValueError(f"{path}: cannot read {what}: {reason}") from error


def _suffix(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        hint = ""
        if path.suffix in (".pkl", ".pickle"):
            hint = (
                ": pickles are never loaded, because they can run any code. If you trust this file, unpickle it "
                "yourself and save its haiku parameters with numpy.savez(path, **{f'{module}//{leaf}': x for module, "
                "leaves in params.items() for leaf, x in leaves.items()})"
            )
        raise ValueError(f"{path}: expected a name ending in {', '.join(SUFFIXES)}{hint}")
    return path.suffix
