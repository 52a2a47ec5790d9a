"""WebDataset shards: images of one class as a tar whose bytes follow from its samples alone.

Writing runs inside Ray tasks. The webdataset library is imported when it is used: it imports torch,
which takes seconds that the driver can do without.
"""

import hashlib
import io
import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from upath import UPath

from pipeline.data.sources import Sample, Split
from pipeline.errors import ShardError, StorageError
from pipeline.runtime.files import Manifest, read_json, write_atomic
from pipeline.runtime.identity import peak_rss_bytes

SUFFIX = {"png": "png", "jpeg": "jpg", "raw": "npy"}  # as webdataset and Ray Data decode them
TAR_OVERHEAD = 2048  # bytes a sample: two headers, the label's block, padding

Record = dict[str, Any]  # what is known of a shard; JSON


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How images are stored."""

    image_size: int = 32
    """Pixels a side. The short side is resized to it, with antialiasing, and the centre kept."""
    channels: Literal[1, 3] = 3
    """3: RGB, grey images too. 1: greyscale, coloured images too."""
    encoding: Literal["png", "jpeg", "raw"] = "png"
    """`png` and `raw` (NumPy) are lossless; `raw` is large and the fastest to read."""
    jpeg_quality: int = 95
    """1 to 100; full colour resolution."""
    shard_size: int = 1000
    """Images in a shard, at most."""
    shard_mib: int = 64
    """MiB in a shard, at most, reckoned with uncompressed images."""
    max_bad: float = 0.01
    """Part of all images that may be unreadable; more stop the stage."""

    def __post_init__(self) -> None:
        for name in ("image_size", "shard_size", "shard_mib"):
            if getattr(self, name) < 1:
                raise ValueError(f"shard.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"shard.max_bad must be within [0, 1], got {self.max_bad}")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"shard.jpeg_quality must be 1 to 100, got {self.jpeg_quality}")

    @property
    def samples_per_shard(self) -> int:
        """Images in a full shard: shard_size, or fewer if they might not fit shard_mib."""
        image_bytes = self.channels * self.image_size**2 + TAR_OVERHEAD
        return max(1, min(self.shard_size, self.shard_mib * 2**20 // image_bytes))


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    split: Split
    class_index: int
    number: int
    first: int  # index within the class of its first sample
    samples: tuple[Sample, ...]

    @property
    def name(self) -> str:
        """Its path below the stage's directory, without .tar."""
        return f"{self.split}/{self.class_index:04d}-{self.number:05d}"


def write_shards_row(row: dict[str, Any], **arguments: Any) -> dict[str, str]:
    """write_shard for some shards, as Ray Data calls it. A StorageError, of which it would leave
    the text alone, is the last record.
    """
    records: list[Record] = []
    try:
        for task in pickle.loads(row["tasks"]):
            records.append(write_shard(task, **arguments))
    except StorageError as error:
        records.append({"storage_error": str(error)})
    return {"records": json.dumps(records)}


def write_shard(
    task: ShardTask,
    *,
    read: Callable[[Sample], Image.Image],
    config: ShardConfig,
    directory: UPath,
    identity: str,
) -> Record:
    """Write a shard, and then its record as JSON beside it, unless both are there already.

    The shard has the members <key>.<suffix> (image) and <key>.cls (label); the record names the
    source's own keys in the same order. `identity` is the fingerprint of source and configuration.
    Images that cannot be read are left out and listed in the record; they are tried again when the
    stage is. Raises StorageError if the storage fails.
    """
    path, record_path = directory / f"{task.name}.tar", directory / f"{task.name}.json"
    known: Record | None = read_json(record_path)
    if (
        known
        and known["identity"] == identity
        and not known["quarantine"]
        and _size(path) == known["bytes"]
    ):
        return {**known, "reused": True, "peak_rss_bytes": peak_rss_bytes()}
    encoded: dict[str, bytes] = {}
    bad: dict[str, str] = {}
    histogram = np.zeros(256 * config.channels, dtype=np.int64)
    # As they lie in the source's files, which may be cheap to read in their order alone.
    for sample in sorted(task.samples, key=lambda sample: (sample.uri, sample.where)):
        try:
            image = square(read(sample), config.image_size, config.channels)
        except (StorageError, MemoryError):
            raise
        except Exception as error:  # whatever a decoder throws at a broken file
            bad[sample.key] = _reason(error)
            continue
        histogram += image.histogram()
        encoded[sample.key] = encode(image, config)
    keys = [sample.key for sample in task.samples if sample.key in encoded]
    data = _tar(task, encoded, SUFFIX[config.encoding]) if keys else b""
    counts, values = histogram.reshape(config.channels, 256), np.arange(256)
    quarantine = [{"key": s.key, "reason": bad[s.key]} for s in task.samples if s.key in bad]
    record: Record = {
        "identity": identity,
        "name": task.name,
        "count": len(keys),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "sum": (counts * values).sum(1).tolist(),
        "sum_squares": (counts * values**2).sum(1).tolist(),
        "keys": keys,
        "quarantine": quarantine,
    }
    if keys:
        write_atomic(path, data)
    write_atomic(record_path, json.dumps(record))
    return {**record, "reused": False, "peak_rss_bytes": peak_rss_bytes()}


