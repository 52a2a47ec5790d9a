"""Where a node keeps its stores, the locks on them, and how they are removed."""

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
    """The directory of this node's stores: `local_directory`, in which $NAMES are those of the
    node's environment; else the shards' own if that is on a disk of this machine; else one below
    $TMPDIR, which Slurm, for instance, sets to a node's scratch.
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
        raise StoreError(f"{root} is somebody else's; --runtime.local_directory names another")
    return root


def _on_network(path: Path) -> bool:
    """Whether a path is on a file system that other machines share (known on Linux alone)."""
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
    """Whether this process has the lock, which it loses when it ends, however it does."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """Keep `clean` from removing a store that is being made."""
    lock = directory / "users.lock"
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            if lock.exists():  # it was not removed meanwhile
                yield
                return


def clean(root: Path) -> list[tuple[Path, int]]:
    """Remove all stores in a directory but those that are being made; returns (path, bytes) of
    each. A process that has opened one keeps what it has opened.
    """
    removed = []
    for directory in sorted(root.glob(f"{PREFIX}*")):
        with locked(directory / "users.lock", wait=False) as got:
            if got:
                size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
                shutil.rmtree(directory)
                removed.append((directory, size))
    return removed
