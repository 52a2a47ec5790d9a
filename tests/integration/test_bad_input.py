"""Every kind of bad input that a night's run may meet: handled as a user would expect, or on the
quarantine list with a reason; and what stops the stage.
"""

import errno
import io
import json
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered import everything
from PIL import Image
from upath import UPath

from pipeline.data.shards import ShardConfig, write_shard
from pipeline.data.sources import SPLITS, Source, SourceConfig, open_source
from pipeline.data.store import Store
from pipeline.errors import SourceError, StorageError
from pipeline.runtime.files import Manifest
from pipeline.stages.shard import build_manifest, plan, shard

SIZE = 8
CONFIG = ShardConfig(image_size=SIZE, shard_size=100, max_bad=1)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def image(path: Path, picture: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture or Image.new("RGB", (16, 16), BLUE)).save(path, **options)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes with two good blue images in each split."""
    for name in ("train/a/1.png", "train/a/2.png", "train/b/1.png", "train/b/2.png"):
        image(tmp_path / "tree" / name)
        image(tmp_path / "tree" / name.replace("train", "val"))
    return tmp_path / "tree"


def sharded(source: Source, directory: Path) -> tuple[Manifest, dict[str, np.ndarray]]:
    """The manifest, and the stored pixels by the source's keys."""
    for split in SPLITS:
        (directory / split).mkdir(parents=True)
    results = [
        (task, write_shard(task, read=source.read, config=CONFIG, directory=directory, identity=""))
        for task in plan(source, CONFIG.samples_per_shard)
    ]
    manifest = json.loads(json.dumps(build_manifest(source, CONFIG, results)))
    pixels = {}
    for split in SPLITS:
        images, _ = everything(Store(UPath(directory), manifest), split)
        keys = [key for task, record in results if task.split == split for key in record["keys"]]
        pixels.update(zip(keys, images.permute(0, 2, 3, 1).numpy(), strict=True))
    return manifest, pixels


def halves(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", (16, 16), BLUE)
    picture.paste(RED, (0, 0, 8, 16))
    return picture.convert(mode)


def exif_rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise: what is stored on the left is shown on top
    image(path, halves(), exif=exif, quality=100, subsampling=0)


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    image(path, frames[0], save_all=True, append_images=frames[1:], format="GIF")


def write_png(path: Path, side: int, bits: int, kind: int, data: bytes) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b""))


def bomb(path: Path) -> None:
    """A PNG that says to be 30 000 x 30 000 px, in some bytes."""
    write_png(path, 30_000, 8, 2, bytes(1000))


def sixteen_bits_each(path: Path, kind: int, *channels: int) -> None:
    """Of a kind of PNG (2: RGB, 4: grey with alpha, 6: RGBA), which Pillow does not write."""
    row = b"\0" + struct.pack(f">{len(channels)}H", *(value * 257 for value in channels)) * 16
    write_png(path, 16, 16, kind, row * 16)


def heic(path: Path) -> None:
    """The first bytes of what phones write, and nothing after."""
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))


def truncated(path: Path) -> None:
    image(path, Image.effect_noise((64, 64), 50).convert("RGB"))
    path.write_bytes(path.read_bytes()[:900])


def sixteen_bits(path: Path) -> None:
    image(path, Image.fromarray(np.full((16, 16), 200 * 257, np.uint16)), format="PNG")


def transparent(path: Path) -> None:
    picture = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image(path, picture, format="PNG")


@dataclass(frozen=True)
class Case:
    """One file, and what becomes of it: a colour (row, column 0) and (row 0, last), or a reason."""

    name: str
    make: Callable[[Path], object]
    reason: str = ""
    upper_left: tuple[int, int, int] = BLUE
    upper_right: tuple[int, int, int] | None = None


