"""Safe writing of files: unsuitable destinations are refused, and existing files are replaced in one step."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def check_destination(path: Path, *, replace: bool) -> None:
    """Checks that a file can be written to a path.

    Raises:
        ValueError: the path exists and `replace` is False, or it is a link, a directory or a device.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link, which would be replaced: name the file it points to")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be an ordinary file; it is a directory, a device or the like")
    if path.exists() and not replace:
        raise ValueError(f"{path} exists, and is not to be replaced")


@contextmanager
def replacing(path: Path, replace: bool = True) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path`, which replaces `path` once it is complete and on disk."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder: {path.parent}")
    beside = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(beside, "xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        if replace:
            os.replace(beside, path)
        else:
            try:
                os.link(beside, path)  # fails if the path exists by now
            except FileExistsError:
                raise ValueError(f"{path} exists, and is not to be replaced") from None
            except OSError:  # the file system has no links
                check_destination(path, replace=False)
                os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
