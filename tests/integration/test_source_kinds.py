"""The kinds of sources that read data sets as others pack them: they all read the same."""

import gzip
import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from upath import UPath

from pipeline.data.sources import (
    SPLITS,
    Found,
    Sample,
    SampleList,
    Source,
    SourceConfig,
    open_source,
)
from pipeline.data.sources.folder import subset_folders
from pipeline.errors import SourceError

Row = tuple[str, str, bytes]  # split, class name, encoded image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def cifar(shared_data: Path) -> list[Row]:
    """12 train and 5 val images of each of CIFAR-10's classes."""
    rows, taken = [], Counter[str]()
    with tarfile.open(shared_data / "cifar10-lossless-1500.tar") as tar:
        for member in tar:
            split, _, rest = member.name.partition("/")
            name, _, file = rest.partition("/")
            taken[f"{split}/{name}"] += bool(file)
            if file and taken[f"{split}/{name}"] <= (12 if split == "train" else 5):
                rows.append((split, name, tar.extractfile(member).read()))
    return rows


def write_folder(rows: list[Row], root: Path) -> dict[str, object]:
    for number, (split, name, data) in enumerate(rows):
        path = root / split / name.replace("/", "-") / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return {"kind": "folder"}


def table(
    rows: list[Row], names: list[str], *, struct: bool = True, named: bool = True, path: bool = True
) -> pa.Table:
    """As `datasets` writes it: shuffled rows, the names of the classes in the schema's metadata."""
    images = [
        {"bytes": data, "path": f"{k:04d}.png" if path else None} if struct else data
        for k, (_, _, data) in enumerate(rows)
    ]
    features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if named else None
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    schema = pa.schema([("img", kind), ("label", pa.int64())], metadata=metadata)
    labels = [names.index(name) for _, name, _ in rows]
    return pa.Table.from_arrays([pa.array(images, kind), pa.array(labels)], schema=schema)


def write_parquet(rows: list[Row], root: Path, **layout: bool) -> dict[str, object]:
    (root / "data").mkdir(parents=True)
    names = sorted({name for _, name, _ in rows})
    order = np.random.default_rng(0)
    for split, file in (("train", "train"), ("val", "test")):
        part = [row for row in rows if row[0] == split]
        part = [part[k] for k in order.permutation(len(part))]
        for number, some in enumerate((part[::2], part[1::2])):
            path = root / f"data/{file}-{number:05d}-of-00002.parquet"
            pq.write_table(table(some, names, **layout), path, row_group_size=7)
    named = {} if layout.get("named", True) else {"class_names": names}
    return {"kind": "parquet", **named}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tars(rows: list[Row], root: Path, *, label: str = "cls") -> dict[str, object]:
    root.mkdir(parents=True)
    names = sorted({name for _, name, _ in rows})
    for split in ("train", "val"):
        part = [row for row in rows if row[0] == split]
        for number in range(3):
            with tarfile.open(root / f"{split}-{number:03d}.tar", "w") as tar:
                for k, (_, name, data) in enumerate(part[number::3]):
                    add(tar, f"{k:06d}.png", data)
                    index = names.index(name)
                    if label == "cls":
                        add(tar, f"{k:06d}.cls", str(index).encode())
                    else:
                        add(tar, f"{k:06d}.json", json.dumps({"label": index}).encode())
    return {"kind": "webdataset", "class_names": names}


WRITERS: dict[str, Callable[[list[Row], Path], dict[str, object]]] = {
    "folder": write_folder,
    "parquet": write_parquet,
    "parquet of plain bytes": lambda rows, root: write_parquet(rows, root, struct=False),
    "parquet without metadata": lambda rows, root: write_parquet(rows, root, named=False),
    "parquet without paths": lambda rows, root: write_parquet(rows, root, path=False),
    "webdataset cls": write_tars,
    "webdataset json": lambda rows, root: write_tars(rows, root, label="json"),
}


def contents(source: Source) -> dict[str, Counter[tuple[str, tuple[int, ...], bytes]]]:
    """What a source gives: by split, the class and the pixels of every image."""
    found = {}
    for split in SPLITS:
        read = Counter()
        samples = pickle.loads(pickle.dumps(source.samples(split)))
        for sample in sorted(samples, key=lambda sample: (sample.uri, sample.where)):
            pixels = np.asarray(source.read(sample))
            read[source.class_names[sample.label], pixels.shape, pixels.tobytes()] += 1
        assert len({sample.key for sample in samples}) == len(samples)
        found[split] = read
    return found