CASES = [
    Case("truncated.jpg", truncated, "OSError: .*truncated"),
    Case("empty.png", lambda path: path.touch(), "UnidentifiedImageError: the file is empty"),
    Case("png-called.jpg", lambda path: image(path, format="PNG")),
    Case(
        "text.jpg",
        lambda path: path.write_text("hello"),
        "UnidentifiedImageError: not an image format",
    ),
    Case("html.jpg", lambda path: path.write_text("<html>404" * 99), "UnidentifiedImageError"),
    Case("phone.HEIC", heic, "UnidentifiedImageError: HEIC, .* convert it to JPEG or PNG"),
    Case("new.avif", lambda path: image(path, halves(), format="AVIF", quality=100), "", RED, BLUE),
    Case("cmyk.jpg", lambda path: image(path, halves("CMYK"), quality=100), "", RED, BLUE),
    Case("sixteen.png", sixteen_bits, "", (200, 200, 200)),
    Case("sixteen-rgb.png", lambda p: sixteen_bits_each(p, 2, *RED), "", RED),
    Case("sixteen-grey-alpha.png", lambda p: sixteen_bits_each(p, 4, 90, 255), "", (90, 90, 90)),
    Case("sixteen-alpha.png", lambda p: sixteen_bits_each(p, 6, *RED, 0), "", (255, 255, 255)),
    Case("grey-alpha.png", lambda p: image(p, Image.new("LA", (8, 8), (9, 255))), "", (9, 9, 9)),
    Case("palette.png", lambda path: image(path, halves("P")), "", RED, BLUE),
    Case("grey.png", lambda path: image(path, Image.new("L", (16, 16), 9)), "", (9, 9, 9)),
    Case("bits.png", lambda path: image(path, Image.new("1", (16, 16), 1)), "", (255,) * 3),
    Case("alpha.png", transparent, "", (255, 255, 255)),
    Case("rotated.jpg", exif_rotated, "", RED, RED),
    Case("animated.gif", animated, "", RED),
    Case("pixel.png", lambda path: image(path, Image.new("RGB", (1, 1), RED)), "", RED),
    Case("bomb.png", bomb, "DecompressionBombError|more than"),
    Case("float.tif", lambda p: image(p, Image.new("F", (4, 4))), "ValueError: floating-point"),
    Case("dangling.png", lambda path: path.symlink_to("nowhere"), "FileNotFoundError"),
    Case("cycle.png", lambda path: path.symlink_to(path), "OSError: .*(loop|symbolic)"),
    Case("ünïcode 文字 \U0001f600.png", image),
    Case("x" * 251 + ".png", image),
    Case(os.fsdecode(b"not-utf8-\xff.png"), lambda path: image(path)),
    Case("folder.png", lambda path: path.mkdir()),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name[:20].encode("ascii", "replace"))
def test_files(case: Case, tree: Path, tmp_path: Path) -> None:
    case.make(tree / "train/a" / case.name)
    source = open_source(SourceConfig(kind="folder", path=str(tree)))
    manifest, pixels = sharded(source, tmp_path / "shards")
    key = f"train/a/{case.name}"
    kept = case.name != "folder.png" and not case.reason
    assert manifest["splits"]["train"]["counts"] == [2 + kept, 2]
    assert manifest["splits"]["val"]["counts"] == [2, 2]
    if case.reason:
        (entry,) = manifest["quarantine"]
        assert (entry["split"], entry["key"]) == ("train", key)
        assert re.match(case.reason, entry["reason"]), entry["reason"]
        assert "0x" not in entry["reason"]  # no address: it is the same in every run
        return
    assert manifest["quarantine"] == []
    if kept:
        corners = pixels[key][0, 0], pixels[key][0, -1]
        wanted = case.upper_left, case.upper_right or case.upper_left
        assert np.abs(np.array(corners).astype(int) - np.array(wanted)).max() <= 3


