"""Image files: which ones a folder holds, and the pixels of one, whatever kind it is."""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from upath import UPath

from pipeline.errors import StorageError

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
VERSION_FIELDS = ("size", "ETag", "etag", "mtime", "LastModified", "updated")
MAX_PIXELS = 89_478_485  # Pillow's threshold; 4 copies as RGBA, the most that is held, are 1.4 GB
OF_ONE_FILE = frozenset(  # errors that say nothing about the disk
    getattr(errno, name)
    for name in ("ENOENT", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG")
)


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Tell apart what is wrong with one file, which stays as it is, and a failing disk or object
    store, which becomes a StorageError.
    """
    try:
        yield
    except (MemoryError, StorageError):
        raise
    except Exception as error:
        if "://" in uri:
            # Without permission in a store is usually without valid credentials.
            own = isinstance(error, (FileNotFoundError, IsADirectoryError, ValueError))
        else:
            own = not isinstance(error, OSError) or error.errno in (OF_ONE_FILE | {None})
        if own:
            raise
        raise StorageError(f"cannot read {uri}: {type(error).__name__}: {error}") from error


def fetch(uri: str, offset: int = 0, size: int = -1) -> bytes:
    """The bytes of a file, or of a part of it. Raises OSError, or StorageError if storage fails."""
    with reading(uri), (UPath(uri) if "://" in uri else Path(uri)).open("rb") as file:
        if offset:
            file.seek(offset)
        data: bytes = file.read(size)
        return data


def list_images(root: UPath) -> list[tuple[str, str, str]]:
    """(path relative to root, path or URI, version) of every image at any depth, sorted.

    The version changes when the file does. Links are followed; names that begin with a dot, and
    files without an image's extension, are passed over. Raises OSError if a folder is unreadable.
    """
    if isinstance(root, Path):
        start = len(str(root)) + 1
        local = _local_images(str(root), frozenset())
        return sorted((path[start:].replace(os.sep, "/"), path, version) for path, version in local)
    found = []
    for name, info in root.fs.find(root.path, detail=True).items():
        relative = name.removeprefix(root.path.rstrip("/") + "/")
        if _is_image(relative):
            version = "/".join(str(info.get(field)) for field in VERSION_FIELDS)
            found.append((relative, str(root / relative), version))
    return sorted(found)


def _local_images(folder: str, above: frozenset[str]) -> Iterator[tuple[str, str]]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that we are in
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_folder(entry):
                if not entry.name.startswith("."):
                    yield from _local_images(entry.path, above | {real})
            elif _is_image(entry.name):
                try:
                    stat = entry.stat()
                except OSError:  # a link to nowhere: listed, for the quarantine to tell of it
                    yield entry.path, "unreadable"
                else:
                    yield entry.path, f"{stat.st_size}/{stat.st_mtime_ns}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read_image(file: IO[bytes] | bytes) -> Image.Image:
    """The (first) image in a file: 8 bits a channel, mode RGB, or L if it has no colour.

    The EXIF rotation is applied, 16 bits become 8, and what is transparent becomes white. Raises
    what Pillow raises on a file that it cannot read (OSError, SyntaxError, ...), and ValueError on
    floating-point pixels and on more than MAX_PIXELS.
    """
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        opened = Image.open(file)
    except UnidentifiedImageError:  # its message has an address in memory
        empty = not file.seek(0, io.SEEK_END)
        reason = "the file is empty" if empty else "no kind of image that Pillow knows"
        raise UnidentifiedImageError(reason) from None
    with opened as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _eight_bits(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        # What lies under full transparency is arbitrary, often black: nobody ever saw it.
        colours = image.convert("RGBA")
        page = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(page, colours).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # 16 bits, in whatever byte order
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels from {values.min()} to {values.max()} do not fit 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")
