"""The node's store: made once, whole or not at all, whatever happens while it is made."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numbered import COUNTS, NumberedSource, everything, numbers, write_set
from upath import UPath

from pipeline.config import RunConfig
from pipeline.data import local, store
from pipeline.data.local import in_use, store_root
from pipeline.data.shards import ShardConfig
from pipeline.data.sources.folder import FolderSource
from pipeline.data.store import ClassFile, Store
from pipeline.errors import ShardError, StorageError
from pipeline.runtime.config import RuntimeConfig
from pipeline.stages.clean import Clean

CONFIG = ShardConfig(image_size=4, shard_size=30)


@pytest.fixture
def shards(tmp_path: Path) -> Store:
    return write_set(NumberedSource(), CONFIG, tmp_path / "cache" / "shard-x")


def contents(found: Store) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((found.directory / "train").glob("*.u8"))}


def test_everything_is_there_in_the_order_of_the_shards(shards: Store) -> None:
    assert shards.spec.class_names == ("a", "b", "c")
    assert shards.counts("train") == [100, 64, 7]
    images, labels = everything(shards, "train")
    assert labels.tolist() == [0] * 100 + [1] * 64 + [2] * 7
    first = 0
    for entry in shards.manifest["splits"]["train"]["shards"]:
        record = (shards.shards / entry["path"]).with_suffix(".json").read_text()
        expected = [int(key.split("/")[2]) for key in json.loads(record)["keys"]]
        assert numbers(images[first : first + entry["count"]], entry["class"]) == expected
        first += entry["count"]
    assert list(shards.images("train", [2, 0])) == [2, 0]
    assert shards.images("val", [1])[1].shape == (0, 3, 4, 4)
    assert shards.directory.parent == shards.shards.parent, "beside the shards"


def test_only_the_classes_asked_for_are_made_and_once(shards: Store) -> None:
    shards.images("train", [1])
    (made,) = (shards.directory / "train").glob("*.u8")
    assert made.name == "0001.u8"
    before = made.stat().st_mtime_ns
    (shards.shards / "train/0001-00000.tar").unlink()  # it is not needed any more
    assert sorted(numbers(shards.images("train", [1])[1], 1)) == list(range(64))
    assert made.stat().st_mtime_ns == before


def test_the_images_are_not_read_before_they_are_used(shards: Store) -> None:
    whole = shards.images("train", [0])[0]
    whole[0] = 77  # a copy of the page: the file stays as it is
    assert sorted(numbers(shards.images("train", [0])[0], 0)) == list(range(100))
    with Path("/proc/self/maps").open() as maps:
        assert any("ncfm-store-" in line and "0000.u8" in line for line in maps)


def test_other_shards_have_another_store(shards: Store, tmp_path: Path) -> None:
    again = write_set(NumberedSource(), CONFIG, tmp_path / "elsewhere")
    assert again.directory.name == shards.directory.name, "it follows from the content"
    other = write_set(
        NumberedSource(), ShardConfig(image_size=4, shard_size=31), tmp_path / "cache" / "other"
    )
    assert other.directory.name != shards.directory.name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "5000 bytes"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAX")), "SHA-256"),
    ],
)
def test_a_damaged_shard_is_told_with_the_remedy(
    shards: Store, damage: Callable[[Path], None], message: str
) -> None:
    damage(Path(shards.shards / "train/0001-00001.tar"))
    with pytest.raises(ShardError, match=message) as caught:
        shards.images("train")
    assert "train/0001-00001.tar" in str(caught.value)
    assert "run the shard stage again" in str(caught.value)
    shards.images("train", [0, 2])
    assert not list((shards.directory / "train").glob("*.tmp"))
    assert not (shards.directory / "train" / "0001.u8").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.unlink(),
        flip,
        lambda path: path.with_suffix(".json").write_text(""),  # a disk that lost power
        lambda path: path.with_suffix(".json").unlink(),
    ],
    ids=["cut off", "missing", "one bit", "empty index", "no index"],
)
def test_a_damaged_store_is_made_again(shards: Store, damage: Callable[[Path], None]) -> None:
    shards.images("train")
    whole = contents(shards)
    damage(shards.directory / "train" / "0000.u8")
    assert sorted(numbers(shards.images("train", [0])[0], 0)) == list(range(100))
    assert contents(shards) == whole


def test_a_copy_of_a_store_will_do(shards: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    shards.images("train")
    copied = shards.directory.with_name("copy")
    shutil.copytree(shards.directory, copied, copy_function=shutil.copy)  # with new times
    shutil.rmtree(shards.directory)
    copied.rename(shards.directory)
    monkeypatch.setattr(ClassFile, "make", lambda *_: pytest.fail("made again"))
    for _ in range(2):
        assert sorted(numbers(shards.images("train", [0])[0], 0)) == list(range(100))


@pytest.mark.parametrize("encoding", ["png", "jpeg", "raw"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_encoding_is_read(tmp_path: Path, encoding: str, channels: int) -> None:
    config = ShardConfig(image_size=4, encoding=encoding, channels=channels, jpeg_quality=100)
    images = write_set(NumberedSource(), config, tmp_path / "set").images("train", [0])[0]
    assert images.shape == (100, channels, 4, 4)
    assert images.is_contiguous()
    if channels == 3:
        assert np.abs(np.sort(images[:, 1, 0, 0]).astype(int) - np.arange(100)).max() <= 2


def test_an_object_store_will_do(
    shards: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    stored = write_set(NumberedSource(), CONFIG, UPath("memory://test-store/set"))
    assert stored.manifest["splits"] == shards.manifest["splits"]
    assert torch.equal(*(everything(s, "train")[0] for s in (stored, shards)))
    assert stored.directory.is_relative_to(tmp_path / f"ncfm-ray-{os.getuid()}")
    (UPath("memory://test-store/set") / "val/0002-00000.tar").unlink()
    with pytest.raises(ShardError, match="missing"):
        stored.images("val")


def test_real_images(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "imagenette10-224.tar") as tar:
        members = [m for m in tar if m.isfile() and m.name.split("/")[1] < "n03"]
        tar.extractall(tmp_path / "tree", members=members[::30], filter="data")
    source = FolderSource(UPath(tmp_path / "tree"), 0.1)
    found = write_set(source, ShardConfig(image_size=224, shard_size=8), tmp_path / "set")
    images, _ = everything(found, "val")
    expected = {np.asarray(source.read(s).convert("RGB")).tobytes() for s in source.samples("val")}
    assert {image.permute(1, 2, 0).numpy().tobytes() for image in images} == expected


# --- what may go wrong while it is made -----------------------------------------------------------

MAKE = """
import json, os, sys, time
from pathlib import Path
from upath import UPath
from pipeline.data import store