@pytest.mark.parametrize("kind", WRITERS)
def test_all_kinds_read_the_same(cifar: list[Row], tmp_path: Path, kind: str) -> None:
    options = WRITERS[kind](cifar, tmp_path / "set")
    source = open_source(SourceConfig(path=str(tmp_path / "set"), **options))
    expected = {split: Counter() for split in SPLITS}
    for split, name, data in cifar:
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        expected[split][name, pixels.shape, pixels.tobytes()] += 1
    assert list(source.class_names) == sorted({name for _, name, _ in cifar})
    assert contents(source) == expected
    assert source.rejected == ()
    assert (expected["train"].total(), expected["val"].total()) == (120, 50)


def test_torchvision_reads_the_same(shared_data: Path, tmp_path: Path) -> None:
    """The first images of Fashion-MNIST, in files as torchvision has them and in all the others."""
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    read: dict[str, np.ndarray] = {}
    for name, kept, head in (("images-idx3", 784, 16), ("labels-idx1", 1, 8)):
        for part, count in (("train", 200), ("t10k", 60)):
            with gzip.open(shared_data / f"fashion-mnist/{part}-{name}-ubyte.gz") as file:
                data = file.read(head + kept * count)
            data = data[:4] + count.to_bytes(4, "big") + data[8:]
            (raw / f"{part}-{name}-ubyte").write_bytes(data)
            read[part + name] = np.frombuffer(data[head:], np.uint8).reshape(count, kept)
    source = open_source(SourceConfig(kind="torchvision", path=str(tmp_path), name="FashionMNIST"))
    assert source.class_names[9] == "Ankle boot"
    rows: list[Row] = [
        (split, source.class_names[int(label[0])], png(Image.fromarray(image.reshape(28, 28))))
        for split, part in (("train", "train"), ("val", "t10k"))
        for image, label in zip(read[f"{part}images-idx3"], read[f"{part}labels-idx1"], strict=True)
    ]
    ours = contents(source)
    assert ours["train"].total() == 200
    for kind in ("folder", "parquet", "webdataset cls"):
        options = WRITERS[kind](rows, tmp_path / kind)
        other = contents(open_source(SourceConfig(path=str(tmp_path / kind), **options)))
        # A folder cannot be called T-shirt/top.
        renamed = {
            split: Counter(
                {(name.replace("/", "-"), *rest): n for (name, *rest), n in part.items()}
            )
            for split, part in ours.items()
        }
        assert other == (renamed if kind == "folder" else ours)
    assert ours["train"] != ours["val"]


def test_torchvision_says_how_to_get_the_data(tmp_path: Path) -> None:
    config = SourceConfig(kind="torchvision", path=str(tmp_path), name="CIFAR10")
    with pytest.raises(SourceError, match=r"no CIFAR10 .*--source.download true") as caught:
        open_source(config)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["parquet", "webdataset cls", "folder"])
def test_object_stores_and_patterns(cifar: list[Row], tmp_path: Path, kind: str) -> None:
    options = WRITERS[kind](cifar, tmp_path / "set")
    store = UPath(f"memory://test-kinds/{kind.split()[0]}")
    for path in (tmp_path / "set").rglob("*.*"):
        copy = store / path.relative_to(tmp_path / "set").as_posix()
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    here = open_source(SourceConfig(path=str(tmp_path / "set"), **options))
    there = open_source(SourceConfig(path=str(store), **options))
    assert contents(there) == contents(here)
    for split in SPLITS:
        keys = [(s.key, s.label) for s in here.samples(split)]
        assert keys == [(s.key, s.label) for s in there.samples(split)]
    if kind != "folder":
        pattern = {"parquet": "data/train-*.parquet", "webdataset cls": "train-{000..002}.tar"}
        other = {"parquet": "data/test-*.parquet", "webdataset cls": "val-00[0-9].tar"}
        for root in (tmp_path / "set", store):
            path, val_path = f"{root}/{pattern[kind]}", f"{root}/{other[kind]}"
            source = open_source(SourceConfig(path=path, val_path=val_path, **options))
            assert contents(source) == contents(here)
            held = open_source(SourceConfig(path=path, val_fraction=0.3, **options))
            assert 12 < len(held.samples("val")) < 70
            assert len(held.samples("val")) + len(held.samples("train")) == 120


