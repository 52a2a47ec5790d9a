"""Node-local stores: their location, locks, and removal."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

from pipeline.errors import StoreError

PREFIX = "ncfm-store-"
NETWORK_FILE_SYSTEMS = ("9p", "afs", "beegfs", "ceph", "cifs", "fuse", "gpfs", "lustre", "nfs",
    "panfs", "smb", "virtiofs", "wekafs")  # fmt: skip


def store_root(cache: UPath, local_directory: str | None) -> Path:
    """The directory of this node's stores: `local_directory`, with the node's environment variables
    expanded; else the shards' own if it is on a local disk; else one below $TMPDIR (which Slurm,
    for instance, sets to a node's scratch).
    """
    if local_directory is not None:
        expanded = os.path.expandvars(local_directory)
        if "$" in expanded:
            raise StoreError(f"runtime.local_directory {expanded}: not set on this node")
        return Path(expanded).expanduser().absolute()
    if isinstance(cache, Path) and not _on_network(cache.absolute()):
        return cache.absolute()
    root = Path(tempfile.gettempdir()) / f"ncfm-ray-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise StoreError(
            f"{root} belongs to another user; set --runtime.local_directory to another directory"
        )
    return root


def _on_network(path: Path) -> bool:
    """Whether a path is on a network file system (detected on Linux only)."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    real, kind, longest = path.resolve(), "", -1
    for _, mounted, fstype, *_ in mounts:
        place = Path(mounted.replace("\\040", " "))
        if real.is_relative_to(place) and len(place.parts) >= longest:
            kind, longest = fstype, len(place.parts)
    return kind.startswith(NETWORK_FILE_SYSTEMS) and kind != "fuseblk"  # which is NTFS


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a file lock; yields whether it was acquired. Released when the process ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """Protect a store that is being built from `clean`."""
    lock = directory / "users.lock"
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            if lock.exists():  # else it was removed meanwhile: try again
                yield
                return


def clean(root: Path) -> list[tuple[Path, int]]:
    """Remove all stores in a directory, except those being built; returns (path, bytes) of each.
    Processes keep the memory maps they have opened.
    """
    removed = []
    for directory in sorted(root.glob(f"{PREFIX}*")):
        with locked(directory / "users.lock", wait=False) as got:
            if got:
                size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
                shutil.rmtree(directory)
                removed.append((directory, size))
    return removed
