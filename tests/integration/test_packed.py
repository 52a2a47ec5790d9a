"""Data sets as their publishers ship them: what is unpacked reads as the same folders do."""

import gzip
import io
import pickle
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

from pipeline.data.sources import Source, SourceConfig, open_source
from pipeline.errors import SourceError

WNIDS = ("n01440764", "n02102040")


def opened(path: Path, **options: str) -> Source:
    return open_source(SourceConfig(kind="folder", path=str(path), **options))


def write_tree(root: Path) -> Path:
    """Three train and two val images of two classes, all of different colours."""
    for number, (split, wnid) in enumerate(
        [*3 * [("train", w) for w in WNIDS], *2 * [("val", w) for w in WNIDS]]
    ):
        path = root / split / wnid / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 9)).save(path)
    return root


def contents(source: Source) -> dict[str, Counter[tuple[str, bytes]]]:
    return {
        split: Counter(
            (source.class_names[s.label], source.read(s).tobytes()) for s in source.samples(split)
        )
        for split in ("train", "val")
    }


@pytest.mark.parametrize("suffix", [".tgz", ".tar.gz", ".tar", ".zip"])
def test_an_archive_reads_as_its_folder(tmp_path: Path, suffix: str) -> None:
    """Given itself or by its directory, and again, when it is unpacked."""
    tree = write_tree(tmp_path / "imagenette2-320")
    formats = {".tgz": "gztar", ".tar.gz": "gztar", ".tar": "tar", ".zip": "zip"}
    made = shutil.make_archive(str(tmp_path / "made"), formats[suffix], tmp_path, tree.name)
    place = tmp_path / "data"
    place.mkdir()
    archive = place / f"imagenette2-320{suffix}"
    shutil.move(made, archive)
    expected = contents(opened(tree))
    assert expected["train"].total() == 6
    for path in (archive, place, archive):
        assert contents(opened(path)) == expected
    assert sorted(entry.name for entry in place.iterdir()) == sorted({archive.name, tree.name})


def test_a_damaged_archive_leaves_nothing(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    archive = Path(shutil.make_archive(str(tmp_path / "data/set"), "gztar", tree))
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(SourceError, match=r"cannot unpack .*set\.tar\.gz"):
        opened(archive)
    assert [entry.name for entry in archive.parent.iterdir()] == [archive.name]


def test_an_archive_does_not_write_elsewhere(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(SourceError, match=r"cannot unpack .*outside"):
        opened(tmp_path / "set.tar")
    assert not (tmp_path.parent / "outside").exists()


def tar_of(files: dict[str, bytes], path: Path, mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_imagenets_own_tars(tmp_path: Path) -> None:
    """A tar of a tar a class, a flat tar of val, and labels by numbers of the devkit's own."""
    tree = write_tree(tmp_path / "tree")
    root = tmp_path / "ILSVRC2012"
    root.mkdir()
    classes = {}
    for wnid in WNIDS:
        inner = tmp_path / f"{wnid}.tar"
        files = {f"{wnid}_{p.stem}.JPEG": p.read_bytes() for p in (tree / "train" / wnid).iterdir()}
        tar_of(files, inner)
        classes[inner.name] = inner.read_bytes()
    tar_of(classes, root / "ILSVRC2012_img_train.tar")
    val = sorted((tree / "val").rglob("*.png"), key=lambda path: int(path.stem))
    flat = {f"ILSVRC2012_val_{n:08d}.JPEG": path.read_bytes() for n, path in enumerate(val, 1)}
    tar_of(flat, root / "ILSVRC2012_img_val.tar")
    with pytest.raises(SourceError, match=r"holds .*_train.tar but not ILSVRC2012_devkit_t12"):
        opened(root)
    ids = {WNIDS[0]: 7, WNIDS[1]: 3}
    synsets = np.array(
        [(ids[w], w, "words") for w in WNIDS],
        dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O")],
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{ids[path.parent.name]}\n" for path in val).encode()
    base = "ILSVRC2012_devkit_t12/data"
    devkit = {f"{base}/meta.mat": meta.getvalue()}
    devkit[f"{base}/ILSVRC2012_validation_ground_truth.txt"] = truth
    tar_of(devkit, root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz")
    assert contents(opened(root)) == contents(opened(tree))
    assert contents(opened(root, subset=",".join(WNIDS))) == contents(opened(tree))


def test_tars_beside_what_was_unpacked_are_left_alone(tmp_path: Path) -> None:
    """Where torchvision unpacks ImageNet: train/ and val/ beside the tars."""
    expected = contents(opened(write_tree(tmp_path / "tree")))
    root = write_tree(tmp_path / "ILSVRC2012")
    (root / "ILSVRC2012_img_train.tar").touch()
    assert contents(opened(root)) == expected
    assert not (root / "ILSVRC2012").exists()


def test_cifar_and_fashion_mnist(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFAR-10's archive of Python files (smaller, and so with sums of its own), and the files of
    Fashion-MNIST, which look like those of MNIST.
    """
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    rows = {"data_batch_1": slice(0, 8), "test_batch": slice(8, 12)}
    for name, part in rows.items():
        batch = {"data": pixels[part], "labels": [n % 2 for n in range(12)][part]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane", "automobile"]}))
    sums = {path.name: calculate_md5(path) for path in folder.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    (tmp_path / "data").mkdir()
    archive = shutil.make_archive(
        str(tmp_path / "data/cifar-10-python"), "gztar", tmp_path, folder.name
    )
    for path in (Path(archive), tmp_path / "data", tmp_path):
        source = opened(path)
        assert source.class_names == ("airplane", "automobile")
        read = contents(source)
        assert read["train"].total() == 8
        first = pixels[0].reshape(3, 32, 32).transpose(1, 2, 0).tobytes()
        assert read["train"]["airplane", first] == 1
    with pytest.raises(SourceError, match=r"holds CIFAR10 .*source\.subset needs"):
        opened(tmp_path / "data", subset="a,b")

    fashion = tmp_path / "idx"
    fashion.mkdir()
    for name, kept, head in (("images-idx3", 784, 16), ("labels-idx1", 1, 8)):
        for part, count in (("train", 200), ("t10k", 60)):
            with gzip.open(shared_data / f"fashion-mnist/{part}-{name}-ubyte.gz") as file:
                data = file.read(head + kept * count)
            data = data[:4] + count.to_bytes(4, "big") + data[8:]
            (fashion / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(data))
    with pytest.raises(SourceError, match=r"--source\.name FashionMNIST or MNIST"):
        opened(fashion)
    source = opened(fashion, name="FashionMNIST")
    assert source.class_names[9] == "Ankle boot"
    packed = contents(source)
    assert contents(opened(fashion.rename(tmp_path / "fashion-mnist"))) == packed
    fashion = tmp_path / "fashion-mnist"
    for path in fashion.iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert contents(opened(fashion, name="FashionMNIST")) == packed
    (tmp_path / "root/FashionMNIST").mkdir(parents=True)
    fashion.rename(tmp_path / "root/FashionMNIST/raw")
    assert contents(opened(tmp_path / "root")) == packed
    assert packed["train"].total() == 200
