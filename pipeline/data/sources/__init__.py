"""Where real images come from: one module a kind of source, and their common options.

A source lists its samples and reads one of them; the shard stage does the rest. To add one: a
module as `Kind` describes it, in this folder or anywhere, with a `SampleList` that has a static
`read`.
"""

import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol, cast

from pipeline.data.sources.source import (
    SPLITS,
    Found,
    Rejected,
    Sample,
    SampleList,
    Source,
    Split,
    held_out,
    key_hash,
)
from pipeline.errors import SourceError

__all__ = [
    "SPLITS",
    "Found",
    "Rejected",
    "Sample",
    "SampleList",
    "Source",
    "SourceConfig",
    "Split",
    "held_out",
    "key_hash",
    "open_source",
]

NOT_KINDS = ("data_files", "source")
KINDS = tuple(m.name for m in pkgutil.iter_modules(__path__) if m.name not in NOT_KINDS)


SPECIAL = ("name", "download", "subset", "val_path", "image", "label", "class_names")
"""Options that mean something for some kinds alone."""


class Kind(Protocol):
    """The module of a kind of source."""

    PATH: str | None
    """What source.path must be; None: it takes none."""
    OPTIONS: tuple[str, ...]
    """The other options of `SourceConfig` that mean something for this kind but not for all."""

    @staticmethod
    def open_source(config: "SourceConfig") -> Source:
        """The source. Raises SourceError."""
        ...


def source_kind(name: str) -> Kind:
    """The module of a kind: one of `pipeline.data.sources`, or, with a dot in it, any. Raises
    ValueError if there is none.
    """
    if "." not in name and name not in KINDS:
        raise ValueError(
            f"source.kind must be one of {', '.join(KINDS)}, or the dotted name of a module of "
            f"your own, got {name!r}"
        )
    try:
        module: Any = import_module(name if "." in name else f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # what is missing is something that the module imports
        raise ValueError(f"source.kind: there is no module {name!r}") from error
    return cast(Kind, module)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the real images come from."""

    kind: str = "builtin"
    """`builtin`: crops of ten photographs that come with scikit-image. `folder`: a tree of images.
    `torchvision`: one of its data sets, by source.name. `parquet`: files as the Hugging Face hub
    has them. `webdataset`: tars. With a dot in it: a module of your own (`Kind`)."""
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
        kind = source_kind(self.kind)
        if kind.PATH is None and self.path is not None:
            raise ValueError(
                f"source.path needs source.kind folder or another that reads one, got "
                f"{self.path!r} with source.kind {self.kind}"
            )
        if kind.PATH is not None and not self.path:
            raise ValueError(
                f"source.kind {self.kind} needs source.path: {kind.PATH}, got {self.path!r}"
            )
        if self.kind == "torchvision" and self.name is None:
            raise ValueError("source.kind torchvision needs source.name, for instance CIFAR10")
        for option in SPECIAL:
            if getattr(self, option) and option not in kind.OPTIONS:
                fits = [name for name in KINDS if option in source_kind(name).OPTIONS]
                raise ValueError(
                    f"source.{option} needs source.kind {' or '.join(fits)}, got "
                    f"{getattr(self, option)!r} with source.kind {self.kind}"
                )


def open_source(config: SourceConfig) -> Source:
    """The source that the configuration names. Raises SourceError."""
    try:
        return source_kind(config.kind).open_source(config)
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
