"""The front door: arrays or a Dataset in, a synthetic set out."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import ncfm
from ncfm.arrays import as_arrays, spec_of
from ncfm.distill import DistillConfig
from ncfm.models import ModelConfig
from ncfm.synthetic import SyntheticConfig
from ncfm.train import TrainConfig

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MODEL = ModelConfig(depth=2, width=8)
SETTINGS = ncfm.Settings(
    networks=2,
    training=TrainConfig(epochs=2, lr=0.05, batch_size=16),
    distill=DistillConfig(num_steps=4, real_batch=8, lr=0.02, calibration=1.0),
)
TRAINING = TrainConfig(epochs=20, batch_size=8, lr=0.05)
distil = functools.partial(ncfm.distill, model=MODEL, settings=SETTINGS, report=None, device="cpu")


def stripes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images (N, 3, 12, 12) uint8 whose stripes' direction is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    wave = torch.arange(12) % 4 // 2 * 120
    pattern = torch.stack([wave.expand(12, 12), wave.expand(12, 12).T])[labels]
    noise = torch.randint(0, 100, (count, 3, 12, 12), generator=generator)
    return (pattern.unsqueeze(1) + noise).to(torch.uint8), labels


class Pictures(torch.utils.data.Dataset[tuple[Image.Image, int]]):
    """The same as PIL images."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels, self.classes = images, labels, ["down", "across"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = self.images[index].permute(1, 2, 0).numpy()
        return Image.fromarray(pixels.squeeze()), int(self.labels[index])


def test_a_set_of_arrays() -> None:
    images, labels = stripes(40, seed=0)
    made = distil(images, labels, ipc=2, class_names=["down", "across"])
    assert made.images.shape == (4, 3, 12, 12)
    assert made.labels.tolist() == [0, 0, 1, 1]
    assert made.class_names == ("down", "across")
    assert 0 <= float(made.images.min()) < float(made.images.max()) <= 1
    start = distil(images, labels, ipc=2, num_steps=1)
    assert not torch.equal(start.images, made.images)
    (accuracy,) = ncfm.evaluate(made, *stripes(40, seed=1), model=MODEL, training=TRAINING)
    assert accuracy > 0.8


def test_the_seed_decides() -> None:
    images, labels = stripes(40, seed=0)
    first, again, other = (distil(images, labels, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_snapshots_and_chosen_images() -> None:
    """Images with wrong labels are hard: with half of the images, no set starts from them."""
    images, labels = stripes(80, seed=0)
    wrong = torch.arange(80) % 5 == 0
    given = torch.where(wrong, 1 - labels, labels)
    settings = dataclasses.replace(
        SETTINGS,
        training=TrainConfig(epochs=6, lr=0.05, batch_size=16),
        synthetic=SyntheticConfig(factor=1, choose="spread"),
    )
    options = {
        **{"num_steps": 2, "lr": 1e-6, "objective": "mmd_raw", "loss_weight": 1.0},
        **{"extractor": "snapshot", "calibration_ahead": (0, 2)},
    }
    for fraction, expected in ((0.5, True), (1.0, False)):
        made = distil(images, given, ipc=12, settings=settings, easy_fraction=fraction, **options)
        distances = torch.cdist(made.images.flatten(1), images.flatten(1) / 255)
        assert float(distances.min(1).values.max()) < 0.1  # to any other image it is above 3
        assert bool((labels[distances.argmin(1)] == made.labels).all()) == expected


def test_layouts_and_a_dataset_give_the_same() -> None:
    images, labels = stripes(40, seed=0)
    expected = distil(images, labels)
    for same in (images.permute(0, 2, 3, 1).numpy(), images.float() / 255):
        assert torch.equal(distil(same, labels.numpy()).images, expected.images)
    made = distil(Pictures(images, labels))
    assert torch.equal(made.images, expected.images)
    assert made.class_names == ("down", "across")


def test_mean_and_deviation_are_those_of_the_pixels() -> None:
    images, _ = stripes(10, seed=0)
    spec = spec_of(images, ["a", "b"])
    unit = images.double() / 255
    assert spec.mean == pytest.approx(unit.mean((0, 2, 3)).tolist())
    assert spec.std == pytest.approx(unit.std((0, 2, 3), correction=0).tolist())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 3, 8, 9), np.uint8), [0, 1], r"square.*\(2, 3, 8, 9\)"),
        (np.zeros((2, 8, 8), np.uint8), [0], "2 images do not fit labels"),
        (np.zeros((2, 8, 8), np.uint8), [0, 2], "class 1 has no image"),
        (np.zeros((2, 8, 8), np.uint8), [-1, 0], "labels must be from 0"),
        (np.zeros((2, 8, 8), np.uint8), None, "labels are missing"),
    ],
)
def test_what_cannot_be_distilled_is_told(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distil(images, labels if labels is None else np.array(labels))


def test_labels_of_a_dataset_are_its_own() -> None:
    images, labels = stripes(4, seed=0)
    with pytest.raises(ValueError, match="labels must be None"):
        as_arrays(Pictures(images, labels), labels, None)


def test_progress_is_told_at_the_end_of_each_part() -> None:
    lines: list[str] = []
    distil(*stripes(20, seed=0), report=lines.append)
    assert [line.split("  ")[0] for line in lines] == [
        "[pretrain] 4/4 epochs",
        "[distill] 4/4 steps",
    ]


def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines, on a few small images in the place of Fashion-MNIST."""
    (code,) = re.findall(r"```python\n([^`]*ncfm\.distill\([^`]*)```", README.read_text())
    assert len(code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    images, labels = stripes(40, seed=0)
    small = Pictures(images[:, :1], labels)
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", lambda *_, **__: small)
    monkeypatch.setattr(ncfm, "distill", distil)
    evaluate = functools.partial(ncfm.evaluate, model=MODEL, training=TRAINING)
    monkeypatch.setattr(ncfm, "evaluate", evaluate)
    exec(code, {})
    (saved,) = tmp_path.glob("*/manifest.json")
    assert ncfm.load(saved.parent).images.shape[0] == 2


def test_the_example_runs_and_beats_random_images(tmp_path: Path) -> None:
    """As a user runs it, in a directory of its own."""
    command = [sys.executable, "-m", "ncfm.examples.photographs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    learned, random = map(float, re.findall(r": ([\d.]+)%", done.stdout))
    assert learned > random
    with Image.open(tmp_path / "example-ipc1" / "gallery.png") as picture:
        assert picture.size == (4 * (4 * 33 + 1), 4 * (6 * 33 + 1))
    assert len(ncfm.load(tmp_path / "example-ipc1").images) == 6
