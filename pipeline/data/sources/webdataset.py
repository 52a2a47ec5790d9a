"""Source webdataset: tars in which the files of a sample are adjacent and share a name."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from fsspec.core import url_to_fs
from PIL import Image

from pipeline.data.image_files import SUFFIXES, fetch, read_image
from pipeline.data.sources.data_files import DataFile, Labelled, sort_labels, split_files
from pipeline.data.sources.source import Rejected, Sample, SampleList

BLOCK = 512  # block size of tar files


class Member(NamedTuple):
    """A file within a tar."""

    name: str
    offset: int
    size: int


if TYPE_CHECKING:
    from pipeline.data.sources import SourceConfig

PATH = "a directory of tars, one tar, or a pattern such as train-{000..009}.tar"
OPTIONS = ("val_path", "label", "class_names")


class WebDatasetSource(SampleList):
    """<name>.jpg (or another image) with <name>.cls (a number or a name), or with <name>.json that
    has the label in a field. A key is the tar's name and the sample's.

    Opening reads the headers and labels of all tars; images are later read by their offset.
    """

    def __init__(
        self,
        path: str,
        val_fraction: float,
        selection_fraction: float = 0.0,
        *,
        val_path: str | None = None,
        label: str | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        train, val = split_files(path, val_path, ".tar")
        rejected: list[Rejected] = []
        field = label or "label"
        parts = [
            None if part is None else [row for file in part for row in _list(file, field, rejected)]
            for part in (train, val)
        ]
        versions = [[file.name, file.version] for file in [*train, *(val or [])]]
        contents = sort_labels(
            parts[0] or [],
            parts[1],
            class_names,
            versions=[*versions, field],
            rejected=rejected,
        )
        super().__init__(contents, val_fraction=val_fraction, selection_fraction=selection_fraction)
        self.refuse_no_train(f"source.path {path}", "image with a label")

    @staticmethod
    def read(sample: Sample) -> Image.Image:
        """Read one member."""
        return read_image(fetch(sample.uri, *sample.where))


def _list(file: DataFile, field: str, rejected: list[Rejected]) -> Iterator[Labelled]:
    """List the samples of a tar; groups that are not samples are rejected."""
    fs, path = url_to_fs(file.uri)
    with fs.open(path, "rb") as tar:
        for name, members in _groups(tar, file, rejected):
            key = f"{file.name.removesuffix('.tar')}/{name}"
            images = [m for suffix, m in members.items() if f".{suffix.split('.')[-1]}" in SUFFIXES]
            if not images:
                rejected.append(Rejected(key, f"no image among {', '.join(members)}"))
                continue
            try:
                label = _label(tar, members, field)
            except (ValueError, KeyError, TypeError) as error:
                rejected.append(Rejected(key, f"no label: {type(error).__name__}: {error}"))
                continue
            yield Labelled(key, label, file.uri, (images[0].offset, images[0].size))


def _label(tar: IO[bytes], members: dict[str, Member], field: str) -> object:
    def content(member: Member) -> str:
        tar.seek(member.offset)
        return tar.read(member.size).decode()

    label: Any
    if "cls" in members:
        label = content(members["cls"]).strip()
    elif "json" in members:
        label = json.loads(content(members["json"]))[field]
    else:
        raise KeyError(f"neither cls nor json among {', '.join(members)}")
    if isinstance(label, str) and label.lstrip("-").isdecimal():
        return int(label)
    if label == "" or isinstance(label, bool) or not isinstance(label, (int, str)):
        raise TypeError(f"{label!r} is neither a number nor a name")
    return label


def _groups(
    tar: IO[bytes], file: DataFile, rejected: list[Rejected]
) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group adjacent members with the same name, by suffix."""
    current, members = "", dict[str, Member]()
    for member in _members(tar, file, rejected):
        folder, _, last = member.name.rpartition("/")
        stem, _, suffix = last.partition(".")
        name = f"{folder}/{stem}" if folder else stem
        if (name != current or suffix.lower() in members) and members:
            yield current, members
            members = {}
        current = name
        members[suffix.lower()] = member
    if members:
        yield current, members


def _members(tar: IO[bytes], file: DataFile, rejected: list[Rejected]) -> Iterator[Member]:
    """The files of a tar, up to any damage, which is recorded in `rejected`."""
    try:
        with tarfile.open(fileobj=tar, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # bounds memory
                if info.isfile():
                    yield Member(info.name, info.offset_data, info.size)
            end = archive.offset
        # A broken header ends the loop like the two empty blocks at the end of a complete archive.
        tar.seek(end)
        rest = tar.read(BLOCK)
        if len(rest) == BLOCK and not rest.strip(b"\0"):
            return
        reason = "it is truncated or damaged; the rest is lost"
    except tarfile.ReadError as error:
        reason = str(error)
    rejected.append(Rejected(file.name, f"tar: {reason}"))


def open_source(config: "SourceConfig") -> WebDatasetSource:
    """See Kind."""
    assert config.path is not None
    return WebDatasetSource(
        config.path,
        config.val_fraction,
        config.selection_fraction,
        val_path=config.val_path,
        label=config.label,
        class_names=config.names,
    )
