"""The shard stage: what it writes, that it goes on where it was cut off, and who can read it."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torchvision.transforms.functional as TF
import webdataset
from numbered import everything
from PIL import Image
from upath import UPath

from pipeline.data.shards import encode, square, write_shard
from pipeline.data.sources import SPLITS, Sample, Split
from pipeline.data.sources.folder import FolderSource
from pipeline.data.store import Store
from pipeline.errors import SourceError
from pipeline.runtime.files import Manifest
from pipeline.runtime.identity import fingerprint
from pipeline.stages.shard import (
    FEWEST_IMAGES,
    MOST_IMAGES,
    ShardConfig,
    build_manifest,
    bundles,
    plan,
    shard,
)

CONFIG = ShardConfig(image_size=32, shard_size=16, max_bad=0.02)


def folder(path: Path) -> FolderSource:
    return FolderSource(UPath(path), 0.1)


def write_serially(source: FolderSource, config: ShardConfig, directory: Path) -> Manifest:
    """What `shard` does, without Ray and in another order."""
    for split in SPLITS:
        (directory / split).mkdir(parents=True, exist_ok=True)
    results = [
        (task, write_shard(task, read=source.read, config=config, directory=directory, identity=""))
        for task in reversed(plan(source, config.samples_per_shard))
    ]
    return build_manifest(source, config, list(reversed(results)))


def tars(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.glob("*/*.tar")}


def times(directory: Path) -> dict[str, int]:
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in directory.glob("*/*")}


@pytest.fixture(scope="module")
def tree(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four CIFAR-10 classes of 40 train and 10 val images, one image cut off and one no image."""
    root = tmp_path_factory.mktemp("tree")
    with tarfile.open(shared_data / "cifar10-lossless-1500.tar") as tar:
        members = sorted((m for m in tar if m.isfile()), key=lambda m: m.name)
        for part, count in (("train", 40), ("val", 10)):
            for name in ("airplane", "cat", "ship", "truck"):
                chosen = [m for m in members if m.name.startswith(f"{part}/{name}/")][:count]
                tar.extractall(root, members=chosen, filter="data")
    broken = sorted((root / "train/cat").glob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:300])
    (root / "train/ship/note.jpg").write_text("no image")
    return root


