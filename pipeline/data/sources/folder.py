"""Source folder: images in a directory tree with one folder per class."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from PIL import Image
from upath import UPath

from pipeline.data.image_files import SUFFIXES, fetch, list_images, read_image
from pipeline.data.sources.data_files import SPLIT_NAME
from pipeline.data.sources.packed import VAL_LABELS, torchvision_name, unpacked
from pipeline.data.sources.source import Found, Sample, SampleList
from pipeline.errors import SourceError

KAGGLE = "Data/CLS-LOC"  # holds train/ and val/ in Kaggle's ImageNet
KAGGLE_LABELS = "LOC_val_solution.csv"

if TYPE_CHECKING:
    from pipeline.data.sources import SourceConfig

PATH = "a directory with <class>/, or with train/<class>/ and val/<class>/, or an archive"
OPTIONS = ("subset", "name", "class_names")


class FolderSource(SampleList):
    """An ImageFolder tree: train/<class>/**/<image> and the same below val/ (or Val/, validation/,
    test/), or only <class>/.

    Classes are the sorted folder names, or those of `subset` in its order; ImageNet classes with
    known names are called by them instead of n01440764, and all by `class_names` if given. A key is
    the path below the root. Kaggle's layout of ImageNet, with a flat val/ and a label file, is
    supported, and the authors' layout of Tiny ImageNet, with val/val_annotations.txt and words.txt.
    """

    def __init__(
        self,
        root: UPath,
        val_fraction: float,
        selection_fraction: float = 0.0,
        *,
        subset: str | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self._class_names = class_names
        self.root = root.expanduser().absolute() if isinstance(root, Path) else root
        if not self.root.is_dir():
            raise SourceError(
                f"source.path {root} is not a directory; it must be one that holds "
                "train/<class>/ and val/<class>/, or <class>/"
            )
        try:
            contents = self._find(subset)
        except OSError as error:
            place = error.filename or self.root
            raise SourceError(f"cannot list {place}: {error.strerror or error}") from error
        super().__init__(contents, val_fraction=val_fraction, selection_fraction=selection_fraction)
        if not self.samples("train") or not self.samples("val"):
            split = "val" if self.samples("train") else "train"
            raise SourceError(
                f"{self.root} has no image for {split}; it needs {split}/<class>/ with images "
                f"({' '.join(sorted(SUFFIXES))}), or two images in a class to hold one out"
            )

    def _find(self, subset: str | None) -> Found:
        for place in (KAGGLE, f"ILSVRC/{KAGGLE}"):
            if (self.root / place).is_dir():
                self.root = self.root / place
        parts = _parts(_folders(self.root))
        val_part = parts.get("val") or parts.get("test")
        if val_part and "train" not in parts:
            raise SourceError(f"{self.root} has {val_part}/ but no train/; it must have both")
        train_part = parts.get("train", "")
        base = self.root / train_part
        folders = _folders(base)
        if not folders:
            raise SourceError(f"{base} has no class folders; images belong in {base}/<class>/")
        if len(folders) == 1 and len(_folders(base / folders[0])) > 1:
            raise SourceError(
                f"{base} has one class folder alone, {folders[0]}; if the classes are the folders "
                f"in it, source.path is {base / folders[0]}"
            )
        names = {folder: folder for folder in folders}
        if subset:
            names = subset_folders(subset)
            if missing := [folder for folder in names if folder not in folders]:
                raise SourceError(
                    f"{base} lacks {len(missing)} of the {len(names)} classes of source.subset "
                    f"{subset}: {', '.join(missing[:3])}"
                )
        elif val_part and not (self.root / val_part / VAL_LABELS).exists():
            # Classes that only val has: their images are listed as rejected, not ignored.
            val_only = [name for name in _folders(self.root / val_part) if name not in names]
            names.update({name: name for name in val_only})
        versions: list[object] = []
        train = self._list(train_part, list(names), versions)
        val = self._list(val_part, list(names), versions) if val_part else None
        if val_part and not val:
            val = self._flat(val_part, self._flat_labels(val_part), list(names), versions)
        titles = {**_imagenet()[1], **self._words()}
        if self._class_names is not None:
            if len(self._class_names) != len(names):
                raise SourceError(
                    f"source.class_names has {len(self._class_names)} names for the {len(names)} "
                    f"class folders of {base}"
                )
            titles = dict(zip(names.values(), self._class_names, strict=True))
        return Found(list(names.values()), train, val, versions, titles=titles)

    def _list(self, part: str, folders: Sequence[str], versions: list[object]) -> list[Sample]:
        samples = []
        for label, name in enumerate(folders):
            folder = self.root / part / name
            for relative, uri, version in list_images(folder) if folder.is_dir() else ():
                key = "/".join(filter(None, (part, name, relative)))
                samples.append(Sample(key, label, uri))
                versions.append([key, version])
        return samples

    def _flat_labels(self, part: str) -> dict[str, str]:
        """File name without suffix -> class, for a split without class folders, from the label file
        of Kaggle's ImageNet or of Tiny ImageNet. Empty if there is none.
        """
        annotations = self.root / part / VAL_LABELS
        if annotations.exists():
            lines = annotations.read_text().splitlines()
            return {PurePosixPath(n).stem: c for n, c, *_ in (line.split("\t") for line in lines)}
        places = [self.root, *self.root.parents[:3]]
        table = next((p / KAGGLE_LABELS for p in places if (p / KAGGLE_LABELS).exists()), None)
        if table is None:
            return {}
        rows = csv.DictReader(table.read_text().splitlines())
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}

    def _flat(
        self, part: str, labelled: Mapping[str, str], folders: Sequence[str], versions: list[object]
    ) -> list[Sample]:
        """List the images of a split without class folders, by their label file."""
        labels = {name: label for label, name in enumerate(folders)}
        samples = []
        for relative, uri, version in list_images(self.root / part):
            label = labels.get(labelled.get(PurePosixPath(relative).stem, ""))
            if label is not None:  # else the class is not in the subset
                samples.append(Sample(f"{part}/{relative}", label, uri))
                versions.append([samples[-1].key, version, label])
        return samples

    def _words(self) -> dict[str, str]:
        """Class -> its first name, from Tiny ImageNet's words.txt."""
        path = self.root / "words.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        pairs = (line.split("\t", 1) for line in lines if "\t" in line)
        return {wnid: words.partition(",")[0] for wnid, words in pairs}

    @staticmethod
    def read(sample: Sample) -> Image.Image:
        """Read one file."""
        return read_image(fetch(sample.uri))


