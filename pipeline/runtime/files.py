"""Files that are absent, the old one, or whole; and JSON in them."""

import errno
import json
import os
import uuid
from pathlib import Path
from typing import Any

from upath import UPath

from pipeline.errors import StorageError

Manifest = dict[str, Any]
"""What a stage says of what it made: JSON."""


def write_atomic(path: Path | UPath, data: bytes | str, *, durable: bool = True) -> None:
    """Write a file that is either absent, the old one, or whole. On an object store one put already
    is. Raises StorageError, and leaves nothing behind, if the disk is full or fails.

    On a local disk that holds after a loss of power, too, unless `durable` is False: for files that
    are many and can be made again.
    """
    raw = data.encode() if isinstance(data, str) else data
    temporary: Path | None = None
    try:
        if isinstance(path, Path):
            # Not the process's number: in containers that share a directory it may be the same.
            temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")
            with temporary.open("wb") as file:
                file.write(raw)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
            if durable:
                sync(path.parent)
        else:
            path.write_bytes(raw)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Have a file's bytes, or a directory's names, on the disk before anything else happens. File
    systems that cannot sync a directory keep an order of their own.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path | UPath) -> Any:
    """The JSON in a file, or None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
