"""Arrays and Datasets of labelled images, as the method takes them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ncfm.images import ImageSpec

Images = Tensor | np.ndarray | Dataset[Any]


def as_arrays(
    images: Images, labels: Tensor | np.ndarray | None, class_names: Sequence[str] | None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images (N, C, H, W) uint8, labels (N,) int64 and the names of the classes."""
    if isinstance(images, Dataset):
        if labels is not None:
            raise ValueError("a Dataset has labels of its own: labels must be None")
        class_names = class_names or getattr(images, "classes", None)
        images, labels = _read(images)
    if labels is None:
        raise ValueError("labels are missing: an array of images needs an array of labels")
    pixels, targets = torch.as_tensor(images), torch.as_tensor(labels).long()
    if pixels.ndim == 3:
        pixels = pixels.unsqueeze(1)
    elif pixels.ndim == 4 and pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3] or pixels.shape[1] not in (1, 3):
        raise ValueError(
            "images must be square, (N, C, H, W), (N, H, W, C) or (N, H, W) with C 1 or 3, got "
            f"shape {tuple(pixels.shape)}"
        )
    if targets.shape != pixels.shape[:1] or not len(targets):
        raise ValueError(f"{len(pixels)} images do not fit labels {tuple(targets.shape)}")
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8)
    names = class_names or [str(c) for c in range(int(targets.max()) + 1)]
    if int(targets.min()) < 0 or int(targets.max()) >= len(names):
        raise ValueError(f"labels must be from 0 to {len(names) - 1}, as there are class names")
    return pixels.contiguous(), targets, tuple(names)


def _read(data: Dataset[Any]) -> tuple[Tensor, Tensor]:
    loader = DataLoader(data, batch_size=256, collate_fn=list)
    pairs = [(_pixels(image), int(label)) for batch in loader for image, label in batch]
    if len(sizes := {image.shape for image, _ in pairs}) != 1:
        raise ValueError(f"the images must be of one size, got {sorted(map(tuple, sizes))[:3]}")
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def _pixels(image: Any) -> Tensor:
    """A tensor as it is; a PIL image or an array (H, W, C) as (C, H, W)."""
    if isinstance(image, Tensor):
        return image
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def spec_of(pixels: Tensor, class_names: Sequence[str]) -> ImageSpec:
    """What images (N, C, H, W) uint8 look like: mean and standard deviation of each channel."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(pixels.shape[1]):
        share = torch.bincount(pixels[:, channel].flatten(), minlength=256).double()
        share /= share.sum()
        mean = float((share * levels).sum())
        means.append(mean)
        stds.append(max(float((share * (levels - mean) ** 2).sum()) ** 0.5, 1 / 255))
    return ImageSpec(
        channels=pixels.shape[1],
        image_size=pixels.shape[2],
        mean=tuple(means),
        std=tuple(stds),
        class_names=tuple(class_names),
    )
