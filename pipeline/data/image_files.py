"""List and decode image files, local or in an object store."""

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

# Pillow reads no HEIC, which phones write: such files are listed, so that they are reported.
SUFFIXES = frozenset((
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
))  # fmt: skip
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")  # bytes 8 to 12 of the file
VERSION_FIELDS = ("size", "ETag", "etag", "mtime", "LastModified", "updated")
MAX_PIXELS = 89_478_485  # Pillow's threshold; at most 4 RGBA copies are in memory, 1.4 GB
OF_ONE_FILE = frozenset(  # errors of a single file, not of the disk
    getattr(errno, name)
    for name in ("ENOENT", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG")
)


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Convert errors of a failing disk or object store to StorageError; re-raise errors of a single
    file unchanged.
    """
    try:
        yield
    except (MemoryError, StorageError):
        raise
    except Exception as error:
        if "://" in uri:
            # A permission error in a store usually means invalid credentials.
            of_file = isinstance(error, (FileNotFoundError, IsADirectoryError, ValueError))
        else:
            of_file = not isinstance(error, OSError) or error.errno in (OF_ONE_FILE | {None})
        if of_file:
            raise
        raise StorageError(f"cannot read {uri}: {type(error).__name__}: {error}") from error


def fetch(uri: str, offset: int = 0, size: int = -1) -> bytes:
    """Read a file or a part of it. Raises OSError, or StorageError if the storage fails."""
    with reading(uri), (UPath(uri) if "://" in uri else Path(uri)).open("rb") as file:
        if offset:
            file.seek(offset)
        data: bytes = file.read(size)
        return data


def list_images(root: UPath) -> list[tuple[str, str, str]]:
    """(path relative to root, path or URI, version) of every image at any depth, sorted.

    The version changes when the file does. Links are followed; hidden files and files without an
    image extension are skipped. Raises OSError if a folder is unreadable.
    """
    if isinstance(root, Path):
        start = len(str(root)) + 1
        local = _local_images(str(root), frozenset())
        return sorted((path[start:].replace(os.sep, "/"), path, version) for path, version in local)
    images = []
    for name, info in root.fs.find(root.path, detail=True).items():
        relative = name.removeprefix(root.path.rstrip("/") + "/")
        if _is_image(relative):
            version = "/".join(str(info.get(field)) for field in VERSION_FIELDS)
            images.append((relative, str(root / relative), version))
    return sorted(images)


def _local_images(folder: str, above: frozenset[str]) -> Iterator[tuple[str, str]]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a parent folder
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_folder(entry):
                if not entry.name.startswith("."):
                    yield from _local_images(entry.path, above | {real})
            elif _is_image(entry.name):
                try:
                    stat = entry.stat()
                except OSError:  # a dangling link: listed, so that it is quarantined
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
    """Decode the (first) image of a file to 8 bits per channel, mode RGB, or L if greyscale.

    Applies the EXIF rotation, reduces 16 bits to 8, and makes transparent pixels white. Raises
    Pillow's errors on unreadable files (OSError, SyntaxError, ...), and ValueError on
    floating-point pixels and on more than MAX_PIXELS.
    """
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        opened = Image.open(file)
    except UnidentifiedImageError:  # its message contains a memory address
        file.seek(0)
        head = file.read(12)
        reason = "not an image format that Pillow knows" if head else "the file is empty"
        if head[4:8] == b"ftyp" and head[8:] in HEIC_BRANDS:
            reason = "HEIC, which Pillow does not read; convert it to JPEG or PNG"
        raise UnidentifiedImageError(reason) from None
    with opened as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _eight_bits(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        # The colours of fully transparent pixels are arbitrary, often black.
        colours = image.convert("RGBA")
        page = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(page, colours).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no standard range")
    if image.mode.startswith("I"):  # 16 bits, any byte order
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels from {values.min()} to {values.max()} do not fit 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")
