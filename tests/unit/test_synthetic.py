"""The synthetic set: initialisation, saving, loading."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import ncfm
from ncfm.images import ImageSpec
from ncfm.synthetic import SHIPPED, SyntheticConfig, SyntheticSet, initial_images

SPEC = ImageSpec(
    channels=3, image_size=9, mean=(0.4, 0.5, 0.6), std=(0.2,) * 3, class_names=("cat", "größe")
)


def make_set() -> SyntheticSet:
    images = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return SyntheticSet(images, torch.tensor([0, 0, 1, 1]), 2, SPEC, {"seed": 3})


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    made = make_set()
    made.save(tmp_path / "set")
    loaded = ncfm.load(tmp_path / "set")
    assert torch.equal(loaded.images, made.images)
    assert torch.equal(loaded.labels, made.labels)
    assert (loaded.factor, loaded.spec, loaded.provenance) == (2, SPEC, {"seed": 3})
    assert loaded.class_names == ("cat", "größe")


def test_dataset_yields_decoded_images(tmp_path: Path) -> None:
    dataset = make_set().dataset()
    assert len(dataset) == 16  # type: ignore[arg-type]
    image, label = dataset[15]
    assert image.shape == (3, 9, 9)
    assert int(label) == 1
    torch.testing.assert_close(make_set().dataset(SPEC.normalize)[15][0], SPEC.normalize(image))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    make_set().save(tmp_path)
    file = tmp_path / "synthetic.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"synthetic\.safetensors.*damaged"):
        ncfm.load(tmp_path)


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    make_set().save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        ncfm.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        ncfm.load(tmp_path / "nowhere")


@pytest.mark.parametrize(("init", "images"), [("mix", 12), ("random", 3), ("noise", 1)])
def test_initialisation(init: str, images: int) -> None:
    config = SyntheticConfig(factor=2, init=init)  # type: ignore[arg-type]
    assert config.real_images_needed(3) == images
    real = torch.randint(0, 256, (images, 3, 9, 9), dtype=torch.uint8)
    start = initial_images(real, 3, config, torch.Generator().manual_seed(0))
    assert start.shape == (3, 3, 9, 9)
    assert start.dtype == torch.float32
    assert 0 <= float(start.min()) <= float(start.max()) <= 1
    if init == "random":
        torch.testing.assert_close(start, real.float() / 255)


def test_a_small_class_repeats_its_images() -> None:
    real = torch.randint(0, 256, (1, 3, 9, 9), dtype=torch.uint8)
    start = initial_images(real, 2, SyntheticConfig(), torch.Generator())
    assert torch.equal(start[0], start[1])
    with pytest.raises(ValueError, match="without a real image"):
        initial_images(real[:0], 2, SyntheticConfig(), torch.Generator())


@pytest.mark.parametrize(("name", "ipc"), [("fashionmnist-ipc1", 1), ("fashionmnist-ipc10", 10)])
def test_the_sets_of_the_package(
    name: str, ipc: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = ncfm.load(name)
    assert shipped.images.shape == (10 * ipc, 1, 28, 28)
    assert shipped.labels.bincount().tolist() == [ipc] * 10
    assert shipped.class_names[0] == "T-shirt/top"
    for file in (SHIPPED / name).iterdir():  # no path of the machine that made it
        assert not re.search(rb"/(work|home|tmp|root)/", file.read_bytes()), file
    make_set().save(tmp_path / name)  # a folder of that name comes first
    assert ncfm.load(name).images.shape != shipped.images.shape


def test_a_name_of_no_set_tells_those_there_are() -> None:
    with pytest.raises(FileNotFoundError, match=r"with the package come .*fashionmnist-ipc10"):
        ncfm.load("fashionmnist-ipc11")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", r"manifest\.json is not JSON"),
        ("[]", r"manifest\.json is not the manifest"),
        ('{"format": "other", "version": 1}', "'other' version 1"),
        ('{"format": "ncfm-synthetic", "version": 1, "factor": 2}', "lacks channels, image_size"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_named(
    tmp_path: Path, manifest: str, message: str
) -> None:
    make_set().save(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=message):
        ncfm.load(tmp_path)


def test_a_set_of_format_version_1_loads(tmp_path: Path) -> None:
    """Written out by hand: whatever the code becomes, sets that are out there must load."""
    images = torch.linspace(0, 1, 2 * 1 * 2 * 2).view(2, 1, 2, 2)
    data = save({"images": images, "labels": torch.tensor([0, 1])})
    (tmp_path / "synthetic.safetensors").write_bytes(data)
    manifest = {
        "format": "ncfm-synthetic",
        "version": 1,
        "shape": [2, 1, 2, 2],
        "factor": 1,
        "soft_labels": False,
        "images_per_class": 1,
        "channels": 1,
        "image_size": 2,
        "mean": [0.5],
        "std": [0.25],
        "class_names": ["a", "b"],
        "labels": [0, 1],
        "sha256": {"synthetic.safetensors": hashlib.sha256(data).hexdigest()},
        "provenance": {},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    loaded = ncfm.load(tmp_path)
    assert torch.equal(loaded.images, images)
    assert loaded.class_names == ("a", "b")
    assert loaded.soft_labels is None
