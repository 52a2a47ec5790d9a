"""Sources: which images they list, and what they read."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fsspec import register_implementation
from PIL import Image
from upath import UPath

from pipeline.data.image_files import list_images, read_image
from pipeline.data.sources import SPLITS, SourceConfig, held_out, open_source
from pipeline.data.sources.builtin import PHOTOGRAPHS, BuiltinSource
from pipeline.data.sources.folder import FolderSource
from pipeline.errors import SourceError


def write(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (4, 4), "red")).save(path, **options)
    return path


def folder(path: Path | str) -> FolderSource:
    return FolderSource(UPath(path), 0.2)


# --- builtin --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builtin() -> BuiltinSource:
    return BuiltinSource()


def photograph(name: str) -> np.ndarray:
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
        return np.asarray(image)


def test_no_pixel_is_in_both_splits(builtin: BuiltinSource) -> None:
    for label, name in enumerate(PHOTOGRAPHS):
        height, width = photograph(name).shape[:2]
        seen = {split: np.zeros((height, width), dtype=bool) for split in SPLITS}
        for split in SPLITS:
            for sample in builtin.samples(split):
                if sample.label == label:
                    left, upper, right, lower = sample.where
                    assert 0 <= left < right <= width
                    assert 0 <= upper < lower <= height
                    seen[split][upper:lower, left:right] = True
        assert not (seen["train"] & seen["val"]).any(), name
        # Both see much of the picture, and val sees it in every quarter: it is the same class.
        assert seen["train"].mean() > 0.5, name
        assert seen["val"].mean() > 0.1, name
        for half in (slice(None, height // 2), slice(height // 2, None)):
            assert seen["val"][half, : width // 2].any(), name
            assert seen["val"][half, width // 2 :].any(), name


def test_builtin_crops_are_the_photographs_pixels(builtin: BuiltinSource) -> None:
    for sample in builtin.samples("train")[::97] + builtin.samples("val")[::23]:
        left, upper, right, lower = sample.where
        expected = photograph(PHOTOGRAPHS[sample.label])[upper:lower, left:right]
        np.testing.assert_array_equal(np.asarray(builtin.read(sample)), expected)


def test_builtin_is_deterministic_varied_and_balanced(builtin: BuiltinSource) -> None:
    again = BuiltinSource()
    assert again.fingerprint() == builtin.fingerprint()
    for split, count in (("train", 200), ("val", 50)):
        samples = builtin.samples(split)
        assert samples == again.samples(split)
        assert [s.label for s in samples] == sorted(list(range(10)) * count)
        sides = [s.where[2] - s.where[0] for s in samples]
        assert min(sides) >= 64
        assert len(set(sides)) > 50
        assert len({(s.label, s.where) for s in samples}) > 0.98 * len(samples)
    keys = [sample.key for split in SPLITS for sample in builtin.samples(split)]
    assert len(set(keys)) == len(keys)


# --- folder ---------------------------------------------------------------------------------------


def test_folder_with_both_splits(tmp_path: Path) -> None:
    for name in ("train/b/1.png", "train/a/deep/2.JPG", "train/a/1.png", "val/b/1.png"):
        write(tmp_path / name)
    write(tmp_path / "train/.hidden/1.png")
    write(tmp_path / "train/a/._1.png", format="png")
    (tmp_path / "train/a/notes.txt").write_text("no image")
    source = open_source(SourceConfig(kind="folder", path=str(tmp_path)))
    assert source.class_names == ("a", "b")
    found = [(s.key, s.label) for s in source.samples("train")]
    assert found == [("train/a/1.png", 0), ("train/a/deep/2.JPG", 0), ("train/b/1.png", 1)]
    assert [(s.key, s.label) for s in source.samples("val")] == [("val/b/1.png", 1)]
    sample = pickle.loads(pickle.dumps(source.samples("train")[0]))
    assert source.read(sample).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "test"), ("train", "validation"), ("Train", "Val"), ("training", "valid")],
)
def test_other_names_of_the_parts(tmp_path: Path, train: str, val: str) -> None:
    for name in (f"{train}/a/1.png", f"{val}/a/2.png"):
        write(tmp_path / name)
    source = folder(tmp_path)
    assert source.class_names == ("a",)
    assert [s.key for s in source.samples("train")] == [f"{train}/a/1.png"]
    assert [s.key for s in source.samples("val")] == [f"{val}/a/2.png"]


def test_which_of_several_parts_is_val(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "test/a/2.png", "val/a/3.png", "validation/a/4.png"):
        write(tmp_path / name)
    assert [s.key for s in folder(tmp_path).samples("val")] == ["val/a/3.png"]
    for name in ("train-station/1.png", "testament/1.png", "testament/2.png"):  # classes
        write(tmp_path / "classes" / name)
    assert folder(tmp_path / "classes").class_names == ("testament", "train-station")


def test_held_out_part_is_stable_and_in_every_class(tmp_path: Path) -> None:
    for name, count in (("a", 60), ("b", 3), ("c", 1)):
        for number in range(count):
            write(tmp_path / name / f"{number}.png")
    before = folder(tmp_path)
    val = {s.key for s in before.samples("val")}
    train = {s.key for s in before.samples("train")}
    assert val.isdisjoint(train)
    assert len(val) + len(train) == 64
    assert {key[0] for key in train} == {"a", "b", "c"}
    assert {key[0] for key in val} == {"a", "b"}
    assert 4 <= sum(key.startswith("a/") for key in val) <= 22
    for number in range(60, 90):
        write(tmp_path / "a" / f"{number}.png")
    after = {s.key for s in folder(tmp_path).samples("val")}
    assert {key for key in after if key in train | val} == val
    assert after > val


def test_held_out_fraction() -> None:
    keys = [f"class/{number}.png" for number in range(20_000)]
    assert abs(len(held_out(keys, 0.1)) / 20_000 - 0.1) < 0.01
    assert held_out(keys[:1], 0.9) == set()
    assert len(held_out(keys[:2], 0.999)) == 1
    assert held_out([], 0.1) == set()


def test_fingerprint_follows_the_content_but_not_the_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        for name in ("train/a/1.png", "train/a/2.png", "val/a/3.png"):
            os.utime(write(tmp_path / place / name), (1, 1))
    first = folder(tmp_path / "one").fingerprint()
    assert folder(tmp_path / "two").fingerprint() == first
    os.utime(tmp_path / "two/train/a/1.png", (2, 2))
    assert folder(tmp_path / "two").fingerprint() != first
    (tmp_path / "one/val/a/3.png").rename(tmp_path / "one/val/a/4.png")
    assert folder(tmp_path / "one").fingerprint() != first


def test_links_are_followed_and_cycles_are_left(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/1.png")
    (tmp_path / "tree/train").mkdir(parents=True)
    (tmp_path / "tree/train/a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/gone.png").symlink_to(tmp_path / "nowhere.png")
    write(tmp_path / "tree/val/a/2.png")
    source = folder(tmp_path / "tree")
    good, gone = source.samples("train")
    assert (good.key, gone.key) == ("train/a/1.png", "train/a/gone.png")
    with pytest.raises(FileNotFoundError):
        source.read(gone)


def test_object_store_lists_as_a_local_tree_does(tmp_path: Path) -> None:
    root = UPath("memory://test-object-store/set")
    for name in ("train/a/deep/1.png", "train/a/2.png", "train/b/1.png", "test/b/1.png"):
        data = write(tmp_path / name).read_bytes()
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "train/a/readme.md").write_text("no image")
    stored, local = folder(str(root)), folder(tmp_path)
    for split in SPLITS:
        assert [(s.key, s.label) for s in stored.samples(split)] == [
            (s.key, s.label) for s in local.samples(split)
        ]
    assert stored.read(stored.samples("train")[0]).size == (4, 4)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no class folders"),
        (
            ["photos/a/1.png", "photos/b/1.png"],
            "class folder alone, photos; .*/photos$",
        ),
        (["1.png"], "no class folders"),
        (["train/1.png", "val/a/1.png"], "no class folders"),
        (["val/a/1.png"], "no train/"),
        (["train/b/notes.txt", "val/a/1.png"], "no image for train"),
        (["train/a/1.png", "val/a/notes.txt"], "no image for val"),
        (["a/1.png", "b/1.png"], "no image for val"),
    ],
)
def test_wrong_trees_are_told_in_one_line(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        if name.endswith(".png"):
            write(tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("no image")
    with pytest.raises(SourceError, match=message) as caught:
        folder(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere is not a directory; it must be"):
        folder(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["folder", "parquet", "webdataset"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Unable to locate\ncredentials"), "cannot read .* Unable to locate cred"),
        (PermissionError("Forbidden"), "cannot read .*: PermissionError: Forbidden"),
        (ImportError("Install s3fs"), r"needs a package: Install s3fs; .* extras s3 and gcs"),
    ],
)
def test_an_object_store_that_fails_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, kind: str, error: Exception, message: str
) -> None:
    class Failing(type(UPath("memory://x").fs)):
        def __getattribute__(self, name: str) -> object:
            if name in ("isdir", "info", "find", "ls"):
                raise error
            return super().__getattribute__(name)

    register_implementation("failing", Failing, clobber=True)
    config = SourceConfig(kind=kind, path="failing://bucket/set")
    with pytest.raises(SourceError, match=message) as caught:
        open_source(config)
    assert "failing://bucket/set" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "folder"}, "needs source.path"),
        ({"path": "x"}, "needs source.kind folder"),
        ({"val_fraction": 0.0}, "got 0.0"),
        ({"val_fraction": 1.0}, "got 1.0"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(**options)


def test_real_tree(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "imagenette10-224.tar") as tar:
        members = [m for m in tar if m.isfile()]
        tar.extractall(tmp_path, members=members[::40], filter="data")
    source = folder(tmp_path)
    assert len(source.class_names) == 10
    counts = [len(source.samples(split)) for split in SPLITS]
    assert counts == [len(list((tmp_path / part).rglob("*.JPEG"))) for part in SPLITS]
    assert {source.read(s).size for s in source.samples("val")} == {(224, 224)}
    assert {source.read(s).mode for s in source.samples("train")} <= {"RGB", "L"}


# --- image files ----------------------------------------------------------------------------------


def reread(image: Image.Image, kind: str, **options: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return read_image(file)


def test_modes_become_what_a_viewer_shows() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colour = Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], axis=-1))
    grey = Image.fromarray(ramp)
    assert reread(grey, "PNG").mode == "L"
    np.testing.assert_array_equal(np.asarray(reread(grey, "PNG")), ramp)
    np.testing.assert_array_equal(np.asarray(reread(colour, "PNG")), np.asarray(colour))
    palette = colour.quantize(16)
    for kind in ("GIF", "PNG"):
        assert reread(palette, kind).mode == "RGB"
        np.testing.assert_array_equal(reread(palette, kind), palette.convert("RGB"))
    assert reread(grey.point(lambda v: 255 * (v > 99), "1"), "PNG").getpixel((0, 15)) == 255
    cmyk = reread(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert cmyk.mode == "RGB"
    red, green, blue = cmyk.getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(kind: str) -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    image = reread(Image.fromarray(ramp * 257), kind)
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), ramp)


def test_transparency_becomes_white() -> None:
    hidden = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    hidden.putpixel((1, 0), (0, 0, 0, 0))
    image = reread(hidden, "PNG")
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    image = reread(palette, "PNG", transparency=0)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 255, 0)]


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (16, 8), "blue")
    image.paste("red", (0, 0, 8, 8))  # left half red
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the left half comes up
    turned = reread(image, "JPEG", exif=exif, quality=100, subsampling=0)
    assert turned.size == (8, 16)
    assert turned.getpixel((4, 2))[0] > 200
    assert turned.getpixel((4, 13))[2] > 200


def test_unreadable_files_raise(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.jpg", Image.effect_noise((64, 64), 50)).read_bytes()
    for data in (b"", b"hello", whole[: len(whole) // 2]):
        with pytest.raises((OSError, SyntaxError)):
            read_image(io.BytesIO(data))
    with pytest.raises(ValueError, match="floating-point"):
        reread(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")


def test_strange_names_are_listed(tmp_path: Path) -> None:
    names = ["ünïcode 文.png", "with space.JPEG", "dots.in.name.png", "long" * 60 + ".png"]
    for name in names:
        write(tmp_path / name, format="PNG")
    assert [relative for relative, _, _ in list_images(UPath(tmp_path))] == sorted(names)