def test_unreadable_permission(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tree / "train/a/secret.png").chmod(0)
    if os.geteuid() == 0:  # who may read everything
        failing(monkeypatch, "secret.png", errno.EACCES)
    source = open_source(SourceConfig(kind="folder", path=str(tree)))
    manifest, _ = sharded(source, tmp_path / "shards")
    assert manifest["splits"]["train"]["counts"] == [2, 2]
    (entry,) = manifest["quarantine"]
    assert entry["reason"].startswith("PermissionError")


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Opening that file fails so."""
    real = Path.open

    def fake(path: Path, *arguments: object, **options: object) -> object:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fake)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_a_failing_disk_is_no_bad_image(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing(monkeypatch, "2.png", number)
    source = open_source(SourceConfig(kind="folder", path=str(tree)))
    with pytest.raises(StorageError, match=os.strerror(number)):
        sharded(source, tmp_path / "shards")
    assert not list((tmp_path / "shards").rglob("*0000.*"))


@pytest.mark.parametrize(
    ("error", "quarantined"),
    [
        (ConnectionError("reset"), False),
        (PermissionError("the token has expired"), False),
        (RuntimeError("endpoint"), False),
        (FileNotFoundError("gone"), True),
    ],
)
def test_a_failing_object_store_is_no_bad_image(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, quarantined: bool
) -> None:
    root = UPath("memory://test-bad-input/set")
    for path in tree.rglob("*.png"):
        copy = root / path.relative_to(tree).as_posix()
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    source = open_source(SourceConfig(kind="folder", path=str(root)))
    real = root.fs.open
    name = "train/a/2.png"

    def fake(path: str, *arguments: object, **options: object) -> object:
        if path.endswith(name):
            raise error
        return real(path, *arguments, **options)

    monkeypatch.setattr(type(root.fs), "open", staticmethod(fake))
    if quarantined:
        manifest, _ = sharded(source, tmp_path / "shards")
        assert [entry["key"] for entry in manifest["quarantine"]] == [name]
    else:
        with pytest.raises(StorageError, match=str(error)):
            sharded(source, tmp_path / "shards")


# --- whole classes --------------------------------------------------------------------------------


def test_a_class_in_val_that_train_lacks(tree: Path, tmp_path: Path) -> None:
    image(tree / "val/z/1.png")
    source = open_source(SourceConfig(kind="folder", path=str(tree)))
    manifest, _ = sharded(source, tmp_path / "shards")
    assert manifest["class_names"] == ["a", "b"]
    reasons = {entry["key"]: entry["reason"] for entry in manifest["quarantine"]}
    assert reasons == {
        "z": "a class without a train image",
        "val/z/1.png": "its class 'z' has no train image",
    }


def test_an_empty_class_is_left_out(tree: Path, tmp_path: Path) -> None:
    (tree / "train/aa").mkdir()
    (tree / "train/aa/notes.txt").write_text("to do")
    source = open_source(SourceConfig(kind="folder", path=str(tree)))
    manifest, pixels = sharded(source, tmp_path / "shards")
    assert manifest["class_names"] == ["a", "b"]
    assert manifest["splits"]["train"]["counts"] == [2, 2]
    assert manifest["splits"]["train"]["shards"][1]["class"] == 1
    assert [e["key"] for e in manifest["quarantine"]] == ["aa"]
    assert "train/b/1.png" in pixels


def test_one_image_a_class(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "val/a/1.png"):
        image(tmp_path / "tree" / name)
    source = open_source(SourceConfig(kind="folder", path=str(tmp_path / "tree")))
    manifest, _ = sharded(source, tmp_path / "shards")
    assert manifest["splits"]["train"]["counts"] == [1, 1]
    assert manifest["splits"]["val"]["counts"] == [1, 0]
    assert manifest["quarantine"] == []


# --- tables and tars ------------------------------------------------------------------------------


def encoded(colour: tuple[int, int, int] = BLUE) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("label", [-1, 2, None])
def test_a_label_out_of_range(tmp_path: Path, label: int | None) -> None:
    labels = pa.array([0, 0, 1, 1, label], pa.int64())
    features = {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    schema = pa.schema(
        [("image", pa.binary()), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    table = pa.Table.from_arrays([pa.array([encoded()] * 5), labels], schema=schema)
    pq.write_table(table, tmp_path / "rows.parquet")
    config = SourceConfig(kind="parquet", path=str(tmp_path), val_fraction=0.5)
    manifest, pixels = sharded(open_source(config), tmp_path / "shards")
    assert len(pixels) == 4
    (entry,) = manifest["quarantine"]
    assert entry == {"key": "rows.parquet/0/4", "reason": f"no class has the label {label!r}"}


def test_rows_without_an_image(tmp_path: Path) -> None:
    images = pa.array([encoded(), encoded(), None, b"", encoded()], pa.binary())
    table = pa.table({"image": images, "label": [0] * 5})
    pq.write_table(table, tmp_path / "rows.parquet")
    config = SourceConfig(kind="parquet", path=str(tmp_path), val_fraction=0.2)
    manifest, pixels = sharded(open_source(config), tmp_path / "shards")
    assert len(pixels) == 3
    reasons = {entry["key"][-1]: entry["reason"] for entry in manifest["quarantine"]}
    assert reasons == {
        "2": "ValueError: the row has no bytes",
        "3": "UnidentifiedImageError: the file is empty",
    }


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


GOOD = [
    (f"{k}.{suffix}", data)
    for k in range(6)
    for suffix, data in (("png", encoded()), ("cls", b"0"))
]


@pytest.mark.parametrize(
    ("members", "key", "reason"),
    [
        ([("x.png", encoded())], "t/x", "no label: KeyError: .*neither cls nor json"),
        ([("x.png", encoded()), ("x.cls", b"")], "t/x", "no label: TypeError"),
        ([("x.png", encoded()), ("x.json", b"{}")], "t/x", "no label: KeyError: 'label'"),
        ([("x.png", encoded()), ("x.json", b"{")], "t/x", "no label: JSONDecodeError"),
        ([("x.png", encoded()), ("x.cls", b"7")], "t/x", "no class has the label 7"),
        ([("x.cls", b"0")], "t/x", "no image among cls"),
        ([("x.png", b"text"), ("x.cls", b"0")], "t/x", "UnidentifiedImageError"),
        ([("0.png", encoded()), ("0.cls", b"0")], "t/0", "another image has the same key"),
    ],
)
def test_bad_members_of_a_tar(
    tmp_path: Path, members: list[tuple[str, bytes]], key: str, reason: str
) -> None:
    tar(tmp_path / "set/t.tar", [*GOOD, *members])
    options = {"kind": "webdataset", "path": str(tmp_path / "set"), "class_names": ["a", "b"]}
    manifest, pixels = sharded(open_source(SourceConfig(**options)), tmp_path / "shards")
    assert len(pixels) == 6
    found = {entry["key"]: entry["reason"] for entry in manifest["quarantine"]}
    assert found.pop("b") == "a class without a train image"
    assert list(found) == [key]
    assert re.match(reason, found[key])


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda data: data[: 4 * 2048 + 512 + 20], 4),  # inside the fifth image
        (lambda data: data[: 6 * 2048], 6),
        (lambda data: data[: 4 * 1024] + b"\x07" * 512 + data[4 * 1024 + 512 :], 2),
        (lambda data: b"", 0),
        (lambda data: b"no tar" * 1000, 0),
    ],
    ids=["cut off", "no end", "broken header", "empty", "no tar"],
)
def test_a_broken_tar(tmp_path: Path, damage: Callable[[bytes], bytes], left: int) -> None:
    tar(tmp_path / "set/whole.tar", [(f"w{name}", data) for name, data in GOOD])
    path = tar(tmp_path / "set/broken.tar", GOOD)
    path.write_bytes(damage(path.read_bytes()))
    source = open_source(SourceConfig(kind="webdataset", path=str(tmp_path / "set")))
    manifest, pixels = sharded(source, tmp_path / "shards")
    assert len([key for key in pixels if key.startswith("whole/")]) == 6
    assert len(pixels) - 6 == left
    assert "broken.tar" in [entry["key"] for entry in manifest["quarantine"]]


# --- the stage ------------------------------------------------------------------------------------


def test_too_many_bad_images_stop_the_stage(tree: Path, ray_cluster: str, tmp_path: Path) -> None:
    for number in range(4):
        (tree / f"train/a/bad{number}.png").write_text("no image")
    source = open_source(SourceConfig(kind="folder", path=str(tree)))
    strict = ShardConfig(image_size=SIZE, max_bad=0.3)
    with pytest.raises(SourceError) as caught:
        shard(source, strict, UPath(tmp_path / "shards"))
    message = str(caught.value)
    assert "4 of 12 images cannot be used, more than shard.max_bad = 0.3 allows" in message
    assert "4 x UnidentifiedImageError" in message
    assert "train/a/bad" in message
    assert "\n" not in message
    # What is mended is tried again; what was whole is not written anew.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").rglob("*.tar")}
    for number in range(4):
        old = (tree / f"train/a/bad{number}.png").stat()
        image(tree / f"train/a/bad{number}.png")
        os.utime(tree / f"train/a/bad{number}.png", ns=(old.st_atime_ns, old.st_mtime_ns))
    manifest = shard(source, strict, UPath(tmp_path / "shards"))
    assert manifest["splits"]["train"]["counts"] == [6, 2]
    again = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if again[path] != before[path]} <= {"0000-00000.tar"}


def test_a_failing_storage_stops_the_stage(tree: Path, ray_cluster: str, tmp_path: Path) -> None:
    source = open_source(SourceConfig(kind="folder", path=str(tree)))

    def read(sample: object) -> Image.Image:  # here, for it to travel to the tasks by value
        raise StorageError("cannot read x: the disk\nis on fire")

    source.read = read
    with pytest.raises(StorageError, match=r"the disk is on fire.*; the same command resumes") as e:
        shard(source, CONFIG, UPath(tmp_path / "shards"))
    assert "\n" not in str(e.value)
