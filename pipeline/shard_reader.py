"""Shards of a directory, checked against their manifest and decoded, whole or in part."""

import hashlib
import io
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from upath import UPath

from ncfm.images import ImageSpec, InMemoryImages
from pipeline.sources import Split
from pipeline.stage import Manifest

BLOCK = 512  # of a tar file
DECODE_AT_ONCE = 64  # images that a thread takes


class ShardError(OSError):
    """A shard is missing or damaged; the message names the file and says what to do."""


class Member(NamedTuple):
    """Where an image lies in a shard."""

    offset: int
    size: int
    suffix: str


class ShardReader:
    """One shard. Its hash is checked when it is first read; safe to use from several threads."""

    def __init__(self, directory: UPath, entry: Manifest, spec: ImageSpec) -> None:
        self.directory, self.path, self.entry = directory, directory / entry["path"], entry
        self.label, self.count = int(entry["class"]), int(entry["count"])
        self.shape = (spec.channels, spec.image_size, spec.image_size)
        self._members: list[Member] | None = None
        self._lock = threading.Lock()

    def read(self, indices: Sequence[int], threads: ThreadPoolExecutor | None = None) -> Tensor:
        """The images (N, C, H, W) uint8 at these places of the shard, decoded in the threads.

        Raises ShardError.
        """
        images = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        self.read_into(images, range(len(indices)), indices, threads)
        return images

    def read_into(
        self,
        images: Tensor,
        rows: Sequence[int],
        indices: Sequence[int],
        threads: ThreadPoolExecutor | None = None,
    ) -> None:
        """Put the images at these places of the shard into those rows of (N, C, H, W) uint8.

        Raises ShardError.
        """
        # Copied by NumPy: torch would do it on all cores, which have the decoding to do.
        pixels = images.numpy()
        encoded = self._encoded(indices)

        def decode(start: int) -> None:
            for k in range(start, min(start + DECODE_AT_ONCE, len(encoded))):
                image = _decode(*encoded[k], channels=self.shape[0])
                if image.shape != self.shape:
                    raise self._error(f"image {indices[k]} has shape {tuple(image.shape)}")
                pixels[rows[k]] = image.numpy()

        for _ in (threads.map if threads else map)(decode, range(0, len(encoded), DECODE_AT_ONCE)):
            pass

    def _encoded(self, indices: Sequence[int]) -> list[tuple[Tensor, str]]:
        with self._lock:
            whole = self._check() if self._members is None else None
        members = self._members
        assert members is not None
        chosen = [members[index] for index in indices]
        if whole is None and 2 * len(indices) < self.count:
            with self.path.open("rb") as file:
                return [(_buffer(_read_at(file, m.offset, m.size)), m.suffix) for m in chosen]
        data = _buffer(self.path.read_bytes() if whole is None else whole)
        return [(data[m.offset : m.offset + m.size], m.suffix) for m in chosen]

    def _check(self) -> bytes:
        """Compare the file with the manifest and find its images; returns its bytes."""
        try:
            data: bytes = self.path.read_bytes()
        except FileNotFoundError as error:
            raise self._error("the file is missing") from error
        if len(data) != self.entry["bytes"]:
            raise self._error(f"it has {len(data)} bytes, the manifest says {self.entry['bytes']}")
        if hashlib.sha256(data).hexdigest() != self.entry["sha256"]:
            raise self._error("its SHA-256 is not the manifest's")
        members = [member for member in _members(data) if member.suffix != "cls"]
        if len(members) != self.count:
            raise self._error(f"it holds {len(members)} images, the manifest says {self.count}")
        self._members = members
        return data

    def _error(self, what: str) -> ShardError:
        return ShardError(
            f"shard {self.path} is damaged: {what}. Delete it and the manifest.json in "
            f"{self.directory}, then run the shard stage again: it writes what is missing"
        )


def _members(data: bytes) -> Iterable[Member]:
    """The files of a ustar archive. The tarfile module takes longer for it than the decoding."""
    offset = 0
    while offset + BLOCK <= len(data) and data[offset]:
        name = data[offset : offset + 100].split(b"\0", 1)[0].decode()
        size = int(data[offset + 124 : offset + 135], 8)
        yield Member(offset + BLOCK, size, name.partition(".")[2])
        offset += BLOCK + -(-size // BLOCK) * BLOCK


def _read_at(file: io.BufferedIOBase, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _buffer(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _decode(encoded: Tensor, suffix: str, *, channels: int) -> Tensor:
    if suffix == "npy":
        pixels = np.load(io.BytesIO(encoded.numpy().tobytes()), allow_pickle=False)
        return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
    from torchvision.io import ImageReadMode, decode_image  # 1.4 s, which the driver can do without

    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    image: Tensor = decode_image(encoded, mode)
    return image


class ShardSet:
    """The shards of a directory with their manifest."""

    def __init__(self, directory: UPath, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self.spec = ImageSpec(
            channels=manifest["channels"],
            image_size=manifest["image_size"],
            mean=tuple(manifest["mean"]),
            std=tuple(manifest["std"]),
            class_names=tuple(manifest["class_names"]),
        )

    @property
    def image_bytes(self) -> int:
        """Bytes of a decoded image."""
        return self.spec.channels * self.spec.image_size**2

    @cached_property
    def _readers(self) -> dict[str, list[ShardReader]]:
        return {
            split: [ShardReader(self.directory, entry, self.spec) for entry in part["shards"]]
            for split, part in self.manifest["splits"].items()
        }

    def counts(self, split: Split) -> list[int]:
        """Images of each class."""
        return list(self.manifest["splits"][split]["counts"])

    def readers(self, split: Split, classes: Iterable[int] | None = None) -> list[ShardReader]:
        """The shards of a split, or of some of its classes, in the manifest's order."""
        wanted = range(self.spec.num_classes) if classes is None else set(classes)
        return [reader for reader in self._readers[split] if reader.label in wanted]

    def load(self, split: Split, classes: Iterable[int] | None = None) -> InMemoryImages:
        """All images (N, C, H, W) uint8 with labels (N,) int64, in the order of the shards.

        Raises ShardError.
        """
        readers = self.readers(split, classes)
        total = sum(reader.count for reader in readers)
        shape = (total, self.spec.channels, self.spec.image_size, self.spec.image_size)
        images = torch.empty(shape, dtype=torch.uint8)
        start = 0
        with decode_threads() as threads:
            for reader in readers:
                rows = range(start, start + reader.count)
                reader.read_into(images, rows, range(reader.count), threads)
                start += reader.count
        labels = [torch.full((reader.count,), reader.label) for reader in readers]
        return InMemoryImages(images, torch.cat(labels) if labels else torch.empty(0).long())


def decode_threads() -> ThreadPoolExecutor:
    """Threads that decode images; the decoders let them run side by side."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")
