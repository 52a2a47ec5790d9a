"""Baselines: subsets of the real images, random and by herding."""

import torch
from torch import Tensor

from ncfm.images import ImageSource, ImageSpec, to_unit
from ncfm.models import Classifier
from ncfm.seeding import keyed_generator
from ncfm.synthetic import SyntheticConfig, initial_images


def random_set(real: Tensor, ipc: int, *, seed: int, class_index: int, factor: int = 1) -> Tensor:
    """Random baseline of one class: (ipc, C, H, W) in [0, 1] from its real images (N, C, H, W).

    With a factor above 1, every stored image packs factor^2 real images, like the synthetic set.
    """
    config = SyntheticConfig(factor=factor, init="mix")
    generator = keyed_generator(seed, "random_set", class_index)
    order = torch.randperm(len(real), generator=generator)[: config.real_images_needed(ipc)]
    return initial_images(real[order], ipc, config, generator)


def herding(features: Tensor, count: int) -> Tensor:
    """Herding (Welling 2009): indices (count,) of the samples whose running mean stays closest to
    the mean of features (N, D).
    """
    if not 1 <= count <= len(features):
        raise ValueError(f"herding needs 1 to {len(features)} samples, got {count}")
    mean, total = features.mean(0), torch.zeros_like(features[0])
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen = []
    for k in range(1, count + 1):
        distance = ((total + features) / k - mean).square().sum(1)
        best = int(distance.masked_fill(~free, torch.inf).argmin())
        chosen.append(best)
        free[best] = False
        total = total + features[best]
    return torch.tensor(chosen)


@torch.no_grad()
def herding_set(
    images: ImageSource,
    ipc: int,
    extractor: Classifier,
    spec: ImageSpec,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> Tensor:
    """Herding baseline of one class on an extractor's features: (ipc, C, H, W) float32 in [0, 1],
    best first; a class with fewer images repeats them.

    Iterates over the class twice, in fixed order: features are kept in memory, images are not.
    """
    extractor.to(device).eval()
    passes = (images.epoch(batch_size, None) for _ in range(2))
    features = torch.cat(
        [extractor.features(spec.normalize(to_unit(part.to(device)))) for part, _ in next(passes)]
    )
    chosen = herding(features, min(ipc, len(features)))
    order, start = {int(index): rank for rank, index in enumerate(chosen)}, 0
    images_by_rank: dict[int, Tensor] = {}
    for part, _ in next(passes):
        for index in range(start, start + len(part)):
            if index in order:
                images_by_rank[order[index]] = to_unit(part[index - start].cpu())
        start += len(part)
    return torch.stack([images_by_rank[rank % len(images_by_rank)] for rank in range(ipc)])
