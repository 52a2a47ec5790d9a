"""Streams: batches of classes and epochs over splits, under a budget."""

import math
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from upath import UPath

from ncfm.images import ImageSource
from pipeline.shard import ShardConfig, build_manifest, plan
from pipeline.shard_writer import write_shard
from pipeline.sources import SPLITS, FolderSource, Sample, Source, Split
from pipeline.stream import ClassStreams, ShardError, ShardSet, StreamedImages, pool_sizes

COUNTS = {"train": (100, 64, 7), "val": (5, 0, 3), "select": (0, 0, 0)}
IMAGE_BYTES = 3 * 4 * 4


class NumberedSource:
    """Plain images of 4 x 4 px whose colour tells the class and the number."""

    class_names = ("a", "b", "c")
    rejected = ()

    def samples(self, split: Split) -> list[Sample]:
        return [
            Sample(f"{split}/{label}/{number}", label, f"{label} {number}")
            for label, count in enumerate(COUNTS[split])
            for number in range(count)
        ]

    def fingerprint(self) -> str:
        return "numbered"

    @staticmethod
    def read(sample: Sample) -> Image.Image:
        label, number = map(int, sample.uri.split())
        return Image.new("RGB", (4, 4), (label, number, 255))


def write_set(source: Source, config: ShardConfig, directory: Path | UPath) -> ShardSet:
    for split in SPLITS:
        (directory / split).mkdir(parents=True, exist_ok=True)
    results = [
        (task, write_shard(task, read=source.read, config=config, directory=directory, identity=""))
        for task in plan(source, config.samples_per_shard)
    ]
    return ShardSet(UPath(directory), build_manifest(source, config, results))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    config = ShardConfig(image_size=4, shard_size=30)
    return write_set(NumberedSource(), config, tmp_path_factory.mktemp("numbered") / "set")


def numbers(images: Tensor, label: int | None = None) -> list[int]:
    """The numbers of images of one class."""
    assert images.dtype == torch.uint8
    assert images.shape[1:] == (3, 4, 4)
    assert (images == images[:, :, :1, :1]).all()
    assert (images[:, 2] == 255).all()
    if label is not None:
        assert (images[:, 0] == label).all()
    return images[:, 1, 0, 0].tolist()


# --- ShardSet -------------------------------------------------------------------------------------