def subset_folders(subset: str) -> dict[str, str]:
    """Folder -> class name, in the order of the labels, for a named subset of ImageNet or
    comma-separated folders. Raises SourceError.
    """
    subsets, known = _imagenet()
    if subset in subsets:
        folders = [entry["wnid"] for entry in subsets[subset]]
    elif "," in subset or subset in known:
        folders = [name.strip() for name in subset.split(",") if name.strip()]
    else:
        raise SourceError(
            f"source.subset must be one of {', '.join(sorted(subsets))}, or folders separated by "
            f"commas, got {subset!r}"
        )
    return {folder: known.get(folder, folder) for folder in folders}


def _parts(folders: Sequence[str]) -> dict[str, str]:
    """The folder of each split: train, val or test; an exact name has precedence."""
    by_split: dict[str, str] = {}
    for name in folders:
        if match := SPLIT_NAME.fullmatch(name):
            part = match[1].lower()
            by_split[part] = part if part in folders else name
    return by_split


def _imagenet() -> tuple[dict[str, list[dict[str, str]]], dict[str, str]]:
    """The named subsets, and the known ImageNet class names: folder -> name."""
    text = files("pipeline.data.sources").joinpath("imagenet_subsets.json").read_text()
    subsets: dict[str, list[dict[str, str]]] = json.loads(text)["subsets"]
    return subsets, {e["wnid"]: e["name"] for part in subsets.values() for e in part}


def _folders(root: UPath) -> list[str]:
    entries = (entry for entry in root.iterdir() if entry.is_dir())
    return sorted(entry.name for entry in entries if not entry.name.startswith("."))


def open_source(config: "SourceConfig") -> SampleList:
    """See Kind."""
    assert config.path is not None
    root, name = UPath(config.path), None
    if isinstance(root, Path):
        root = UPath(unpacked(root))
        name = torchvision_name(root, config.name)
    if name is not None:
        from pipeline.data.sources.torchvision import open_source as open_torchvision

        try:
            options = replace(config, kind="torchvision", name=name, path=str(root))
        except ValueError as error:
            raise SourceError(f"{root} holds {name} in torchvision's files: {error}") from error
        return open_torchvision(options)
    fractions = (config.val_fraction, config.selection_fraction)
    return FolderSource(root, *fractions, subset=config.subset, class_names=config.names)