decode = store._decode
def slow(*arguments):
    time.sleep(float(sys.argv[3]))
    os.write(1, b"decoded\\n")  # at once: several threads decode
    return decode(*arguments)
store._decode = slow
try:
    manifest = json.loads(Path(sys.argv[2]).read_text())
    store.Store(UPath(sys.argv[1]), manifest, *sys.argv[4:]).images("train")
except store.StorageError as error:
    sys.exit(f"error: {error}")
"""


def maker(shards: Store, seconds: float, *local: str, mount: str = "") -> subprocess.Popen[str]:
    """A process that makes the store, taking so long for an image; on a file system of its own if
    mount commands are given.
    """
    manifest = Path(shards.shards / "manifest.json")
    manifest.write_text(json.dumps(shards.manifest))
    command = [sys.executable, "-c", MAKE, str(shards.shards), str(manifest), str(seconds), *local]
    if mount:
        command = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.long)])
def test_killed_anywhere_the_store_is_the_same(tmp_path: Path, kills: int) -> None:
    whole = write_set(NumberedSource(), CONFIG, tmp_path / "whole" / "set")
    whole.images("train")
    killed = write_set(NumberedSource(), CONFIG, tmp_path / "killed" / "set")
    moments = random.Random(0)
    for _ in range(kills):
        with maker(killed, 0.005) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "decoded\n"
            time.sleep(moments.uniform(0, 0.3))
            process.kill()
        for path in killed.directory.glob("train/*.u8"):  # what an index vouches for is whole
            expected = (whole.directory / "train" / path.name).read_bytes()
            if path.with_suffix(".json").exists():
                assert path.read_bytes() == expected
        shutil.rmtree(killed.directory) if len(contents(killed)) == 3 else None
    with maker(killed, 0.01) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert list(killed.directory.glob("train/*.tmp")), "it was at work"
    assert torch.equal(*(everything(s, "train")[0] for s in (whole, killed)))
    assert contents(killed) == contents(whole)
    assert not list(killed.directory.glob("train/*.tmp"))


def test_two_processes_at_once_make_every_image_once(shards: Store) -> None:
    makers = [maker(shards, 0.002) for _ in range(2)]
    lines = [process.communicate()[0].count("decoded") for process in makers]
    assert [process.returncode for process in makers] == [0, 0]
    assert sum(lines) == sum(COUNTS["train"])
    assert sorted(numbers(shards.images("train", [0])[0], 0)) == list(range(100))


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """Where a file system may be mounted in a namespace of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = f"mount -t tmpfs none {place}"
    if not shutil.which("unshare") or subprocess.call(["unshare", "--mount", "sh", "-c", mount]):
        pytest.skip("needs the right to mount a file system")
    return place


@pytest.mark.parametrize(
    ("size", "reason", "free"),
    [("8k", "not enough disk space", "8,192"), ("12k", "No space left on device", "0")],
)
def test_a_full_disk_is_told_with_the_bytes(
    shards: Store, small_disk: Path, size: str, reason: str, free: str
) -> None:
    mount = f"mount -t tmpfs -o size={size} none {small_disk}"
    with maker(shards, 0, str(small_disk), mount=mount) as process:
        _, error = process.communicate()
    assert process.returncode == 1
    (line,) = error.splitlines()
    assert f"error: cannot write the store of real images in {small_disk}/ncfm-store-" in line
    assert f": {reason}; 8,208 bytes are needed, " in line
    assert line.endswith("free there; set --runtime.local_directory to another directory")
    assert f"needed, {free} are free" in line or size == "12k"  # the pages of what was begun


