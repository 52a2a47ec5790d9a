"""Atomic file writes, and JSON files."""

import errno
import json
import os
import uuid
from pathlib import Path
from typing import Any

from upath import UPath

from pipeline.errors import StorageError

Manifest = dict[str, Any]
"""A stage's description of its result, as JSON."""


def write_atomic(path: Path | UPath, data: bytes | str, *, durable: bool = True) -> None:
    """Write a file atomically: readers find it absent, old, or complete. A put to an object store
    is atomic already. Raises StorageError, leaving nothing behind, if the disk is full or fails.

    On a local disk this also holds after a power loss, unless `durable` is False (for many files
    that can be written again).
    """
    raw = data.encode() if isinstance(data, str) else data
    temporary: Path | None = None
    try:
        if isinstance(path, Path):
            # Not the PID: containers that share a directory may have equal ones.
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
    """fsync a file or a directory; ignored on file systems that cannot sync a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path | UPath) -> Any:
    """Parse a JSON file; None if it does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
