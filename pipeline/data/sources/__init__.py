"""Sources of real images: one module per kind, and their common options.

A source lists its samples and reads one at a time; the shard stage does the rest. To add one, write
a module that implements `Kind`, here or in any package, with a subclass of `SampleList` that has a
static `read`.
"""

import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol, cast

from upath import UPath

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

NOT_KINDS = ("data_files", "packed", "source")
KINDS = tuple(m.name for m in pkgutil.iter_modules(__path__) if m.name not in NOT_KINDS)


SPECIAL = ("name", "download", "subset", "val_path", "image", "label", "class_names")
"""Options that apply only to some kinds."""


class Kind(Protocol):
    """Interface of the module of a kind of source."""

    PATH: str | None
    """Description of source.path; None: the kind takes no path."""
    OPTIONS: tuple[str, ...]
    """The options of `SPECIAL` that apply to this kind."""

    @staticmethod
    def open_source(config: "SourceConfig") -> Source:
        """Open the source. Raises SourceError."""
        ...


def source_kind(name: str) -> Kind:
    """The module of a kind: one of `pipeline.data.sources`, or any module if the name is dotted.
    Raises ValueError if there is none.
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
            raise  # an import inside the module failed
        raise ValueError(f"source.kind: there is no module {name!r}") from error
    return cast(Kind, module)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Source of the real images."""

    kind: str = "builtin"
    """`builtin`: crops of ten photographs from scikit-image. `folder`: a tree of images, or a data
    set as its publisher ships it, in an archive or unpacked: ImageNet and its subsets, Tiny
    ImageNet, CIFAR-10 and -100, Fashion-MNIST and MNIST.
    `torchvision`: one of its data sets, by source.name. `parquet`: files as on the Hugging Face
    hub. `hf`: a data set of the hub. `webdataset`: tars. A dotted name: a module of your own
    (`Kind`)."""
    path: str | None = None
    """Directory, file or pattern, local or in an object store (s3://, gs://, ...; credentials come
    from the environment). folder: contains train/<class>/ and val/<class>/ (or validation/, or
    test/), or only <class>/. parquet, webdataset: names that begin with train, and with val,
    validation or test, or folders of these names. hf: owner/name or owner/name@revision, which is
    downloaded to the hub's cache ($HF_HOME), or a folder."""
    val_path: str | None = None
    """parquet, webdataset: the val files, if not under source.path."""
    name: Literal["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "SVHN"] | None = None
    """torchvision: the data set. folder: which of Fashion-MNIST and MNIST its files are."""
    download: bool = False
    """torchvision: download the data set if it is not under source.path."""
    subset: str | None = None
    """folder: of ImageNet, imagenette, imagewoof, imagefruit, imagemeow, imagesquawk or
    imageyellow; or the folders to take, separated by commas, in the order of their labels. hf: the
    folder of one of several subsets."""
    image: str | None = None
    """parquet, hf: the image column; default: the first Image column, or that can hold images."""
    label: str | None = None
    """parquet, hf: the label column; webdataset: the label's field in the json. Default: label, and
    for parquet and hf a ClassLabel column or other usual names."""
    class_names: list[str] | str | None = None
    """folder, parquet, hf, webdataset: names of the classes 0, 1, ..., for a folder in the order of
    its class folders; or the path of a text file with one in each line."""
    val_fraction: float = 0.1
    """Fraction of each class held out as val, if the source has no val split."""
    selection_fraction: float = 0.0
    """Fraction of each training class held out as `select`, for choosing hyperparameters, which
    must not be chosen on val; a search needs it."""

    @property
    def names(self) -> list[str] | None:
        """The class names, from their file if they are in one. Raises OSError if it fails."""
        if not isinstance(self.class_names, str):
            return self.class_names
        lines = UPath(self.class_names).expanduser().read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]

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
    """Open the configured source. Raises SourceError."""
    try:
        return source_kind(config.kind).open_source(config)
    except SourceError:
        raise
    except ImportError as error:
        if "://" not in str(config.path):
            raise
        raise SourceError(
            f"source.path {config.path} needs a package: {error}; "
            "the project's extras s3 and gcs install those for s3:// and gs://"
        ) from error
    except Exception as error:  # object store libraries raise errors of their own
        if not isinstance(error, OSError) and "://" not in str(config.path):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SourceError(f"cannot read source.path {config.path}: {reason}") from error
