"""Data sets in a few large files: assign files to splits, and labels to classes."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from braceexpand import braceexpand
from fsspec.core import url_to_fs

from pipeline.data.image_files import VERSION_FIELDS
from pipeline.data.sources.source import Found, Rejected, Sample
from pipeline.errors import SourceError

SPLIT_NAME = re.compile(r"(train|val|test)(ing|id|idation)?(?![a-z])", re.IGNORECASE)


class DataFile(NamedTuple):
    """One file of a data set."""

    uri: str  # absolute
    name: str  # below the given directory, or the file's own
    version: str  # changes when the file does

    @property
    def part(self) -> str | None:
        """train, val or test, if its name or that of a folder it is in begins so."""
        parts = (SPLIT_NAME.match(part) for part in PurePosixPath(self.name).parts)
        return next((match[1].lower() for match in parts if match), None)


class Labelled(NamedTuple):
    """An image with its raw label."""

    key: str
    label: object
    uri: str
    where: tuple[int, ...]


def split_files(
    path: str, val_path: str | None, suffix: str
) -> tuple[list[DataFile], list[DataFile] | None]:
    """The train files, and the val files or None. Raises SourceError."""
    files = find_files(path, suffix)
    if val_path is not None:
        return files, find_files(val_path, suffix)
    parts: dict[str | None, list[DataFile]] = {}
    for file in files:
        parts.setdefault(file.part, []).append(file)
    if set(parts) == {None}:
        return files, None
    if "train" not in parts:
        raise SourceError(
            f"no file of source.path {path} has a name that begins with train, "
            f"which is required with {files[0].name}"
        )
    return parts["train"], parts.get("val") or parts.get("test")


def find_files(pattern: str, suffix: str) -> list[DataFile]:
    """The files of a path, a directory or a pattern (braces, stars). Raises SourceError."""
    files: dict[str, DataFile] = {}
    for url in braceexpand(pattern):
        url = url if "://" in url else str(Path(url).expanduser().absolute())
        fs, path = url_to_fs(url)
        base = path.rstrip("/") if fs.isdir(path) else None
        if base is not None:
            paths = [name for name in fs.find(path) if name.endswith(suffix)]
        else:
            paths = fs.glob(path) if re.search(r"[*?\[]", path) else [path]
        if not paths:
            raise SourceError(f"{url} holds no *{suffix} file")
        for name in sorted(paths):
            try:
                info: dict[str, Any] = fs.info(name)
            except FileNotFoundError as error:
                raise SourceError(f"there is no {url}") from error
            uri = name if "file" in _protocols(fs) else fs.unstrip_protocol(name)
            relative = name[len(base) + 1 :] if base is not None else PurePosixPath(name).name
            version = "/".join(str(info.get(field)) for field in VERSION_FIELDS)
            files[uri] = DataFile(uri, relative, version)
    return list(files.values())


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def sort_labels(
    train: Sequence[Labelled],
    val: Sequence[Labelled] | None,
    names: Sequence[str] | None,
    *,
    versions: Sequence[object],
    rejected: Sequence[Rejected],
) -> Found:
    """Map labels to classes. Labels are class indices or names; `names` are the names of classes
    0, 1, ..., if known, else the classes are the labels that occur.
    """
    everything = [*train, *(val or ())]
    if names is None:
        labels = {item.label for item in everything if _usable(item.label)}
        classes = sorted(labels, key=lambda label: (isinstance(label, str), label))
        names = [str(label) for label in classes]
        index: dict[object, int] = {label: number for number, label in enumerate(classes)}
    else:
        index = {name: number for number, name in enumerate(names)}
        index.update((number, number) for number in range(len(names)))
    bad = list(rejected)

    def samples(part: Sequence[Labelled]) -> list[Sample]:
        kept = []
        for item in part:
            if item.label in index:
                kept.append(Sample(item.key, index[item.label], item.uri, item.where))
            else:
                bad.append(Rejected(item.key, f"no class has the label {item.label!r}"))
        return kept

    samples_train, samples_val = samples(train), None if val is None else samples(val)
    return Found(names, samples_train, samples_val, [*versions, list(names)], bad)


def _usable(label: object) -> bool:
    return isinstance(label, str) or (isinstance(label, int) and label >= 0)
