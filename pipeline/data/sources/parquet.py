"""Source parquet: tables of encoded images and labels, as on the Hugging Face hub."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from PIL import Image

from pipeline.data.image_files import read_image, reading
from pipeline.data.sources.data_files import DataFile, Labelled, sort_labels, split_files
from pipeline.data.sources.source import Sample, SampleList
from pipeline.errors import SourceError

LABELS = ("label", "labels", "fine_label", "cls", "class")  # usual column names

if TYPE_CHECKING:
    from pipeline.data.sources import SourceConfig

PATH = "a directory of Parquet files, one such file, or a pattern of them"
OPTIONS = ("val_path", "image", "label", "class_names")


class ParquetSource(SampleList):
    """An image column (bytes, or structs {bytes, path}) and a label column (names, or integers with
    optional names in the schema's Hugging Face metadata).

    A key is the image's path if all paths are distinct, else the file and the row.
    """

    def __init__(self, config: "SourceConfig", version: str | None = None) -> None:
        """`version` of all files, where there is a better one than their sizes and times."""
        assert config.path is not None
        train, val = split_files(config.path, config.val_path, ".parquet")
        self._columns: tuple[str | None, str | None] = (config.image, config.label)
        self._names: Sequence[str] | None = config.names
        parts = [None if part is None else self._list(part) for part in (train, val)]
        versions = [[file.name, version or file.version] for file in [*train, *(val or [])]]
        contents = sort_labels(
            parts[0] or [],
            parts[1],
            self._names,
            versions=[*versions, list(self._columns)],
            rejected=[],
        )
        super().__init__(
            contents,
            val_fraction=config.val_fraction,
            selection_fraction=config.selection_fraction,
        )
        self.refuse_no_train(f"source.path {config.path}", "labelled row")

    def _list(self, files: Sequence[DataFile]) -> list[Labelled]:
        """Read the labels and paths of all rows, but no images."""
        rows: list[tuple[str, str | None, Any, str, tuple[int, int]]] = []
        for file in files:
            try:
                table = _open(file.uri)
                schema = table.schema_arrow
                image, label = self._find_columns(schema, file.uri)
                columns = [label]
                column_type = schema.field(image).type
                if pa.types.is_struct(column_type) and "path" in column_type.names:
                    columns.append(f"{image}.path")
                for group in range(table.num_row_groups):
                    part = table.read_row_group(group, columns=columns)
                    labels = part[label].to_pylist()
                    paths = [None] * len(labels)
                    if len(columns) > 1:
                        paths = [entry and entry["path"] for entry in part[image].to_pylist()]
                    for row, (value, name) in enumerate(zip(labels, paths, strict=True)):
                        where = (group, row)
                        rows.append((file.uri, name, value, f"{file.uri}#{image}", where))
            except pa.ArrowInvalid as error:
                raise SourceError(f"{file.uri} is not a valid Parquet file: {error}") from error
        count = Counter(name for _, name, *_ in rows)
        named = all(name and count[name] == 1 for name in count)
        short = {file.uri: file.name for file in files}
        return [
            Labelled(
                name if named and name else f"{short[uri]}/{where[0]}/{where[1]}",
                value,
                place,
                where,
            )
            for uri, name, value, place, where in rows
        ]

    def _find_columns(self, schema: pa.Schema, uri: str) -> tuple[str, str]:
        """The image and label columns; sets the class names if the metadata have them."""
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {})
        image, label = self._columns
        # Columns of the feature types Image and ClassLabel first.
        marked = [name for name, feature in features.items() if "names" in _as_dict(feature)]
        typed = {n for n, feature in features.items() if _as_dict(feature).get("_type") == "Image"}
        images = [field.name for field in schema if _holds_images(field.type)]
        images = [image] if image else sorted(images, key=lambda name: name not in typed)
        labels = [name for name in (*LABELS, *marked) if name in schema.names]
        labels = [label] if label else sorted(labels, key=lambda name: name not in marked)
        for option, names in (("image", images), ("label", labels)):
            if not names or names[0] not in schema.names:
                raise SourceError(
                    f"{uri} has no column {names[0] if names else f'for source.{option}'}; "
                    f"it has {', '.join(schema.names)}"
                )
        image, label = images[0], labels[0]
        if not _holds_images(schema.field(image).type):
            raise SourceError(
                f"column {image} of {uri} holds {schema.field(image).type}, not bytes"
            )
        if self._names is None:
            self._names = _as_dict(features.get(label)).get("names")
        self._columns = (image, label)
        return image, label

    @staticmethod
    def read(sample: Sample) -> Image.Image:
        """Read one row's image. The row group is cached until another is read."""
        uri, _, column = sample.uri.rpartition("#")
        with reading(uri):
            data = _row_group(uri, column, sample.where[0])[sample.where[1]].as_py()
        if data is None:
            raise ValueError("the row has no bytes")
        return read_image(data)


def _as_dict(feature: object) -> dict[str, Any]:
    return feature if isinstance(feature, dict) else {}


def _holds_images(column_type: pa.DataType) -> bool:
    if pa.types.is_struct(column_type):
        return "bytes" in column_type.names
    return bool(pa.types.is_binary(column_type) or pa.types.is_large_binary(column_type))


@lru_cache(maxsize=4)
def _open(uri: str) -> pq.ParquetFile:
    fs, path = url_to_fs(uri)
    return pq.ParquetFile(fs.open(path, "rb"))


@lru_cache(maxsize=1)
def _row_group(uri: str, column: str, group: int) -> Any:
    table = _open(uri)
    is_struct = pa.types.is_struct(table.schema_arrow.field(column).type)
    part = table.read_row_group(group, columns=[f"{column}.bytes" if is_struct else column])[column]
    return pc.struct_field(part, "bytes") if is_struct else part


def open_source(config: "SourceConfig") -> ParquetSource:
    """See Kind."""
    return ParquetSource(config)