def test_load_gives_everything_in_the_order_of_the_shards(shards: ShardSet) -> None:
    assert shards.spec.class_names == ("a", "b", "c")
    assert shards.counts("train") == [100, 64, 7]
    data = shards.load("train")
    assert data.labels.tolist() == [0] * 100 + [1] * 64 + [2] * 7
    for label, count in enumerate(COUNTS["train"]):
        found = numbers(data.images[data.labels == label], label)
        assert sorted(found) == list(range(count))
    torch.testing.assert_close(shards.load("train", [2, 0]).images[100:], data.images[164:])
    assert len(shards.load("val", [1])) == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "5000 bytes"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAX")), "SHA-256"),
    ],
)
def test_damage_is_told_with_the_file_and_the_remedy(
    shards: ShardSet, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(shards.directory, tmp_path / "set")
    copy = ShardSet(UPath(tmp_path / "set"), shards.manifest)
    damage(tmp_path / "set/train/0001-00001.tar")
    copy.load("train", [0, 2])
    for use in (
        lambda: copy.load("train"),
        lambda: ClassStreams(copy, [1], 10**6, 0).batch(1, 0, 1),
        lambda: list(StreamedImages(copy, "train", 100 * IMAGE_BYTES).epoch(8, None)),
    ):
        with pytest.raises(ShardError, match=message) as caught:
            use()
        assert "train/0001-00001.tar" in str(caught.value)
        assert "run the shard stage again" in str(caught.value)


@pytest.mark.parametrize("encoding", ["png", "jpeg", "raw"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_encoding_is_read(tmp_path: Path, encoding: str, channels: int) -> None:
    config = ShardConfig(image_size=4, encoding=encoding, channels=channels, jpeg_quality=100)
    data = write_set(NumberedSource(), config, tmp_path / "set").load("train", [0])
    assert data.images.shape == (100, channels, 4, 4)
    assert data.images.is_contiguous()
    if channels == 3:
        assert np.abs(np.sort(data.images[:, 1, 0, 0]).astype(int) - np.arange(100)).max() <= 2


def test_an_object_store_will_do(shards: ShardSet) -> None:
    config = ShardConfig(image_size=4, shard_size=30)
    stored = write_set(NumberedSource(), config, UPath("memory://test-stream/set"))
    again = write_set(NumberedSource(), config, UPath("memory://test-stream/set"))
    for copy in (stored, again):
        assert copy.manifest["splits"] == shards.manifest["splits"]
    streamed, local = (streams(source, budget=ROTATING) for source in (stored, shards))
    for step in (0, 4, 100):
        assert torch.equal(streamed.batch(0, step, 20), local.batch(0, step, 20))
    (UPath("memory://test-stream/set") / "train/0002-00000.tar").unlink()
    with pytest.raises(ShardError, match="missing"):
        stored.load("train")


def test_real_images(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "imagenette10-224.tar") as tar:
        members = [m for m in tar if m.isfile() and m.name.split("/")[1] < "n03"]
        tar.extractall(tmp_path / "tree", members=members[::30], filter="data")
    source = FolderSource(UPath(tmp_path / "tree"), 0.1)
    config = ShardConfig(image_size=224, shard_size=8)
    data = write_set(source, config, tmp_path / "set").load("val")
    expected = {np.asarray(source.read(s).convert("RGB")).tobytes() for s in source.samples("val")}
    assert {image.permute(1, 2, 0).numpy().tobytes() for image in data.images} == expected


# --- ClassStreams ---------------------------------------------------------------------------------

RESIDENT = 10**6
ROTATING = 60 * IMAGE_BYTES  # room for 7 of c, 26 of b, 27 of a
STEPS = range(0, 400, 3)


def streams(
    shards: ShardSet, classes: Iterable[int] = (0, 1, 2), *, budget: int = ROTATING, seed: int = 0
) -> ClassStreams:
    return ClassStreams(shards, classes, budget, seed, rotate_every=4)


@pytest.mark.parametrize("budget", [RESIDENT, ROTATING])
def test_batches_are_distinct_images_of_the_class(shards: ShardSet, budget: int) -> None:
    stream = streams(shards, budget=budget)
    for step in STEPS:
        for label, count in enumerate(COUNTS["train"]):
            found = numbers(stream.batch(label, step, 20), label)
            assert len(set(found)) == len(found) == min(20, count)


@pytest.mark.parametrize("budget", [RESIDENT, ROTATING])
def test_a_batch_depends_on_seed_step_and_class_alone(shards: ShardSet, budget: int) -> None:
    alone = streams(shards, budget=budget)
    expected = {(c, step): alone.batch(c, step, 16) for step in STEPS for c in (0, 1)}
    worker = streams(shards, [1], budget=budget)  # another division of the classes
    for step in STEPS:
        assert torch.equal(worker.batch(1, step, 16), expected[1, step])
    for step in reversed(STEPS):  # another history, as after a resume
        assert torch.equal(alone.batch(0, step, 16), expected[0, step])
    for step in STEPS[::40]:
        assert torch.equal(
            streams(shards, [0], budget=budget).batch(0, step, 16), expected[0, step]
        )
    other = streams(shards, budget=budget, seed=1)
    assert not any(torch.equal(other.batch(0, s, 16), expected[0, s]) for s in STEPS)
    assert not torch.equal(expected[0, 0], expected[0, 3])


def deviation(draws: Counter[int], count: int) -> float:
    """How far the numbers of draws are from equal: chi-squared in standard deviations."""
    mean = draws.total() / count
    chi2 = sum((draws[number] - mean) ** 2 / mean for number in range(count))
    return (chi2 - (count - 1)) / math.sqrt(2 * (count - 1))


@pytest.mark.parametrize("budget", [RESIDENT, ROTATING])
def test_all_images_of_a_class_are_drawn_equally_often(shards: ShardSet, budget: int) -> None:
    stream = streams(shards, budget=budget)
    # A window of 27 / 1.125 = 24 images moves by 3 every 4 steps: three times round in 400 steps.
    draws = Counter(n for step in range(800) for n in numbers(stream.batch(0, step, 10)))
    assert deviation(draws, 100) < 4
    # The negative control: always the first images of the class, as in the released code.
    first = streams(shards, budget=budget)
    fixed = first.batch(0, 0, 24)
    draws = Counter(n for step in range(800) for n in numbers(fixed[torch.randperm(24)[:10]]))
    assert deviation(draws, 100) > 50


def test_draws_for_other_purposes_know_no_budget(shards: ShardSet) -> None:
    small, large = streams(shards), streams(shards, budget=RESIDENT)
    drawn = small.batch(0, 0, 90, purpose="init")
    assert len(set(numbers(drawn, 0))) == 90
    assert torch.equal(drawn, large.batch(0, 0, 90, purpose="init"))
    assert not torch.equal(drawn, large.batch(0, 0, 90, purpose="other"))


def test_the_pool_stays_within_its_share(shards: ShardSet) -> None:
    stream = streams(shards)
    for step in STEPS:
        stream.batch(0, step, 20)
        stream.batch(1, step, 20)
    held = sum(
        pool._images.nbytes + pool._next.result().nbytes
        for pool in stream._pools.values()
        if pool._next
    )
    assert 0.8 * ROTATING < held + 7 * IMAGE_BYTES <= ROTATING


def test_small_classes_are_told_once(shards: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    stream = streams(shards, budget=RESIDENT)
    for step in range(3):
        for label in range(3):
            assert sorted(numbers(stream.batch(2, step, 20))) == list(range(7))
            stream.batch(label, step, 20)
    (record,) = caplog.records
    assert "1 of 3 classes are smaller than a batch of 20" in record.message
    assert "class 2, has 7" in record.message


def test_too_small_a_budget_is_told(shards: ShardSet) -> None:
    with pytest.raises(
        ValueError, match=r"room for 24 of its 100 images, fewer than a batch of 25"
    ):
        streams(shards).batch(0, 0, 25)
    with pytest.raises(ValueError, match="room for 0"):
        streams(shards, budget=0).batch(0, 0, 1)
    with pytest.raises(ValueError, match="no images"):
        ClassStreams(shards, [1], RESIDENT, 0, split="val").batch(1, 0, 1)


@given(
    counts=st.lists(st.integers(0, 100), min_size=1, max_size=9),
    budget=st.integers(0, 500),
)
def test_pool_sizes_share_the_budget(counts: list[int], budget: int) -> None:
    sizes = pool_sizes(counts, budget)
    assert sum(sizes) == min(sum(counts), budget)
    assert all(size <= count for size, count in zip(sizes, counts, strict=True))
    cut = [size for size, count in zip(sizes, counts, strict=True) if size < count]
    if cut:
        assert max(cut) - min(cut) <= 1
        assert max(sizes) <= max(cut) + 1  # what does not divide evenly goes to the largest


# --- StreamedImages -------------------------------------------------------------------------------


def pairs(source: ImageSource, generator: torch.Generator | None) -> list[tuple[int, int]]:
    found = []
    for images, labels in source.epoch(16, generator):
        assert labels.dtype == torch.int64
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
        found += zip(labels.tolist(), numbers(images), strict=True)
    return found


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("budget", [RESIDENT, ROTATING, 0])
def test_every_image_comes_once_an_epoch(shards: ShardSet, budget: int) -> None:
    source = StreamedImages(shards, "train", budget)
    everything = [(label, n) for label, count in enumerate(COUNTS["train"]) for n in range(count)]
    assert len(source) == len(everything) == 171
    first, second, again = (pairs(source, seeded(seed)) for seed in (0, 1, 0))
    assert sorted(first) == sorted(second) == everything
    assert first == again
    assert first != second
    data = shards.load("train")
    assert pairs(source, None) == list(zip(data.labels.tolist(), numbers(data.images), strict=True))
    sizes = [len(labels) for _, labels in source.epoch(16, seeded(0))]
    assert sizes == [16] * 10 + [11]


def test_streamed_batches_mix_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COUNTS, "train", (200, 200, 200))
    config = ShardConfig(image_size=4, shard_size=200)
    shards = write_set(NumberedSource(), config, tmp_path / "set")
    monkeypatch.setattr(StreamedImages, "PIECE", 8)
    monkeypatch.setattr(StreamedImages, "AHEAD", 4)
    source = StreamedImages(shards, "train", 300 * IMAGE_BYTES)
    mixed = [len(set(labels.tolist())) for _, labels in source.epoch(30, seeded(0))]
    assert min(mixed) == 3
    assert {len(set(labels.tolist())) for _, labels in source.epoch(30, None)} <= {1, 2}


def test_some_classes_and_an_early_end(shards: ShardSet) -> None:
    source = StreamedImages(shards, "train", 20 * IMAGE_BYTES, classes=[1, 2])
    assert len(source) == 71
    assert {label for label, _ in pairs(source, seeded(0))} == {1, 2}
    for _ in range(3):
        next(iter(source.epoch(4, seeded(0))))
    assert len(pairs(source, None)) == 71