@pytest.fixture(scope="module")
def sharded(
    tree: Path, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    directory = tmp_path_factory.mktemp("sharded")
    return directory, shard(folder(tree), CONFIG, UPath(directory))


def test_manifest_tells_what_was_written(tree: Path, sharded: tuple[Path, Manifest]) -> None:
    directory, manifest = sharded
    assert manifest["class_names"] == ["airplane", "cat", "ship", "truck"]
    assert manifest["splits"]["train"]["counts"] == [40, 39, 40, 40]
    assert manifest["splits"]["val"]["counts"] == [10, 10, 10, 10]
    for part in manifest["splits"].values():
        for entry in part["shards"]:
            data = (directory / entry["path"]).read_bytes()
            assert len(data) == entry["bytes"]
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                names = tar.getnames()
            assert len(names) == 2 * entry["count"] <= 32
            assert all(name.count(".") == 1 and "/" not in name for name in names)
    written = {entry["path"] for part in manifest["splits"].values() for entry in part["shards"]}
    assert set(tars(directory)) == written
    bad = {entry["key"]: entry["reason"] for entry in manifest["quarantine"]}
    assert bad.keys() == {
        "train/cat/" + sorted((tree / "train/cat").iterdir())[3].name,
        "train/ship/note.jpg",
    }
    assert all(reason.startswith(("OSError", "UnidentifiedImageError")) for reason in bad.values())
    assert json.loads(json.dumps(manifest)) == manifest


def test_lossless_shards_hold_the_very_pixels(tree: Path, sharded: tuple[Path, Manifest]) -> None:
    directory, manifest = sharded
    seen = set()
    for split in SPLITS:
        for entry in manifest["splits"][split]["shards"]:
            path = directory / entry["path"]
            keys = json.loads(path.with_suffix(".json").read_text())["keys"]
            with tarfile.open(path) as tar:
                images = [m for m in tar if m.name.endswith(".png")]
                for key, member in zip(keys, images, strict=True):
                    stored = Image.open(tar.extractfile(member))
                    np.testing.assert_array_equal(stored, Image.open(tree / key))
                    assert manifest["class_names"][entry["class"]] == key.split("/")[1]
            seen.update(keys)
    assert len(seen) == 199


def test_statistics_are_those_of_all_train_pixels(sharded: tuple[Path, Manifest]) -> None:
    directory, manifest = sharded
    images = everything(Store(UPath(directory), manifest), "train")[0].double() / 255
    pixels = images.permute(1, 0, 2, 3).flatten(1)
    np.testing.assert_allclose(manifest["mean"], pixels.mean(1), rtol=1e-12)
    np.testing.assert_allclose(manifest["std"], pixels.std(1, correction=0), rtol=1e-12)


def test_statistics_of_classes(sharded: tuple[Path, Manifest]) -> None:
    directory, manifest = sharded
    images, labels = everything(Store(UPath(directory), manifest), "train")
    assert len(manifest["by_class"]) == 4
    for label, entry in enumerate(manifest["by_class"]):
        pixels = images[labels == label].double().permute(1, 0, 2, 3).flatten(1) / 255
        np.testing.assert_allclose(entry["mean"], pixels.mean(1), rtol=1e-12)
        np.testing.assert_allclose(entry["std"], pixels.std(1, correction=0), rtol=1e-12)


def test_bytes_do_not_depend_on_parallelism(
    tree: Path, sharded: tuple[Path, Manifest], tmp_path: Path
) -> None:
    directory, manifest = sharded
    serial = write_serially(folder(tree), CONFIG, tmp_path)
    assert tars(tmp_path) == tars(directory)
    assert {**serial, "peak_rss_bytes": 0} == {**manifest, "peak_rss_bytes": 0}


def test_only_what_is_missing_is_written_again(
    tree: Path, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tree)
    monkeypatch.chdir(tmp_path)  # the tasks run elsewhere: nothing may depend on it
    directory = Path("shards")
    first = shard(source, CONFIG, UPath(directory))
    whole, before = tars(directory), times(directory)
    (directory / "train/0001-00000.tar").unlink()
    (directory / "train/0002-00001.json").unlink()
    (directory / "val/0003-00000.tar").write_bytes(b"cut off")
    (directory / "train/.0000-00002.tar.1.tmp").write_bytes(b"left over")
    again = shard(source, CONFIG, UPath(directory))
    assert tars(directory) == whole
    changed = {name for name, t in times(directory).items() if t != before.get(name)}
    # Those with bad images are tried again: somebody may have seen to them.
    records = [json.loads(path.read_text()) for path in directory.glob("*/*.json")]
    bad = {record["name"] for record in records if record["quarantine"]}
    assert len(bad) == 2
    assert {name.rpartition(".")[0] for name in changed if not name.endswith(".tmp")} == bad | {
        "train/0001-00000",
        "train/0002-00001",
        "val/0003-00000",
    }
    assert {**again, "peak_rss_bytes": 0} == {**first, "peak_rss_bytes": 0}
    other = shard(source, ShardConfig(image_size=16, shard_size=16), UPath(directory))
    assert other["image_size"] == 16
    assert everything(Store(UPath(directory), other), "train")[0].shape == (159, 3, 16, 16)


SLOW_WRITER = """
import sys, time
from upath import UPath
from pipeline.stages.shard import plan
from pipeline.data.shards import ShardConfig, write_shard
from pipeline.data.sources.folder import FolderSource

def slow(sample):
    time.sleep(0.01)
    return FolderSource.read(sample)

source, config = FolderSource(UPath(sys.argv[1]), 0.1), ShardConfig(image_size=32, shard_size=16)
for task in plan(source, config.samples_per_shard):
    write_shard(task, read=slow, config=config, directory=UPath(sys.argv[2]), identity="")
"""


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.long)])
def test_killed_anywhere_the_bytes_are_the_same(tree: Path, tmp_path: Path, kills: int) -> None:
    write_serially(folder(tree), CONFIG, tmp_path / "whole")
    whole = tars(tmp_path / "whole")
    moments = random.Random(0)
    for split in SPLITS:
        (tmp_path / "killed" / split).mkdir(parents=True)
    for kill in range(kills):
        before = tars(tmp_path / "killed")
        command = [sys.executable, "-c", SLOW_WRITER, str(tree), str(tmp_path / "killed")]
        with subprocess.Popen(command) as process:
            # At work, by its temporary file or the next shard; then any time within a shard or two.
            deadline = time.monotonic() + 120
            while len(tars(tmp_path / "killed")) <= kill * len(whole) // (kills + 2):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
        left = tars(tmp_path / "killed")
        assert before.items() <= left.items() <= whole.items()  # what has its final name is whole
    assert 0 < len(left) < len(whole)
    write_serially(folder(tree), CONFIG, tmp_path / "killed")
    assert tars(tmp_path / "killed") == whole


