"""Snapshots of the synthetic images at some distillation steps, as small PNG files.

Each worker writes those of its classes; a resumed run writes identical files again.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from upath import UPath

from pipeline.observe.preview import png, to_pixels
from pipeline.runtime.files import write_atomic

SNAPSHOTS = 8  # besides that of step 0
MAX_CLASSES, MAX_IMAGES = 100, 3  # per snapshot: the first classes, the first images of each


def snapshot_steps(num_steps: int) -> set[int]:
    """The steps of the snapshots: 0, the last, and denser at the start, where most changes."""
    return {round(num_steps * (i / SNAPSHOTS) ** 2) for i in range(SNAPSHOTS + 1)}


def write_snapshot(directory: UPath, step: int, images: Mapping[int, Tensor]) -> None:
    """Write step-<step>/class-<class>.png, the images (ipc, C, H, W) of a class side by side."""
    target = directory / f"step-{step:08d}"
    target.mkdir(parents=True, exist_ok=True)
    for c, class_images in images.items():
        if c < MAX_CLASSES:
            strip = torch.cat([*class_images[:MAX_IMAGES].detach().float()], dim=-1)
            write_atomic(target / f"class-{c:04d}.png", png(to_pixels(strip)), durable=False)


@dataclass(frozen=True)
class Snapshot:
    """The images at one step."""

    step: int
    images: Tensor  # (N, 3, H, W) in [0, 1]
    labels: Tensor  # (N,)


def read_snapshots(directory: UPath, classes: int) -> list[Snapshot]:
    """The complete snapshots of a distillation, ordered by step; an interruption may have left
    others that lack classes.
    """
    snapshots = []
    for path in sorted(directory.glob("step-*")) if directory.exists() else []:
        files = sorted(path.glob("class-*.png"))
        if len(files) < min(classes, MAX_CLASSES):
            continue
        images, labels = [], []
        for file in files:
            strip = _read(file)
            parts = strip.split(strip.shape[-2], dim=-1)
            images += parts
            labels += [int(file.stem.removeprefix("class-"))] * len(parts)
        step = int(path.name.removeprefix("step-"))
        snapshots.append(Snapshot(step, torch.stack(images), torch.tensor(labels)))
    return snapshots


def _read(path: UPath) -> Tensor:
    with path.open("rb") as file, Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
