"""Data sets as their publishers ship them: archives, and the files of CIFAR and Fashion-MNIST.

An archive is unpacked beside itself at first use. ImageNet's are ILSVRC2012_img_train.tar (a tar of
each class), ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which has the val labels.
"""

import gzip
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.errors import SourceError
from pipeline.observe.progress import Progress

SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VAL_LABELS = "val_annotations.txt"  # Tiny ImageNet's; ImageNet's labels are written as such a file
FOLDERS = {
    "cifar-10-batches-py": "CIFAR10",
    "cifar-100-python": "CIFAR100",
    "FashionMNIST/raw": "FashionMNIST",
    "MNIST/raw": "MNIST",
}
IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def unpacked(path: Path) -> Path:
    """The directory with the contents of an archive, or of a directory's only archive, or of those
    of ImageNet; any other path as it is. Raises SourceError.
    """
    if path.is_dir():
        if (path / TRAIN).exists() and not (path / "train").is_dir():
            return _unpack(path / TRAIN, path / "ILSVRC2012")
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        archives = [entry for entry in entries if entry.name.endswith(SUFFIXES)]
        beside = {archive.with_name(_stem(archive)) for archive in archives}
        if len(archives) != 1 or not set(entries) <= {*archives, *beside}:
            return path
        path = archives[0]
    if not path.name.endswith(SUFFIXES) or not path.is_file():
        return path
    directory = _unpack(path, path.with_name(_stem(path)))
    inside = list(directory.iterdir())
    alone = len(inside) == 1 and inside[0].is_dir() and inside[0].name not in FOLDERS
    return inside[0] if alone else directory


def torchvision_name(directory: Path, name: str | None) -> str | None:
    """Which of torchvision's data sets a directory holds in files of its own; None: none.

    Raises SourceError if Fashion-MNIST's or MNIST's files do not say which they are.
    """
    found = next((FOLDERS[part] for part in FOLDERS if (directory / part).is_dir()), None)
    if found is None and _idx_files(directory):
        found = name or ("FashionMNIST" if "fashion" in directory.name.lower() else None)
        if found is None:
            raise SourceError(
                f"{directory} holds {IDX[0]}: say of what by --source.name FashionMNIST or MNIST"
            )
    return found


@contextmanager
def torchvision_root(directory: Path, name: str) -> Iterator[Path]:
    """The directory laid out as torchvision expects it, which must load it before this ends."""
    files = _idx_files(directory)
    if not files:
        yield directory
        return
    with TemporaryDirectory() as scratch:
        raw = Path(scratch, name, "raw")
        raw.mkdir(parents=True)
        for idx, file in zip(IDX, files, strict=True):
            data = file.read_bytes()
            (raw / idx).write_bytes(gzip.decompress(data) if file.suffix == ".gz" else data)
        yield Path(scratch)


def _idx_files(directory: Path) -> list[Path]:
    """The four files of Fashion-MNIST or MNIST, if all are there, as they are or by gzip."""
    files = [directory / name for name in IDX]
    files = [f if f.exists() else f.with_name(f"{f.name}.gz") for f in files]
    return files if all(file.exists() for file in files) else []


def _stem(archive: Path) -> str:
    return archive.name.removesuffix(next(s for s in SUFFIXES if archive.name.endswith(s)))


def _unpack(archive: Path, directory: Path) -> Path:
    """Unpack into a directory that appears once it is whole."""
    if directory.is_dir():
        return directory
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if archive.name == TRAIN:
            _unpack_imagenet(archive.parent, partial)
        elif archive.suffix == ".zip":
            _unzip(archive, partial)
        else:
            _untar(archive, partial)
        partial.rename(directory)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SourceError(f"cannot unpack {archive} to {directory}: {error}") from error
    return directory


def _untar(archive: Path, directory: Path, *, nested: bool = False) -> None:
    """Extract a tar; of a tar of tars, each of these into the folder of its name."""
    with archive.open("rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        progress = Progress(f"unpack {archive.name}", archive.stat().st_size, unit="bytes")
        for member in tar:
            if nested:
                inner: Any = tar.extractfile(member)
                with tarfile.open(fileobj=inner, mode="r|") as images:
                    images.extractall(directory / Path(member.name).stem, filter="data")
            else:
                tar.extract(member, directory, filter="data")
            progress.update(file.tell())


def _unzip(archive: Path, directory: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        progress = Progress(f"unpack {archive.name}", len(names), unit="files")
        for number, name in enumerate(names, start=1):
            file.extract(name, directory)
            progress.update(number)


def _unpack_imagenet(root: Path, directory: Path) -> None:
    """train/<wnid>/ and val/ with its labels. Raises SourceError."""
    if missing := [name for name in (VAL, DEVKIT) if not (root / name).exists()]:
        raise SourceError(f"{root} holds {TRAIN} but not {' and '.join(missing)}")
    from scipy.io import loadmat

    _untar(root / TRAIN, directory / "train", nested=True)
    _untar(root / VAL, directory / "val")
    _untar(root / DEVKIT, directory / "devkit")
    data = next((directory / "devkit").glob("*/data"))
    synsets = loadmat(data / "meta.mat", squeeze_me=True)["synsets"]
    wnids = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in synsets}
    truth = (data / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
    names = sorted(path.name for path in (directory / "val").iterdir())
    rows = (f"{name}\t{wnids[int(label)]}\n" for name, label in zip(names, truth, strict=True))
    (directory / "val" / VAL_LABELS).write_text("".join(rows))
