"""Exports read back by the tools that others would use."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import webdataset
import yaml
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor
from upath import UPath

from ncfm import SyntheticSet
from ncfm.images import ImageSpec
from pipeline.cli import parse_command
from pipeline.errors import UsageError
from pipeline.runtime.directories import folder_names
from pipeline.stages.export_formats import export

NAMES = ("cat", "größe: x/y", "tench, 'Tinca' | tinca")
ROUNDING = 0.5 / 255 + 1e-6  # PNG has 8 bits


def synthetic(soft: bool = False, channels: int = 3) -> SyntheticSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, channels, 12, 12, generator=generator)
    spec = ImageSpec(
        channels=channels,
        image_size=12,
        mean=(0.5,) * channels,
        std=(0.2,) * channels,
        class_names=NAMES,
    )
    made = SyntheticSet(images, torch.arange(3).repeat_interleave(2), 2, spec, {"seed": 3})
    if not soft:
        return made
    labels = torch.rand(24, 3, generator=generator).softmax(1)
    return dataclasses.replace(made, soft_labels=labels)


def header(directory: Path) -> dict:
    """The metadata of the card, read as the hub reads it."""
    _, front, text = (directory / "README.md").read_text().split("---\n", 2)
    assert text.startswith("\n# thing, distilled")
    found: dict = yaml.safe_load(front)
    return found


@pytest.mark.parametrize("channels", [1, 3])
def test_imagefolder_round_trip(tmp_path: Path, channels: int) -> None:
    made = synthetic(channels=channels)
    export(made, UPath(tmp_path), "imagefolder", name="thing")
    read = ImageFolder(str(tmp_path / "train"))
    images, labels = made.decode()
    names = folder_names(NAMES)
    assert sorted(names) == read.classes
    assert len(read) == len(images) == 24
    for path, label in read.samples:
        index = int(Path(path).stem)
        assert read.classes[label] == names[int(labels[index])]
        pixels = to_tensor(read.loader(path))[:channels]
        assert (pixels - images[index]).abs().max() <= ROUNDING


def test_webdataset_round_trip(tmp_path: Path) -> None:
    made = synthetic(soft=True)
    export(made, UPath(tmp_path), "webdataset", name="thing")
    url = str(tmp_path / "train-000000.tar")
    data = webdataset.WebDataset(url, shardshuffle=False).decode("torchrgb")
    images, labels = made.decode()
    rows = list(data)
    assert [int(row["__key__"]) for row in rows] == list(range(24))
    torch.testing.assert_close(
        torch.stack([row["png"] for row in rows]), images, atol=ROUNDING, rtol=0
    )
    assert [row["cls"] for row in rows] == labels.tolist()
    soft = torch.tensor([row["json"]["soft_label"] for row in rows])
    torch.testing.assert_close(soft, made.soft_labels)
    assert (tmp_path / "classes.txt").read_text().splitlines() == list(NAMES)


@pytest.mark.parametrize("soft", [False, True])
def test_parquet_is_read_by_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soft: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    made = synthetic(soft)
    export(made, UPath(tmp_path / "set"), "parquet", name="thing")
    # By its card alone, as the hub would.
    read = load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert read.features["label"].names == list(NAMES)
    images, labels = made.decode()
    assert read["label"][:] == labels.tolist()
    pixels = torch.stack([to_tensor(image) for image in read["image"][:]])
    torch.testing.assert_close(pixels, images, atol=ROUNDING, rtol=0)
    if soft:
        torch.testing.assert_close(torch.tensor(read["soft_label"][:]), made.soft_labels)
    else:
        assert read.column_names == ["image", "label"]


def test_the_card_has_the_hubs_metadata(tmp_path: Path) -> None:
    row = {"set": "distilled", "network": "convnet", "mean": 0.5, "std": 0.01, "accuracy": [0.5]}
    export(synthetic(), UPath(tmp_path), "parquet", name="thing", rows=[row])
    found = header(tmp_path)
    assert found["task_categories"] == ["image-classification"]
    assert found["size_categories"] == ["n<1K"]
    assert found["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    text = (tmp_path / "README.md").read_text()
    assert "| distilled | convnet | 50.0 ± 1.0 | 1 |" in text
    assert "tench, 'Tinca' \\| tinca" in text  # a name cannot break the table
    assert json.dumps("thing, distilled") in text


@pytest.mark.parametrize("to", ["imagefolder", "webdataset", "parquet"])
def test_the_format_is_an_option_of_the_command(to: str) -> None:
    assert parse_command(["export", "--to", to]).config.export.to == to
    assert parse_command(["export", f"--to={to}"]).config.export.to == to
    with pytest.raises(UsageError, match=r"--export\.to.*'imagefolder'.*zip"):
        parse_command(["export", "--to", "zip"])
