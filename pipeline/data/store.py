"""Node-local store: the real images of each class, decoded once, as a uint8 memory map.

An image passes from its source to a shard of one class (`pipeline.stages.shard`), to the store, to
batches by index (`pipeline.data.batches`). All processes of a node share a store through the page
cache: the kernel decides how much of it is in memory, and no batch depends on that.

    <root>/ncfm-store-<fingerprint of the shards' hashes>/<split>/<class>.u8    (N, C, H, W) uint8
                                                                  <class>.json  its index

The index is written last, when the images are on disk, and has their SHA-256. Images without an
index, or changed after it, are decoded again.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from upath import UPath

from ncfm.images import ImageSpec
from pipeline.data.local import PREFIX, in_use, locked, store_root
from pipeline.data.shards import read_shard
from pipeline.data.sources import Split
from pipeline.errors import ShardError, StorageError, StoreError
from pipeline.observe.progress import Progress
from pipeline.runtime.files import Manifest, read_json, write_atomic
from pipeline.runtime.identity import fingerprint

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

LAYOUT = 1
BLOCK_BYTES = 2**20  # decoded before they are written


@dataclass(frozen=True)
class Store:
    """The real images of a data set on this node; missing classes are decoded on first access."""

    shards: UPath
    manifest: Manifest  # of the shards
    local_directory: str | None = None

    @property
    def spec(self) -> ImageSpec:
        """Shape, normalisation and class names."""
        m = self.manifest
        return ImageSpec(
            channels=m["channels"],
            image_size=m["image_size"],
            mean=tuple(m["mean"]),
            std=tuple(m["std"]),
            class_names=tuple(m["class_names"]),
        )

    @property
    def directory(self) -> Path:
        """Directory of the store on this node, named by the shards' contents."""
        parts = [self.manifest[key] for key in ("channels", "image_size", "splits")]
        name = PREFIX + fingerprint("store", LAYOUT, *parts)
        return store_root(self.shards.parent, self.local_directory) / name

    def counts(self, split: Split) -> list[int]:
        """Images of each class."""
        return list(self.manifest["splits"][split]["counts"])

    def images(self, split: Split, classes: Iterable[int] | None = None) -> dict[int, Tensor]:
        """Class -> its images (N, C, H, W) uint8, in the order of its shards; default: all classes.

        The images are memory maps. Missing classes are decoded first, by this process or by another
        that has started. Raises ShardError, and StoreError if the store cannot be written.
        """
        spec, counts, directory = self.spec, self.counts(split), self.directory
        wanted = range(spec.num_classes) if classes is None else classes
        shape = (spec.channels, spec.image_size, spec.image_size)
        entries: dict[int, list[Manifest]] = {c: [] for c in wanted}
        for entry in self.manifest["splits"][split]["shards"]:
            entries.get(entry["class"], []).append(entry)
        files = {
            c: ClassFile(directory / split / f"{c:04d}.u8", (counts[c], *shape)) for c in entries
        }
        maps = {c: file.open() for c, file in files.items()}
        missing = {c: file for c, file in files.items() if maps[c] is None}
        if missing:
            with _making(directory, list(missing.values())) as report, in_use(directory):
                _make(self.shards, missing, entries, report)
                maps |= {c: file.open() for c, file in missing.items()}
        images = {c: image for c, image in maps.items() if image is not None}
        if len(images) < len(maps):
            raise StoreError(f"the store {directory} changed while it was built: start again")
        return images


@dataclass(frozen=True)
class ClassFile:
    """File of one class's images, with an index file that verifies them."""

    path: Path
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the images."""
        return math.prod(self.shape)

    @property
    def index(self) -> Path:
        """Path of the index: shape and SHA-256 of the images, written last."""
        return self.path.with_suffix(".json")

    @property
    def partial(self) -> Path:
        """Path of the file while it is written; left over if the process is killed."""
        return self.path.with_suffix(".tmp")

    def open(self) -> Tensor | None:
        """The images as a copy-on-write memory map; None if the index does not verify them."""
        if not self.bytes:
            return torch.empty(self.shape, dtype=torch.uint8)
        try:
            index, stat = read_json(self.index), self.path.stat()
        except (ValueError, OSError):  # no index, or a truncated one
            return None
        if not index or stat.st_size != self.bytes or index["shape"] != list(self.shape):
            return None
        images = np.memmap(self.path, np.uint8, "c", shape=self.shape)
        if stat.st_mtime_ns != index["mtime_ns"]:  # changed, or a copy
            if hashlib.sha256(images.data).hexdigest() != index["sha256"]:
                return None
            if os.access(self.path.parent, os.W_OK):
                self._write_index(index["sha256"])
        return torch.from_numpy(images)

    def make(
        self, shards: UPath, entries: Sequence[Manifest], report: Callable[[int], None]
    ) -> None:
        """Decode the class's shards. Raises ShardError, and OSError if it cannot be written."""
        if self.index.exists():
            logger.warning("%s is damaged: decoding it again", self.path)
            self.index.unlink()
        digest = hashlib.sha256()
        try:
            with self.partial.open("wb", buffering=0) as file:
                for entry in entries:
                    for block in decoded(shards, entry, self.shape[1:]):
                        digest.update(block.data)
                        _write_all(file, block)
                        report(len(block))
                os.fsync(file.fileno())
            self.partial.replace(self.path)
        except BaseException:
            self.partial.unlink(missing_ok=True)
            raise
        self._write_index(digest.hexdigest())

    def _write_index(self, sha256: str) -> None:
        index = {"shape": self.shape, "sha256": sha256, "mtime_ns": self.path.stat().st_mtime_ns}
        write_atomic(self.index, json.dumps(index))


