"""Write and read WebDataset shards: single-class tars with reproducible bytes.

Writing runs inside Ray tasks. The webdataset library is imported lazily: it imports torch, which
would cost the driver seconds.
"""

import hashlib
import io
import json
import pickle
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from upath import UPath

from pipeline.data.sources import Sample, Split
from pipeline.errors import ShardError, StorageError
from pipeline.runtime.files import Manifest, read_json, write_atomic
from pipeline.runtime.identity import peak_rss_bytes

SUFFIX = {"png": "png", "jpeg": "jpg", "raw": "npy"}  # as webdataset and Ray Data decode them
TAR_OVERHEAD = 2048  # bytes per sample: two headers, the label's block, padding

Fit = Literal["crop", "pad", "stretch"]
Record = dict[str, Any]  # description of a written shard; JSON


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Size and encoding of stored images."""

    image_size: int = 32
    """Side in pixels: images are resized, with antialiasing, and made square by `fit`."""
    fit: Fit = "crop"
    """crop: the central square of an image that is not square. pad: all of it, between black bars.
    stretch: all of it, its sides scaled differently."""
    channels: Literal[1, 3] = 3
    """3: RGB; greyscale images are converted. 1: greyscale; colour images are converted."""
    encoding: Literal["png", "jpeg", "raw"] = "png"
    """`png` and `raw` (NumPy) are lossless; `raw` is large and the fastest to read."""
    jpeg_quality: int = 95
    """1 to 100; no chroma subsampling."""
    shard_size: int = 1000
    """Maximum images per shard."""
    shard_mib: int = 64
    """Maximum MiB per shard, computed for uncompressed images."""
    max_bad: float = 0.01
    """Maximum fraction of unreadable images; beyond it the stage fails."""

    def __post_init__(self) -> None:
        for name in ("image_size", "shard_size", "shard_mib"):
            if getattr(self, name) < 1:
                raise ValueError(f"shard.{name} must be at least 1, got {getattr(self, name)}")
        if self.fit not in get_args(Fit):
            raise ValueError(
                f"shard.fit must be one of {', '.join(get_args(Fit))}, got {self.fit!r}"
            )
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"shard.max_bad must be within [0, 1], got {self.max_bad}")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"shard.jpeg_quality must be 1 to 100, got {self.jpeg_quality}")

    def identity(self) -> dict[str, Any]:
        """Everything that the shards depend on, which max_bad is not. `fit`, a later option, only
        if it is set, so that earlier shards stay valid.
        """
        fields = asdict(self) | {"max_bad": 0.0}
        return {k: v for k, v in fields.items() if (k, v) != ("fit", "crop")}

    @property
    def samples_per_shard(self) -> int:
        """Images in a full shard: shard_size, or fewer to stay within shard_mib."""
        image_bytes = self.channels * self.image_size**2 + TAR_OVERHEAD
        return max(1, min(self.shard_size, self.shard_mib * 2**20 // image_bytes))


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    split: Split
    class_index: int
    number: int
    first: int  # index of its first sample within the class
    samples: tuple[Sample, ...]

    @property
    def name(self) -> str:
        """Path below the stage's directory, without .tar."""
        return f"{self.split}/{self.class_index:04d}-{self.number:05d}"


def write_shards_row(row: dict[str, Any], **arguments: Any) -> dict[str, str]:
    """Ray Data row function: write some shards. A StorageError becomes the last record, since Ray
    Data would keep only its text.
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
    """Write a shard, then its record as JSON beside it, unless both exist.

    The shard has the members <key>.<suffix> (image) and <key>.cls (label); the record lists the
    source's own keys in the same order. `identity` is the fingerprint of source and configuration.
    Unreadable images are left out and listed in the record; they are retried when the stage runs
    again. Raises StorageError if the storage fails.
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
    # In the order of the source's files, which may be fast to read only sequentially.
    for sample in sorted(task.samples, key=lambda sample: (sample.uri, sample.where)):
        try:
            image = square(read(sample), config)
        except (StorageError, MemoryError):
            raise
        except Exception as error:  # decoders raise anything on broken files
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


def square(image: Image.Image, config: ShardConfig) -> Image.Image:
    """An image as stored: resized with antialiasing to a square, RGB or greyscale.

    Cropping before resizing equals the usual resize and centre crop up to a fraction of a pixel,
    and needs no extra memory for very long images.
    """
    size, (short, long) = config.image_size, sorted(image.size)
    if config.fit == "crop":
        left, upper = ((length - short) // 2 for length in image.size)
        box = (left, upper, left + short, upper + short)
        if short == size:
            small = image.crop(box)
        else:
            small = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    elif config.fit == "stretch":
        small = image.resize((size, size), Image.Resampling.BILINEAR)
    else:
        width, height = (max(1, round(length * size / long)) for length in image.size)
        small = Image.new(image.mode, (size, size))
        whole = image.resize((width, height), Image.Resampling.BILINEAR)
        small.paste(whole, ((size - width) // 2, (size - height) // 2))
    return small.convert("RGB" if config.channels == 3 else "L")


def encode(image: Image.Image, config: ShardConfig) -> bytes:
    """Encode an image as configured."""
    buffer = io.BytesIO()
    if config.encoding == "png":
        # On photographs, 2 % larger than deflate's full search at a third of its time.
        image.save(buffer, "PNG", compress_type=zlib.Z_RLE)
    elif config.encoding == "jpeg":
        image.save(buffer, "JPEG", quality=config.jpeg_quality, subsampling=0)
    else:
        np.save(buffer, np.asarray(image), allow_pickle=False)
    return buffer.getvalue()


def _tar(task: ShardTask, encoded: dict[str, bytes], suffix: str) -> bytes:
    """The shard's samples as a WebDataset tar, with fixed owner and times."""
    with _without_torch():
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


@contextmanager
def _without_torch() -> Iterator[None]:
    """Import webdataset without PyTorch, which it does not need to write tars: that would take a
    shard task's process 2 s and 400 MiB. No effect where PyTorch is already imported.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment] # an import raises ImportError
    try:
        yield
    finally:
        if hide:
            del sys.modules["torch"]


def read_shard(directory: UPath, entry: Manifest) -> Iterator[tuple[str, bytes]]:
    """(suffix, encoded bytes) of a shard's images, in order. `entry` is its manifest entry, whose
    SHA-256 is verified first. Raises ShardError.
    """
    from webdataset.tariterators import tar_file_iterator

    path = directory / entry["path"]

    def error(reason: str) -> ShardError:
        return ShardError(
            f"shard {path} is damaged: {reason}. Delete it and the manifest.json in {directory}, "
            "then run the shard stage again: it writes the missing shards"
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
    # The manifest has the class: labels need not be read.
    for file in tar_file_iterator(io.BytesIO(data), select_files=lambda n: not n.endswith(".cls")):
        yield file["fname"].partition(".")[2], file["data"]


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _size(path: UPath) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