STAGE = """
import sys, time
import ray
from upath import UPath
from pipeline.data.shards import ShardConfig
from pipeline.stages.shard import shard
from pipeline.data.sources.folder import FolderSource

def slow(sample):
    time.sleep(0.1)
    return FolderSource.read(sample)

ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
source = FolderSource(UPath(sys.argv[1]), 0.1)
source.read = slow
shard(source, ShardConfig(image_size=32, shard_size=4, max_bad=0.02), UPath(sys.argv[2]))
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_stage_itself_killed_leaves_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    config = ShardConfig(image_size=32, shard_size=4, max_bad=0.02)
    write_serially(folder(tree), config, tmp_path / "whole")
    whole, moments = tars(tmp_path / "whole"), random.Random(1)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", STAGE, str(tree), str(killed)]
    kills = 0
    while kills < 10:
        before = len(tars(killed))
        with subprocess.Popen(command) as process:
            while len(tars(killed)) == before and process.poll() is None:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.8))
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
        time.sleep(1)  # the tasks end with their driver
        assert tars(killed).items() <= whole.items()
        if len(tars(killed)) == len(whole):
            shutil.rmtree(killed)
    subprocess.run(command, check=True)
    assert tars(killed) == whole


def test_a_killed_task_is_tried_again(tree: Path, ray_cluster: str, tmp_path: Path) -> None:
    whole = write_serially(folder(tree), CONFIG, tmp_path / "whole")
    source, marker = folder(tree), str(tmp_path / "killed once")
    victim = source.samples("train")[60].key

    def read(sample: Sample) -> Image.Image:
        if sample.key == victim and not os.path.exists(marker):  # noqa: PTH110
            os.close(os.open(marker, os.O_CREAT))
            os.kill(os.getpid(), signal.SIGKILL)
        return FolderSource.read(sample)

    source.read = read
    manifest = shard(source, CONFIG, UPath(tmp_path / "shards"))
    assert os.path.exists(marker)  # noqa: PTH110
    assert tars(tmp_path / "shards") == tars(tmp_path / "whole")
    assert {**manifest, "peak_rss_bytes": 0} == {**whole, "peak_rss_bytes": 0}


FULL_DISK = """
import resource, sys
from pathlib import Path
from pipeline.errors import StorageError
from pipeline.runtime.files import write_atomic

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_atomic(Path(sys.argv[1]) / "small", bytes(1000))
try:
    write_atomic(Path(sys.argv[1]) / "large.tar", bytes(1001))
except StorageError as error:
    print(error)