def test_subsets_of_imagenet(tmp_path: Path) -> None:
    squawk = subset_folders("imagesquawk")
    assert len(squawk) == 10
    assert next(iter(squawk.items())) == ("n01806143", "peacock")
    image = png(Image.new("RGB", (4, 4)))
    folders = [*squawk, "n01440764", "n99999999"]
    write_folder([(s, f, image) for f in folders for s in ("train", "val")], tmp_path / "set")
    config = {"kind": "folder", "path": str(tmp_path / "set")}
    source = open_source(SourceConfig(subset="imagesquawk", **config))
    assert source.class_names == tuple(squawk.values())
    for sample in source.samples("train") + source.samples("val"):
        assert sample.key.split("/")[1] == list(squawk)[sample.label]
    some = open_source(SourceConfig(subset="n99999999,n01440764", **config))
    assert some.class_names == ("n99999999", "tench")
    assert [s.label for s in some.samples("val")] == [0, 1]
    with pytest.raises(SourceError, match="lacks 9 of the 10 classes"):
        open_source(SourceConfig(subset="imagenette", **config))
    with pytest.raises(SourceError, match=r"must be one of imagefruit, .* got 'imagesquak'"):
        open_source(SourceConfig(subset="imagesquak", **config))


def test_classes_of_imagenet_bear_words(tmp_path: Path) -> None:
    """In a plain folder, too; labels and keys are as without the words."""
    image = png(Image.new("RGB", (4, 4)))
    folders = ["n01440764", "n02102040", "n99999999"]
    write_folder([(s, f, image) for f in folders for s in ("train", "val")], tmp_path / "set")
    source = open_source(SourceConfig(kind="folder", path=str(tmp_path / "set")))
    assert source.class_names == ("tench", "English springer", "n99999999")
    for sample in source.samples("train") + source.samples("val"):
        assert sample.key.split("/")[1] == folders[sample.label]
    write_folder([("train", "tench", image)], tmp_path / "set")
    clash = open_source(SourceConfig(kind="folder", path=str(tmp_path / "set")))
    assert clash.class_names == (*folders, "tench")  # no two classes of one name


@pytest.mark.parametrize("kind", ["folder", "parquet without metadata", "webdataset cls"])
def test_class_names_from_a_file(kind: str, tmp_path: Path) -> None:
    image = png(Image.new("RGB", (4, 4)))
    rows = [(split, label, image) for split in ("train", "val") for label in "ab"] * 2
    WRITERS[kind](rows, tmp_path / "set")
    names = tmp_path / "names.txt"
    names.write_text("hot dog\n\nécureuil\n", encoding="utf-8")
    config = {"kind": kind.split()[0], "path": str(tmp_path / "set")}
    source = open_source(SourceConfig(class_names=str(names), **config))
    assert source.class_names == ("hot dog", "écureuil")
    listed = open_source(SourceConfig(class_names=["hot dog", "écureuil"], **config))
    assert listed.class_names == source.class_names
    assert listed.fingerprint() == source.fingerprint()
    with pytest.raises(SourceError, match=r"nowhere\.txt"):
        open_source(SourceConfig(class_names=str(tmp_path / "nowhere.txt"), **config))
    if kind == "folder":
        with pytest.raises(SourceError, match="has 1 names for the 2 class folders of"):
            open_source(SourceConfig(class_names=["one"], **config))


def test_titles_are_no_part_of_the_fingerprint() -> None:
    """So that what was made before a title was known is found again."""
    samples = [Sample(key, label, key) for label, key in enumerate("abcd")]

    def source(names: str, **titles: str) -> SampleList:
        return SampleList(Found(names, samples, samples, [], titles=titles), val_fraction=0.1)

    assert source("abcd", b="beta").class_names == ("a", "beta", "c", "d")
    assert source("abcd", b="beta").fingerprint() == source("abcd").fingerprint()
    assert source("abcd").fingerprint() != source("abxd").fingerprint()


