"""Where real images come from: one module a kind of source, and their common options.

A source lists its samples and reads one of them; the shard stage does the rest. To add one: a
`SampleList` with a static `read`, its options in `SourceConfig`, and its name in `open_source`.
"""

from dataclasses import dataclass
from typing import Literal

from upath import UPath

from pipeline.sources.builtin import PHOTOGRAPHS, BuiltinSource
from pipeline.sources.folder import FolderSource
from pipeline.sources.source import (
    SPLITS,
    Found,
    Rejected,
    Sample,
    SampleList,
    Source,
    SourceError,
    Split,
    held_out,
    key_hash,
)

__all__ = [
    "PHOTOGRAPHS",
    "SPLITS",
    "BuiltinSource",
    "FolderSource",
    "Found",
    "Rejected",
    "Sample",
    "SampleList",
    "Source",
    "SourceConfig",
    "SourceError",
    "Split",
    "held_out",
    "key_hash",
    "open_source",
]

NEEDED = {  # what source.path must be
    "folder": "a directory with train/<class>/ and val/<class>/",
    "torchvision": "the directory in which torchvision keeps its data sets",
    "parquet": "a directory of Parquet files, one such file, or a pattern of them",
    "webdataset": "a directory of tars, one tar, or a pattern such as train-{000..009}.tar",
}
ONLY_FOR = {  # options that mean something for some kinds alone
    "name": ("torchvision",),
    "download": ("torchvision",),
    "subset": ("folder",),
    "val_path": ("parquet", "webdataset"),
    "image": ("parquet",),
    "label": ("parquet", "webdataset"),
    "class_names": ("parquet", "webdataset"),
}


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the real images come from."""

    kind: Literal["builtin", "folder", "torchvision", "parquet", "webdataset"] = "builtin"
    """`builtin`: crops of ten photographs that come with scikit-image. `folder`: a tree of images.
    `torchvision`: one of its data sets, by source.name. `parquet`: files as the Hugging Face hub
    has them. `webdataset`: tars."""
    path: str | None = None
    """Directory, file or pattern, here or in an object store (s3://, gs://, ...; credentials are
    those of the environment). Of a folder: with train/<class>/ and val/<class>/ (or validation/, or
    test/), or with <class>/ alone. Of Parquet files and tars: names that begin with train, and with
    val, validation or test, or folders of these names."""
    val_path: str | None = None
    """parquet, webdataset: where val is, if not under source.path."""
    name: Literal["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "SVHN"] | None = None
    """torchvision: the data set."""
    download: bool = False
    """torchvision: whether to download what is not under source.path."""
    subset: str | None = None
    """folder: of ImageNet, imagenette, imagewoof, imagefruit, imagemeow, imagesquawk or
    imageyellow; or the folders to take, separated by commas, in the order of their labels."""
    image: str | None = None
    """parquet: the column of the images; default: the first that can be one."""
    label: str | None = None
    """parquet: the column of the labels; webdataset: their field in the json. Default: label, and
    what else is usual."""
    class_names: list[str] | None = None
    """parquet, webdataset: names of the integer labels 0, 1, ..., where the data have none."""
    val_fraction: float = 0.1
    """Part of each class that is held out as val where the source has no val part of its own."""
    selection_fraction: float = 0.0
    """Part of each class of train that is held out as `select`, to choose hyperparameters by; a
    search needs it, since nothing may be chosen on val."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"source.val_fraction must be within (0, 1), got {self.val_fraction}")
        if not 0 <= self.selection_fraction < 1:
            raise ValueError(
                f"source.selection_fraction must be within [0, 1), got {self.selection_fraction}"
            )
        if self.kind == "builtin" and self.path is not None:
            raise ValueError(
                f"source.path needs source.kind folder or another that reads one, got "
                f"{self.path!r} with source.kind builtin"
            )
        if self.kind != "builtin" and not self.path:
            raise ValueError(
                f"source.kind {self.kind} needs source.path: {NEEDED[self.kind]}, got {self.path!r}"
            )
        if self.kind == "torchvision" and self.name is None:
            raise ValueError("source.kind torchvision needs source.name, for instance CIFAR10")
        for option, kinds in ONLY_FOR.items():
            if getattr(self, option) and self.kind not in kinds:
                raise ValueError(
                    f"source.{option} needs source.kind {' or '.join(kinds)}, got "
                    f"{getattr(self, option)!r} with source.kind {self.kind}"
                )


def open_source(config: SourceConfig) -> Source:
    """The source that the configuration names. Raises SourceError."""
    try:
        return _open(config)
    except SourceError:
        raise
    except ImportError as error:
        if "://" not in str(config.path):
            raise
        raise SourceError(
            f"source.path {config.path} needs a package: {error}; "
            "the project's extras s3 and gcs have those of s3:// and gs://"
        ) from error
    except Exception as error:  # of whatever kind the library of an object store has for it
        if not isinstance(error, OSError) and "://" not in str(config.path):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SourceError(f"cannot read source.path {config.path}: {reason}") from error


def _open(config: SourceConfig) -> Source:
    fractions = (config.val_fraction, config.selection_fraction)
    if config.path is None:
        return BuiltinSource(config.selection_fraction)
    if config.kind == "folder":
        return FolderSource(UPath(config.path), *fractions, subset=config.subset)
    if config.kind == "torchvision":
        from pipeline.sources.torchvision import TorchvisionSource  # it imports torch

        assert config.name is not None
        return TorchvisionSource(config.name, config.path, config.download, *fractions)
    if config.kind == "parquet":
        from pipeline.sources.parquet import ParquetSource

        return ParquetSource(
            config.path,
            *fractions,
            val_path=config.val_path,
            image=config.image,
            label=config.label,
            class_names=config.class_names,
        )
    from pipeline.sources.webdataset import WebDatasetSource

    return WebDatasetSource(
        config.path,
        *fractions,
        val_path=config.val_path,
        label=config.label,
        class_names=config.class_names,
    )
