"""Views: the extractor's inputs of real and synthetic images, under one draw of augmentation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ncfm.augment import Augment, AugmentParams
from ncfm.formation import decode
from ncfm.images import ImageSpec, to_unit


@dataclass(frozen=True)
class SiameseViews:
    """One draw for the real and the synthetic images of a class (DSA). `group` is the position of
    each image's class in the draw.
    """

    augment: Augment
    draw: AugmentParams
    spec: ImageSpec
    factor: int
    dtype: torch.dtype

    def real(self, images: Tensor, group: Tensor) -> Tensor:
        """Normalised, augmented views of real images (N, C, H, W), uint8 or in [0, 1]."""
        return self._augmented(to_unit(images).to(self.dtype), group)

    def synthetic(self, stored: Tensor, group: Tensor) -> Tensor:
        """Those of stored images (N, C, H, W), decoded: (N factor^2, C, H, W)."""
        return self._augmented(decode(stored, self.factor), group.repeat_interleave(self.factor**2))

    def _augmented(self, images: Tensor, group: Tensor) -> Tensor:
        return self.augment.apply(self.spec.normalize(images), self.draw, group)
