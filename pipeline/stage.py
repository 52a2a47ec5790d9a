"""A stage: configuration and inputs -> fingerprint -> directory -> manifest, written last.

A stage whose manifest carries the wanted fingerprint is not run again. The manifest is removed
before anything in its directory changes: a stage that was cut off has none and is run again over
what it left, of which it may use what it knows to be its own.
"""

import dataclasses
import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from upath import UPath

from pipeline.image_files import StorageError

Manifest = dict[str, Any]


class StageError(Exception):
    """A stage cannot be completed; the message is one line that says why."""


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


def fingerprint(*parts: object) -> str:
    """16 hex digits that change when any part does: dataclasses, strings, numbers, lists and
    dictionaries of them.
    """
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]


def canonical_json(value: object) -> str:
    """JSON with sorted keys; dataclasses as their fields."""
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"cannot fingerprint a {type(value).__name__}: {value!r}")


def run_stage(
    name: str,
    directory: UPath,
    identity: str,
    build: Callable[[], Manifest],
    *,
    log: Callable[[str], None] = print,
) -> Manifest:
    """Run `build` in `directory`, unless the manifest there says that this very thing exists;
    returns the manifest.

    `identity` is the fingerprint of everything the result depends on.
    """
    path = directory / "manifest.json"
    found = read_json(path)
    if found is not None and found.get("fingerprint") == identity:
        log(f"[{name}] reusing {directory}")
        return {**found, "reused": True}
    directory.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # before `build` changes what it vouches for
    log(f"[{name}] {directory}")
    started = time.monotonic()
    built = build()
    manifest = {
        **built,
        "stage": name,
        "fingerprint": identity,
        "seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": max(peak_rss_bytes(), built.get("peak_rss_bytes", 0)),
        "reused": False,
    }
    write_atomic(path, json.dumps(manifest, indent=1))
    log(f"[{name}] done in {manifest['seconds']:.1f} s")
    return manifest


def peak_rss_bytes() -> int:
    """The largest resident memory that this process has had."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def code_versions() -> dict[str, str]:
    """What a result was made with: packages, Python, and the state of the git checkout if there is
    one.
    """
    packages = ("ncfm-ray", "ray", "torch", "torchvision", "numpy")
    versions = {"python": sys.version.split()[0]}
    for package in packages:
        versions[package] = (
            version(package) if _installed(package) else "not installed (run from its source tree)"
        )
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        versions["git"] = f"unknown ({error})"
    else:
        versions["git"] = done.stdout.strip() or "not a git checkout"
    return versions


def _installed(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
