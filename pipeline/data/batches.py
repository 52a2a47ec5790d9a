"""Batches of real images by index, determined by seed, step and class.

No batch depends on memory, caches, workers, or previous batches.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ncfm.images import epoch_order, to_device
from ncfm.seeding import keyed_generator
from pipeline.data.sources import Split
from pipeline.data.store import Store

logger = logging.getLogger(__name__)

REAL_BATCH = "real_batch"
GPU_SHARE = 0.25  # of a GPU's free memory; the rest is for the step


class ClassBatches:
    """Random batches of single classes.

    On a GPU, the images of all these classes are kept in its memory if they fit a quarter of its
    free memory; batches then need no transfer.
    """

    def __init__(
        self,
        store: Store,
        classes: Iterable[int],
        seed: int,
        *,
        split: Split = "train",
        device: torch.device | str = "cpu",
    ) -> None:
        self._images, self._seed = store.images(split, classes), seed
        device, size = torch.device(device), sum(x.nbytes for x in self._images.values())
        if device.type == "cuda" and size <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
            self._images = {c: images.to(device) for c, images in self._images.items()}
        self._allowed: dict[int, Tensor] = {}

    def batch(self, class_index: int, step: int, size: int, *, purpose: str = REAL_BATCH) -> Tensor:
        """(n, C, H, W) uint8, n = min(size, allowed images of the class), without replacement.

        Determined by (seed, purpose, step, class). Raises ValueError on a class without images.
        """
        images = self._images[class_index]
        if not len(images):
            raise ValueError(f"class {class_index} has no images in this split")
        generator = keyed_generator(self._seed, purpose, step, class_index)
        # Sorted, for sequential reads.
        if class_index in self._allowed:
            allowed = self._allowed[class_index]
            order = torch.randperm(len(allowed), generator=generator)[:size]
            chosen = allowed[order].sort().values
        else:
            chosen = torch.randperm(len(images), generator=generator)[:size].sort().values
        return images.index_select(0, to_device(chosen, images.device))

    def images(self, class_index: int) -> Tensor:
        """All images of a class, (N, C, H, W) uint8."""
        return self._images[class_index]

    def restrict(self, class_index: int, allowed: Tensor) -> None:
        """Restrict the batches of a class to the images with these indices."""
        self._allowed[class_index] = allowed

    def allowed(self, class_index: int) -> Tensor:
        """Indices of the images that batches of a class are drawn from."""
        everything = torch.arange(len(self._images[class_index]))
        return self._allowed.get(class_index, everything)

    def step(self, step: int, size: int) -> Mapping[int, Tensor]:
        """The real batches of a step, each gathered on access."""
        return _StepBatches(self, list(self._images), step, size)


class _StepBatches(Mapping[int, Tensor]):
    def __init__(self, source: ClassBatches, classes: list[int], step: int, size: int) -> None:
        self._source, self._classes, self._step, self._size = source, classes, step, size

    def __getitem__(self, class_index: int) -> Tensor:
        return self._source.batch(class_index, self._step, self._size)

    def __iter__(self) -> Iterator[int]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


class StoredImages:
    """An `ncfm.images.ImageSource` over classes of a split. An epoch permutes all images."""

    def __init__(self, store: Store, split: Split, classes: Iterable[int] | None = None) -> None:
        by_class = dict(sorted(store.images(split, classes).items()))
        self._images = [images.numpy() for images in by_class.values()]
        self._labels = np.array(list(by_class))
        self._ends = np.cumsum([len(images) for images in self._images])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def epoch(
        self, batch_size: int, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images (N, C, H, W) uint8 and labels (N,) int64; ordered by class without a
        generator.
        """
        for index in epoch_order(len(self), generator).split(batch_size):
            yield self._gather(index.numpy())

    def _gather(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        slots = np.searchsorted(self._ends, index, side="right")
        places = index - self._ends[slots]  # from the end of the class
        batch = np.empty((len(index), *self._images[0].shape[1:]), np.uint8)
        for row, (slot, place) in enumerate(zip(slots.tolist(), places.tolist(), strict=True)):
            batch[row] = self._images[slot][place]
        return torch.from_numpy(batch), torch.from_numpy(self._labels[slots])


def warn_of_small_classes(counts: Sequence[int], size: int, names: Sequence[str]) -> None:
    """Warn about classes that are smaller than a batch."""
    small = [c for c, count in enumerate(counts) if count < size]
    if small:
        least = min(small, key=counts.__getitem__)
        logger.warning(
            "%d of %d classes are smaller than a batch of %d images (the smallest, %s, "
            "has %d): all their images are in every batch, each once",
            len(small), len(counts), size, names[least], counts[least],
        )  # fmt: skip