def square(image: Image.Image, size: int, channels: int) -> Image.Image:
    """The central square of an image, resized with antialiasing to size x size, RGB or greyscale.

    Cutting first and resizing then is the usual resize and centre crop, but for a fraction of a
    pixel, and a very long image costs no memory.
    """
    short = min(image.size)
    left, upper = ((length - short) // 2 for length in image.size)
    box = (left, upper, left + short, upper + short)
    if short == size:
        small = image.crop(box)
    else:
        small = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return small.convert("RGB" if channels == 3 else "L")


def encode(image: Image.Image, config: ShardConfig) -> bytes:
    """The bytes of an image in the configured encoding."""
    buffer = io.BytesIO()
    if config.encoding == "png":
        # Photographs take 2 % more bytes than with deflate's full search, and a third of its time.
        image.save(buffer, "PNG", compress_type=zlib.Z_RLE)
    elif config.encoding == "jpeg":
        image.save(buffer, "JPEG", quality=config.jpeg_quality, subsampling=0)
    else:
        np.save(buffer, np.asarray(image), allow_pickle=False)
    return buffer.getvalue()


def _tar(task: ShardTask, encoded: dict[str, bytes], suffix: str) -> bytes:
    """The shard's samples as webdataset writes them, without anything of this time or machine."""
    from webdataset.writer import TarWriter

    buffer = io.BytesIO()
    writer = TarWriter(buffer, user="", group="", mode=0o644, mtime=0, encoder=False)
    label = str(task.class_index).encode()
    for index, sample in enumerate(task.samples, task.first):
        if sample.key in encoded:
            key = f"{task.class_index:04d}-{index:07d}"
            writer.write({"__key__": key, suffix: encoded.pop(sample.key), "cls": label})
    writer.close()
    return buffer.getvalue()


def read_shard(directory: UPath, entry: Manifest) -> Iterator[tuple[str, bytes]]:
    """The (suffix, encoded bytes) of a shard's images in their order. `entry` is what the manifest
    says of it: the SHA-256 is compared first. Raises ShardError.
    """
    from webdataset.tariterators import tar_file_iterator

    path = directory / entry["path"]

    def error(what: str) -> ShardError:
        return ShardError(
            f"shard {path} is damaged: {what}. Delete it and the manifest.json in {directory}, "
            "then run the shard stage again: it writes what is missing"
        )

    try:
        data = path.read_bytes()
    except FileNotFoundError as missing:
        raise error("the file is missing") from missing
    except OSError as failure:
        raise StorageError(f"cannot read {path}: {failure.strerror or failure}") from failure
    if len(data) != entry["bytes"]:
        raise error(f"it has {len(data)} bytes, the manifest says {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise error("its SHA-256 is not the manifest's")
    # The class is the manifest's: the labels need not be read.
    for file in tar_file_iterator(io.BytesIO(data), select_files=lambda n: not n.endswith(".cls")):
        yield file["fname"].partition(".")[2], file["data"]


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _size(path: UPath) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
