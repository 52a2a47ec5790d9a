"""Atomic replacement of directories, and directory names for classes."""

import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

from pipeline.runtime.files import sync

MAX_NAME_BYTES = 200  # of a folder's name; most file systems take 255, ecryptfs 143 characters
UNSAFE = frozenset('/\\:*?"<>|')


@contextmanager
def replaced(directory: UPath, *, last: str) -> Iterator[UPath]:
    """Replace the contents of a directory by what is written into the yielded one.

    On a local disk it is written beside and then swapped: a reader finds the old contents, the new
    ones or, briefly, none. Object stores cannot rename a folder: there the old contents are removed
    first, beginning with the file `last`, which marks a directory as complete and which the caller
    writes last.
    """
    if not isinstance(directory, Path):
        (directory / last).unlink(missing_ok=True)
        if directory.exists():
            directory.fs.rm(directory.path, recursive=True)
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    new, old = (directory.with_name(f".{directory.name}.{name}") for name in ("new", "old"))
    _remove(new, old)  # left over from a killed process
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        _remove(new)
        raise
    for path in new.iterdir():
        if path.is_file():
            sync(path)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    sync(directory.parent)
    _remove(old)


def _remove(*directories: Path) -> None:
    for directory in directories:
        if directory.exists():
            shutil.rmtree(directory)


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Directory names for classes: unsafe characters replaced, long names truncated, and prefixed
    with the class index if two would be equal.
    """
    plain = [_plain(name) for name in class_names]
    alike = {unicodedata.normalize("NFC", name).casefold() for name in plain}
    if len(alike) == len(plain) and all(plain):
        return plain
    return [f"{c:04d} {name}".strip() for c, name in enumerate(plain)]


def _plain(name: str) -> str:
    safe = "".join("_" if c in UNSAFE or ord(c) < 32 else c for c in name)
    return safe.encode(errors="replace")[:MAX_NAME_BYTES].decode(errors="ignore").strip(". ")