def _make(
    shards: UPath,
    files: dict[int, ClassFile],
    entries: dict[int, list[Manifest]],
    report: Callable[[int], None],
) -> None:
    """Decode these classes in parallel. Those locked by another process come last, when it has
    finished or failed.
    """

    def make(c: int, *, wait: bool) -> bool:
        with locked(files[c].path.with_suffix(".lock"), wait=wait) as got:
            if got and files[c].open() is None:
                files[c].make(shards, entries[c], report)
        return got

    next(iter(files.values())).path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="store") as threads:
        try:
            done = dict(zip(files, threads.map(lambda c: make(c, wait=False), files), strict=True))
            list(threads.map(lambda c: make(c, wait=True), [c for c in done if not done[c]]))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def decoded(shards: UPath, entry: Manifest, shape: tuple[int, ...]) -> Iterator[Pixels]:
    """Decode a shard's images, in order, as blocks (n, C, H, W) uint8. Raises ShardError."""
    size = max(1, BLOCK_BYTES // math.prod(shape))
    block, filled, count = np.empty((size, *shape), np.uint8), 0, 0
    for suffix, data in read_shard(shards, entry):
        image = _decode(suffix, data, shape[0])
        if image.shape != shape:
            raise ShardError(f"shard {shards / entry['path']}: image {count} is {image.shape}")
        block[filled] = image
        filled, count = filled + 1, count + 1
        if filled == size:
            yield block
            filled = 0
    if count != entry["count"]:
        raise ShardError(
            f"shard {shards / entry['path']} holds {count} images, the manifest says "
            f"{entry['count']}"
        )
    if filled:
        yield block[:filled]


def _decode(suffix: str, data: bytes, channels: int) -> Pixels:
    """Decode one image to (C, H, W)."""
    if suffix == "npy":
        pixels = np.load(BytesIO(data), allow_pickle=False)
        stored: Pixels = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
        return stored
    from torchvision.io import ImageReadMode, decode_image  # 1.4 s to import

    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image: Pixels = decode_image(encoded, mode).numpy()
    return image


def _write_all(file: IO[bytes], block: Pixels) -> None:
    """Write a block completely; a single write may be partial when the disk fills up."""
    rest = block.data.cast("B")
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def _making(directory: Path, files: Sequence[ClassFile]) -> Iterator[Callable[[int], None]]:
    """Yield a progress callback for the number of decoded images. Converts OSError to a StoreError
    with the bytes needed and free.
    """
    needed, lock, done = sum(file.bytes for file in files), threading.Lock(), 0
    progress = Progress("store", sum(file.shape[0] for file in files), unit="images")
    progress.printed = progress.started  # a small store needs no line

    def report(images: int) -> None:
        nonlocal done
        with lock:
            done += images
            if progress.elapsed > progress.interval:
                progress.update(done)

    def error(reason: str) -> StoreError:
        above = next(p for p in (directory, *directory.parents) if p.exists())
        return StoreError(
            f"cannot write the store of real images in {directory}: {reason}; {needed:,} bytes are "
            f"needed, {shutil.disk_usage(above).free:,} are free there; "
            "set --runtime.local_directory to another directory"
        )

    try:
        directory.mkdir(parents=True, exist_ok=True)
        begun = sum(file.partial.stat().st_size for file in files if file.partial.exists())
        if needed - begun > shutil.disk_usage(directory).free:
            raise error("not enough disk space")
        yield report
    except StorageError:
        raise
    except OSError as failure:
        raise error(failure.strerror or str(failure)) from failure
