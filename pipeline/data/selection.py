"""Selection of the real images that are matched, and of those that initialise synthetic images.

Of the workers that share a class, the first selects, and sends the indices to the others by an
all-reduce: they agree even if their processors round differently.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ncfm.communication import Communicator
from ncfm.distill import DistillConfig
from ncfm.extractors import ExtractorPool
from ncfm.images import ImageSpec
from ncfm.seeding import keyed_generator
from ncfm.selection import easy_count, easy_images, first_images
from ncfm.synthetic import SyntheticConfig, initial_images
from pipeline.data.batches import ClassBatches


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Selection from the real images of a worker's classes, by the pool's networks."""

    batches: ClassBatches
    pool: ExtractorPool
    spec: ImageSpec
    synthetic: SyntheticConfig
    distill: DistillConfig
    ipc: tuple[int, ...]  # stored images of each class
    seed: int
    communicator: Communicator
    device: torch.device

    def restrict(self, class_index: int) -> None:
        """Restrict the batches of a class to its easy images."""
        if self.distill.easy_fraction == 1:
            return
        images = self.batches.images(class_index)
        fraction = self.distill.easy_fraction
        chosen = torch.zeros(easy_count(len(images), fraction), dtype=torch.int64)
        if self.communicator.member == 0:
            chosen = easy_images(self.pool, images, class_index, self.spec, fraction)
        self.batches.restrict(class_index, self._agreed(chosen))

    def initial_images(self, class_index: int) -> Tensor:
        """Initial synthetic images of a class, (ipc, C, H, W)."""
        images, allowed = self.batches.images(class_index), self.batches.allowed(class_index)
        ipc = self.ipc[class_index]
        needed = min(self.synthetic.real_images_needed(ipc), len(allowed))
        chosen = torch.zeros(needed, dtype=torch.int64)
        if self.communicator.member == 0:
            chosen = first_images(
                self.synthetic.choose,
                self.pool,
                images,
                allowed,
                class_index,
                self.spec,
                count=needed,
                seed=self.seed,
            )
        real = images[self._agreed(chosen).to(images.device)]
        noise = keyed_generator(self.seed, "init_noise", class_index)
        return initial_images(real, ipc, self.synthetic, noise)

    def _agreed(self, chosen: Tensor) -> Tensor:
        """The selection of the group's first member; the others pass zeros."""
        if self.communicator.members == 1:
            return chosen
        return self.communicator.sum_group(chosen.to(self.device)).cpu()