"""


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"cannot write {tmp_path}/large.tar: File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("cpus", [1, 2, 100])
def test_bundles_grow_smaller_and_hold_every_shard_once(cpus: int) -> None:
    tasks = plan(ListedSource([Sample(f"{k}", k % 2, "") for k in range(30_000)]), 100)
    found = bundles(tasks, cpus)
    assert [task for bundle in found for task in bundle] == tasks
    images = [sum(len(task.samples) for task in bundle) for bundle in found]
    assert max(images) <= MOST_IMAGES
    assert images == sorted(images, reverse=True)
    assert images[0] == {1: MOST_IMAGES, 2: MOST_IMAGES, 100: 200}[cpus]
    assert images[-1] <= FEWEST_IMAGES
    # What each of them costs, 0.15 s, is little beside the 60 s that all images take on one CPU.
    assert len(found) <= max(20, 30_000 / FEWEST_IMAGES)
    assert bundles([], cpus) == []


@pytest.mark.parametrize("encoding", ["png", "jpeg", "raw"])
def test_other_libraries_read_the_shards(
    tree: Path, ray_cluster: str, tmp_path: Path, encoding: str
) -> None:
    import ray.data

    config = ShardConfig(image_size=24, encoding=encoding, shard_size=15)
    manifest = write_serially(folder(tree), config, tmp_path)
    images, labels = everything(Store(UPath(tmp_path), manifest), "val")
    suffix = {"png": "png", "jpeg": "jpg", "raw": "npy"}[encoding]
    paths = [str(tmp_path / entry["path"]) for entry in manifest["splits"]["val"]["shards"]]
    by_webdataset = [
        (sample["__key__"], sample[suffix], sample["cls"])
        for sample in webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8")
    ]
    by_ray = [
        (row["__key__"], row[suffix], row["cls"])
        for row in ray.data.read_webdataset(paths).iter_rows()
    ]
    assert len({key for key, _, _ in by_webdataset}) == len(images) == 40
    # Ray Data keeps no order of files.
    for theirs in (by_webdataset, sorted(by_ray, key=lambda row: row[0])):
        for k, (_, pixels, label) in enumerate(theirs):
            assert int(label) == int(labels[k])
            np.testing.assert_array_equal(pixels, images[k].permute(1, 2, 0))


def stored(image: Image.Image, size: int, channels: int = 3, fit: str = "crop") -> Image.Image:
    return square(image, ShardConfig(image_size=size, channels=channels, fit=fit))


def test_square_is_resize_and_centre_crop() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = TF.center_crop(TF.resize(image, [30]), [30])  # short side 90 -> 30, long 150 -> 50
    np.testing.assert_array_equal(stored(image, 30), expected)
    np.testing.assert_array_equal(stored(image.crop((0, 0, 90, 90)), 90), noise[:, :90])
    # Without antialiasing the resized noise would keep its contrast.
    assert np.asarray(stored(image, 15)).std() < 0.5 * noise.std()
    grey = stored(image, 30, 1)
    assert grey.mode == "L"
    assert np.ptp(np.asarray(stored(grey, 30)), axis=-1).max() == 0


@pytest.mark.parametrize("wide", [True, False])
def test_padded_and_stretched_images_are_whole(wide: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 150, 3), dtype=np.uint8)
    image = Image.fromarray(noise if wide else noise.transpose(1, 0, 2))
    stretched = TF.resize(image, [30, 30])
    np.testing.assert_array_equal(stored(image, 30, fit="stretch"), stretched)
    shape = [12, 30] if wide else [30, 12]  # in the middle of 30 x 30
    expected = TF.pad(TF.resize(image, shape), [0, 9] if wide else [9, 0])
    np.testing.assert_array_equal(stored(image, 30, fit="pad"), expected)
    for fit in ("crop", "pad", "stretch"):  # a square has nothing to fit
        np.testing.assert_array_equal(stored(stretched, 30, fit=fit), stretched)


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_square_takes_any_shape(fit: str) -> None:
    for size in ((1, 1), (1, 30_000), (30_000, 2), (5, 7)):
        colours = dict(map(reversed, stored(Image.new("L", size, 77), 8, fit=fit).getcolors()))
        bars = 0 if fit != "pad" else 64 - 8 * max(1, round(8 * min(size) / max(size)))
        assert colours == {(77, 77, 77): 64 - bars} | ({(0, 0, 0): bars} if bars else {})


def test_an_identity_has_what_the_shards_depend_on() -> None:
    earlier = fingerprint(
        {"image_size": 32, "channels": 3, "encoding": "png", "jpeg_quality": 95}
        | {"shard_size": 1000, "shard_mib": 64, "max_bad": 0.0}
    )
    assert fingerprint(ShardConfig()) == fingerprint(ShardConfig(max_bad=0.5)) == earlier
    assert fingerprint(ShardConfig(fit="pad")) != earlier


def test_encodings_keep_the_pixels() -> None:
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    image = Image.fromarray(
        np.stack(np.broadcast_arrays(ramp, ramp[:, None], 128), -1).astype("u1")
    )
    for encoding in ("png", "jpeg"):
        stored = Image.open(io.BytesIO(encode(image, ShardConfig(encoding=encoding))))
        loss = np.abs(np.asarray(stored).astype(int) - np.asarray(image)).max()
        assert loss <= (6 if encoding == "jpeg" else 0)
    raw = np.load(io.BytesIO(encode(image, ShardConfig(encoding="raw"))), allow_pickle=False)
    np.testing.assert_array_equal(raw, image)


class ListedSource:
    """Keys without images."""

    class_names = ("a", "b")
    rejected = ()

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    def samples(self, split: Split) -> list[Sample]:
        return self._samples if split == "train" else []

    def fingerprint(self) -> str:
        return "listed"

    @staticmethod
    def read(sample: Sample) -> Image.Image:
        raise OSError("there is\nnothing")


def test_plan_divides_every_class_in_the_order_of_hashes() -> None:
    samples = [Sample(f"{k}", k % 2, "") for k in range(50)]
    tasks = plan(ListedSource(samples), 10)
    assert [(t.class_index, t.number, t.first, len(t.samples)) for t in tasks] == [
        (0, 0, 0, 10),
        (0, 1, 10, 10),
        (0, 2, 20, 5),
        (1, 0, 0, 10),
        (1, 1, 10, 10),
        (1, 2, 20, 5),
    ]
    assert plan(ListedSource(samples[::-1]), 10) == tasks
    keys = [int(sample.key) for task in tasks[:3] for sample in task.samples]
    assert sorted(keys) == list(range(0, 50, 2))
    assert keys != sorted(keys)


def test_duplicate_keys_are_refused() -> None:
    with pytest.raises(SourceError, match="share the key 'x'"):
        plan(ListedSource([Sample("x", 0, "1"), Sample("x", 0, "2")]), 10)


def test_a_class_without_a_readable_image_stops_the_stage(tmp_path: Path) -> None:
    source = ListedSource([Sample("x", 0, "")])
    (tmp_path / "train").mkdir()
    (task,) = plan(source, 10)
    record = write_shard(
        task, read=source.read, config=CONFIG, directory=UPath(tmp_path), identity=""
    )
    assert record["quarantine"] == [{"key": "x", "reason": "OSError: there is nothing"}]
    assert tars(tmp_path) == {}
    with pytest.raises(SourceError, match="class 'a'"):
        build_manifest(source, CONFIG, [(task, record)])


def test_long_tails_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, count in (("a", 2), ("b", 22)):
        for number in range(count):
            path = tmp_path / f"tree/{name}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(path)
    write_serially(folder(tmp_path / "tree"), CONFIG, tmp_path / "shards")
    assert "long-tailed: from 1 train images (a) to" in caplog.text


def test_shards_are_bounded_in_bytes() -> None:
    assert ShardConfig(image_size=32).samples_per_shard == 1000
    assert ShardConfig(image_size=224, shard_mib=16).samples_per_shard == 16 * 2**20 // 152_576
    assert ShardConfig(image_size=8192, shard_mib=1).samples_per_shard == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"shard_size": 0}, "shard_size must be at least 1, got 0"),
        ({"max_bad": 1.5}, r"max_bad must be within \[0, 1\], got 1.5"),
        ({"jpeg_quality": 101}, "jpeg_quality must be 1 to 100, got 101"),
        ({"fit": "squeeze"}, "fit must be one of crop, pad, stretch, got 'squeeze'"),
    ],
)
def test_wrong_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardConfig(**options)


@pytest.fixture(autouse=True)
def _no_noise(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Ray Data's own progress, information and hints stay off the console."""
    yield
    console = capfd.readouterr()
    assert "execution" not in console.err
    assert "Progress bars disabled" not in console.err
