"""Image shape and normalisation, and the interface of image sources."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Shape, normalisation and class names of a data set. Pixels are in [0, 1] before
    normalisation.
    """

    channels: int
    image_size: int  # pixels; images are square
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f"{name} needs {self.channels} entries, got {getattr(self, name)}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")

    @property
    def num_classes(self) -> int:
        """The number of class names."""
        return len(self.class_names)

    def normalize(self, images: Tensor) -> Tensor:
        """(..., C, H, W) in [0, 1] -> zero mean, unit variance per channel of the training set."""
        mean, std = (_per_channel(v, images.dtype, images.device) for v in (self.mean, self.std))
        return (images - mean) / std


@functools.lru_cache
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(C, 1, 1); cached, since each copy to a GPU would synchronise."""
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Move a tensor to a device; from CPU to GPU asynchronously, through page-locked memory."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_unit(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [0, 1]; float images pass through."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def epoch_order(count: int, generator: torch.Generator | None) -> Tensor:
    """Order of `count` images in an epoch: a permutation, or the identity without a generator."""
    return torch.arange(count) if generator is None else torch.randperm(count, generator=generator)


class ImageSource(Protocol):
    """Labelled images that are iterated in epochs, in memory or not."""

    def __len__(self) -> int: ...

    def epoch(
        self, batch_size: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (images (N, C, H, W) uint8 or float in [0, 1], labels (N,) int64 or (N, classes)
        float).

        Every image occurs exactly once, in random order with a generator, else in a fixed order.
        """
        ...


@dataclass(frozen=True)
class InMemoryImages:
    """An ImageSource over two tensors."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.images)

    def epoch(
        self, batch_size: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ImageSource.epoch."""
        for index in epoch_order(len(self), generator).to(self.images.device).split(batch_size):
            yield self.images[index], self.labels[index]


@dataclass(frozen=True)
class Relabelled:
    """An ImageSource of some classes of another: label classes[i] becomes i.

    The source must contain only images of these classes. A soft label (all classes,) becomes the
    distribution over these classes, p(classes[i] | one of classes).
    """

    source: ImageSource
    classes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.source)

    def epoch(
        self, batch_size: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ImageSource.epoch."""
        table = torch.full((max(self.classes) + 1,), -1)
        table[torch.tensor(self.classes)] = torch.arange(len(self.classes))
        for images, labels in self.source.epoch(batch_size, generator):
            if labels.ndim == 2:
                own = labels[:, list(self.classes)]
                yield images, own / own.sum(1, keepdim=True)
            else:
                yield images, table.to(labels.device)[labels]