def test_a_read_only_directory(shards: Store, small_disk: Path) -> None:
    shards.images("train", [0])
    mount = (
        f"mount --bind {shards.directory.parent} {small_disk} "
        f"&& mount -o remount,ro,bind {small_disk}"
    )
    with maker(shards, 0, str(small_disk), mount=mount) as process:
        _, error = process.communicate()
    assert process.returncode == 1
    (line,) = error.splitlines()
    assert ": Read-only file system; 3,408 bytes are needed" in line
    for part in ("train", "val", "select"):
        shards.images(part)
    with maker(shards, 0, str(small_disk), mount=mount) as process:
        assert process.wait() == 0, "a whole store is read there"


def test_too_little_room_is_found_before_anything_is_read(
    shards: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.images("train", [2])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=7871))
    with pytest.raises(StorageError, match=r"space; 7,872 bytes are needed, 7,871 are free there"):
        shards.images("train")
    assert len(contents(shards)) == 1
    # What a killed process has begun will be written over: it is no room that is missing.
    (shards.directory / "train" / "0000.tmp").write_bytes(b"x")
    assert len(shards.images("train")) == 3


def test_a_write_that_fails_midway(shards: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, block: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write_all", full)
        with pytest.raises(StorageError, match="No space left on device; 8,208 bytes are needed"):
            shards.images("train")
    assert not [p for p in (shards.directory / "train").iterdir() if p.suffix != ".lock"]
    assert len(shards.images("train")) == 3


def test_a_directory_that_is_none(shards: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    elsewhere = Store(shards.shards, shards.manifest, str(tmp_path / "file" / "below"))
    with pytest.raises(StorageError, match=r"Not a directory; 8,208 bytes are needed, [\d,]+ are"):
        elsewhere.images("train")


def test_progress_is_told_while_a_large_store_is_made(
    shards: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards.images("train", [0])
    assert capsys.readouterr().out == "", "small ones are made without a word"
    monkeypatch.setattr("pipeline.observe.progress.Progress.elapsed", 60.0)
    monkeypatch.setattr(store, "BLOCK_BYTES", 48 * 10)
    shards.images("train", [1])
    assert "[store] 64/64 images" in capsys.readouterr().out


# --- where it is ----------------------------------------------------------------------------------


def test_the_place_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = UPath(tmp_path)
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    assert store_root(cache, "$SCRATCH/mine") == tmp_path / "scratch" / "mine"
    with pytest.raises(StorageError, match=r"\$NOT_SET/x: not set on this node"):
        store_root(cache, "$NOT_SET/x")
    assert store_root(cache, None) == tmp_path
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(local, "_on_network", lambda path: True)
    own = store_root(cache, None)
    assert own == tmp_path / f"ncfm-ray-{os.getuid()}"
    assert own.stat().st_mode & 0o077 == 0
    monkeypatch.setattr("os.getuid", lambda: 12345)
    (tmp_path / "ncfm-ray-12345").mkdir()
    with pytest.raises(StorageError, match="another user"):
        store_root(cache, None)


@pytest.mark.parametrize(
    ("path", "shared"),
    [("/home/me/runs", True), ("/home/me/disk/runs", False), ("/data/runs", False)],
)
def test_network_file_systems_are_known(
    monkeypatch: pytest.MonkeyPatch, path: str, shared: bool
) -> None:
    mounts = "/dev/a / ext4 rw 0 0\nserver:/x /home nfs4 rw 0 0\n/dev/b /home/me/disk xfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: mounts)
    assert local._on_network(Path(path)) == shared


def clean(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> str:
    """What the stage says."""
    run: Any = SimpleNamespace(config=config)
    Clean(run).perform()
    return capsys.readouterr().out


def test_clean_removes_what_nobody_is_making(
    shards: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards.images("train")
    config = RunConfig(storage_path=str(tmp_path))
    other = tmp_path / "cache" / "ncfm-store-0123"
    other.mkdir()
    with in_use(shards.directory):
        assert str(other) in clean(config, capsys)
        assert shards.directory.exists()
        assert not other.exists()
    open_already = shards.images("train", [0])[0]
    assert f"removed {shards.directory} (0 MiB)" in clean(config, capsys)
    assert not shards.directory.exists()
    assert sorted(numbers(open_already, 0)) == list(range(100))
    assert shards.shards.exists()
    assert "no store" in clean(config, capsys)
    assert len(shards.images("train")) == 3
    scratch = RunConfig(runtime=RuntimeConfig(local_directory=str(tmp_path / "cache")))
    assert "removed" in clean(scratch, capsys)