def test_tiny_imagenet_as_its_authors_pack_it(tmp_path: Path) -> None:
    """train/<wnid>/images/, val/images/ with val_annotations.txt, test/images/ without labels."""
    wnids = ("n01443537", "n99999999")
    for wnid in wnids:
        folder = tmp_path / "train" / wnid
        (folder / "images").mkdir(parents=True)
        (folder / f"{wnid}_boxes.txt").write_text("x")
        for number in range(3):
            Image.new("RGB", (64, 64)).save(folder / "images" / f"{wnid}_{number}.JPEG")
    for part in ("val", "test"):
        (tmp_path / part / "images").mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (64, 64)).save(tmp_path / part / "images" / f"{part}_{number}.JPEG")
    rows = [f"val_{n}.JPEG\t{wnids[n % 2]}\t0\t0\t63\t63" for n in range(4)]
    (tmp_path / "val/val_annotations.txt").write_text("\n".join(rows) + "\n")
    (tmp_path / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\n")
    source = open_source(SourceConfig(kind="folder", path=str(tmp_path)))
    assert source.class_names == ("goldfish", "n99999999")
    assert not source.rejected
    assert [sample.label for sample in source.samples("train")] == [0] * 3 + [1] * 3
    expected = [(f"val/images/val_{n}.JPEG", n % 2) for n in range(4)]
    assert [(s.key, s.label) for s in source.samples("val")] == expected
    assert source.read(source.samples("val")[0]).size == (64, 64)


def test_imagenet_as_kaggle_packs_it(tmp_path: Path) -> None:
    base = tmp_path / "ILSVRC/Data/CLS-LOC"
    rows = [("n01440764", 3), ("n02102040", 2)]
    for wnid, count in rows:
        for number in range(count):
            path = base / f"train/{wnid}/{wnid}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(path)
    table = ["ImageId,PredictionString"]
    for number, wnid in enumerate(["n02102040", "n01440764", "n03000684"]):
        path = base / f"val/ILSVRC2012_val_{number:08d}.JPEG"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
        table.append(f"{path.stem},{wnid} 1 2 3 4")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(table))
    source = open_source(SourceConfig(kind="folder", path=str(tmp_path)))
    assert [s.label for s in source.samples("train")] == [0, 0, 0, 1, 1]
    assert [(s.key[-5 - 8 :], s.label) for s in source.samples("val")] == [
        ("00000000.JPEG", 1),
        ("00000001.JPEG", 0),
    ]


class ToySource(SampleList):
    """All that a new source takes."""

    def __init__(self, count: int, **fractions: float) -> None:
        samples = [Sample(f"{k}", k % 2, f"{k}") for k in range(count)]
        super().__init__(Found(["even", "odd"], samples, None, [count]), **fractions)

    @staticmethod
    def read(sample: Sample) -> Image.Image:
        return Image.new("L", (2, 2), int(sample.uri))


def test_selection_is_held_out_of_train_and_stays() -> None:
    whole = ToySource(2000, val_fraction=0.1)
    source = ToySource(2000, val_fraction=0.1, selection_fraction=0.2)
    keys = {split: {s.key for s in source.samples(split)} for split in SPLITS}
    assert sum(map(len, keys.values())) == len(set().union(*keys.values())) == 2000
    assert keys["val"] == {s.key for s in whole.samples("val")}
    assert whole.samples("select") == []
    for label in (0, 1):
        part = [s for s in source.samples("select") if s.label == label]
        assert abs(len(part) / 900 - 0.2) < 0.05
    grown = ToySource(3000, val_fraction=0.1, selection_fraction=0.2)
    for split in SPLITS:
        assert keys[split] == {s.key for s in grown.samples(split) if int(s.key) < 2000}
    assert len({s.fingerprint() for s in (whole, source, grown)}) == 3
    alone = ToySource(2, val_fraction=0.1, selection_fraction=0.5)
    assert [len(alone.samples(split)) for split in SPLITS] == [2, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "parquet"}, "source.kind parquet needs source.path: a directory of Parquet"),
        ({"kind": "torchvision", "path": "x"}, "needs source.name, for instance CIFAR10"),
        ({"kind": "parquet", "path": "x", "subset": "y"}, "source.subset needs source.kind folder"),
        ({"kind": "folder", "path": "x", "val_path": "y"}, "needs source.kind parquet or webd"),
        ({"selection_fraction": 1.0}, "got 1.0"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(**options)


def test_wrong_files_are_told_in_one_line(cifar: list[Row], tmp_path: Path) -> None:
    write_parquet(cifar, tmp_path / "p")
    files = sorted((tmp_path / "p/data").iterdir())
    cases: list[tuple[dict[str, object], str]] = [
        ({"path": "nowhere"}, "there is no"),
        ({"path": str(tmp_path)[: -len(tmp_path.name)] + "*/q"}, "no \\*.parquet"),
        ({"path": str(tmp_path / "p"), "image": "x"}, "has no column x; it has img, label"),
        ({"path": str(tmp_path / "p"), "image": "label"}, "holds int64"),
    ]
    for options, message in cases:
        with pytest.raises(SourceError, match=message) as caught:
            open_source(SourceConfig(kind="parquet", **options))
        assert "\n" not in str(caught.value)
    files[-1].write_bytes(files[-1].read_bytes()[:200])
    with pytest.raises(SourceError, match="not a valid Parquet file"):
        open_source(SourceConfig(kind="parquet", path=str(tmp_path / "p")))
